"""The tables of `scale.py`, as a page."""

from typing import Any

_SIGNS = {"yes": "yes", "with remat": "remat", "no": "-"}


def markdown(result: dict[str, Any]) -> str:
    """The tables, as a page."""
    batch, length = result["batch"], result["length"]
    lines = [
        "# Scale, on paper",
        "",
        f"By `tests/benchmarks/scale.py`, {result['machine']['date'][:10]}: "
        "KerasHub's backbones at full size, without values, and what "
        "`estimate` says of them; no weights made, nothing run. "
        f"{batch} x {length:,} tokens, bfloat16, Adam, rank "
        f"{result['rank']}, every linear layer of every block.",
        "",
        "- *step*: FLOPs forward and backward, logits included, as a ratio to "
        "the frozen model (gradients to all activations, none to weights), to "
        f"Keras' `enable_lora({result['rank']})` on the same layers, and to it "
        "on query and value alone, KerasHub's default.",
        "- *enable*: operations of the decompositions on the host in float64: "
        "n²m for the Gram matrix of W (m, n), n <= m, and 9n³ for its "
        "eigenvectors, 4/3·n³ for a few of them. The components of PiSSA and "
        "LoRA-XS in large matrices need less, by Lanczos' method.",
        "- *GB* = weights (2 bytes) + adapter + gradients of trainables + two "
        "slots of Adam + activations + logits (6 bytes each), without and "
        "with rematerialisation. Activations are what autodiff keeps for the "
        "backward pass in KerasHub's block (without a fused attention kernel), "
        "the inputs that the adapters need, and what they keep "
        "themselves, merged kernels too: of all blocks without remat; with "
        "it of one, and the input of each. XLA keeps less (see the check), as "
        "it computes some again; so this is on the safe side.",
        "- *fits*, on one device: yes; remat: only with it; -: no. It may take "
        "95 % of the nominal memory. A T4 has no bfloat16 arithmetic in "
        "hardware; only its memory is meant.",
        "",
    ]
    for title, model in result["models"].items():
        published = model["published_parameters"]
        lines += [
            f"## {title}",
            "",
            f"{model['parameters']:,} parameters"
            + (
                f" (KerasHub publishes {published:,})."
                if published
                else " (no KerasHub preset to compare with)."
            ),
            "",
            "| | trainable | extra frozen, MB | Adam, MB | file, MB | enable, "
            "TFLOP | step, to floor | to enable_lora | to its default | GB | "
            "GB, remat | " + " | ".join(result["devices_gb"]) + " |",
            "|---|" + "---|" * (10 + len(result["devices_gb"])),
        ]
        for name, r in model["results"].items():
            cells = (
                name,
                f"{r['trainable']:,}",
                _mb(r["frozen_bytes"]),
                _mb(r["optimizer_bytes"]),
                _mb(r["file_bytes"]),
                f"{r['enable_flops'] / 1e12:.3g}",
                f"{r['step_to_floor']:.2f}",
                f"{r['step_to_lora']:.2f}",
                f"{r['step_to_lora_query_value']:.2f}",
                f"{r['total_bytes'] / 1e9:.1f}",
                f"{r['total_bytes_with_remat'] / 1e9:.1f}",
                *(_SIGNS[x] for x in r["fits"].values()),
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += _check_lines(result["check"])
    return "\n".join(lines) + "\n"


def _check_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## The check",
        "",
        "FLOPs by this count over XLA's own for the compiled step, and the "
        "activations of the formula over XLA's temporary bytes (which hold "
        "passing intermediates too).",
        "",
        "| | | GFLOP | XLA's | ratio | MB kept | XLA's temporary MB | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['where']} | {r['name']} | {r['flops'] / 1e9:.4g} | "
        f"{r['xla_flops'] / 1e9:.4g} | {r['flops_ratio']:.3f} | "
        f"{r['kept_bytes'] / 1e6:.4g} | {r['xla_temp_bytes'] / 1e6:.4g} | "
        f"{r['bytes_ratio']:.2f} |"
        for r in rows
    ]
    return lines


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3g}" if size < 1e8 else f"{size / 1e6:,.0f}"
