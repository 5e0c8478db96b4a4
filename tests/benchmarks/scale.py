"""What each method costs on large models, from their configs alone.

    python tests/benchmarks/scale.py

No weights are made or fetched. Each model is KerasHub's own backbone, built
from its config at full size in a `keras.StatelessScope`, where variables get
shapes and no values; the sum of its parameters is compared with the number
that KerasHub publishes. What a method adds is what `keras_svdtune.estimate`
says of that backbone. FLOPs are counted by XLA in the method's own `call` on
abstract arrays, forward and backward, matrix by matrix; attention and the
logits are added by formula. The whole is checked against what XLA counted in
the other benchmarks, on whole real models.

Memory is an estimate, by the formula that the page gives; its activations are
compared with XLA's temporary bytes there too.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import common
import keras
from rich.progress import track
from scale_candidates import (
    FLOOR,
    LORA,
    QUERY_VALUE,
    activation_bytes,
    candidates,
    memory,
    step_flops,
)
from scale_configs import GEMMA3_270M, MODELS, Config
from scale_page import markdown
from scale_plot import plot

import keras_svdtune
from keras_svdtune.methods.base import Method

# Nominal memory in GB; a model fits if it needs 95 % of it or less.
DEVICES = {
    "v5e": 16,
    "T4": 16,
    "A100-40": 40,
    "A100-80": 80,
    "H100-80": 80,
}
USABLE = 0.95
REPLACED = "svf:replace_kernel=true"


def check_flops(
    folder: Path, methods: dict[str, Method], rank: int
) -> list[dict[str, Any]]:
    """Compares FLOPs and activations with XLA's in other benchmarks."""
    rows: list[dict[str, Any]] = []

    def compare(
        where: str,
        config: Config,
        theirs: dict[str, Any],
        batch: int,
        length: int,
        dtype: str,
    ) -> None:
        for ours in candidates(config, methods, rank, batch * length, dtype):
            if ours.name not in theirs:
                continue
            row = theirs[ours.name]
            flops = step_flops(config, ours, batch, length, head=False)
            kept, fixed = activation_bytes(config, ours, batch, length, dtype)
            temp = config.layers * (kept + fixed)
            rows.append(
                {
                    "where": where,
                    "name": ours.name,
                    "flops": flops,
                    "xla_flops": row["flops"],
                    "flops_ratio": flops / row["flops"],
                    "kept_bytes": temp,
                    "xla_temp_bytes": row["temp_bytes"],
                    "bytes_ratio": temp / max(row["temp_bytes"], 1),
                }
            )

    path = folder / "step_time_gemma3_270m_jax.json"
    if path.exists():
        read = json.loads(path.read_text())
        compare(
            "Gemma 3 270M, CPU, float32",
            GEMMA3_270M,
            read["results"],
            *(read["batch"], read["length"], "float32"),
        )
    for file, title in (
        ("gemma_2b", "Gemma 2B"),
        ("gemma2_9b", "Gemma 2 9B"),
    ):
        path = folder / f"tpu_compile_{file}.json"
        if not path.exists():
            continue
        read = json.loads(path.read_text())
        one = dataclasses.replace(MODELS[title], layers=1)
        for tokens, results in read["results"].items():
            length = min(read["length"], int(tokens))
            compare(
                f"one block of {title}, v5e, {int(tokens):,} tokens",
                *(one, results, int(tokens) // length, length, "bfloat16"),
            )
    return rows


def figures(
    config: Config,
    methods: dict[str, Method],
    rank: int,
    batch: int,
    length: int,
) -> dict[str, dict[str, Any]]:
    """The row of every candidate."""
    found = candidates(config, methods, rank, batch * length)
    flops = {
        c.name: step_flops(config, c, batch, length, head=True) for c in found
    }
    rows = {}
    for c in found:
        need = {
            remat: memory(config, c, batch, length, remat)
            for remat in (False, True)
        }
        total = {remat: sum(x.values()) for remat, x in need.items()}
        rows[c.name] = {
            "trainable": c.trainable,
            "frozen_bytes": c.frozen_bytes,
            "optimizer_bytes": need[False]["optimizer"],
            "file_bytes": c.saved_bytes,
            "enable_flops": c.enable_flops,
            "step_flops": flops[c.name],
            "step_to_floor": flops[c.name] / flops[FLOOR],
            "step_to_lora": flops[c.name] / flops[f"{LORA}({rank})"],
            "step_to_lora_query_value": flops[c.name] / flops[QUERY_VALUE],
            "bytes": need[False],
            "bytes_with_remat": need[True],
            "total_bytes": total[False],
            "total_bytes_with_remat": total[True],
            "fits": {
                device: "yes"
                if total[False] <= USABLE * 1e9 * gb
                else "with remat"
                if total[True] <= USABLE * 1e9 * gb
                else "no"
                for device, gb in DEVICES.items()
            },
        }
    return rows


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0], list(MODELS))
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens each")
    parser.add_argument(
        "--check-against",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder with results of the other benchmarks",
    )
    options = parser.parse_args()
    common.require_jax()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    wanted = options.methods or [*keras_svdtune.METHODS, REPLACED]
    methods, left_out = common.methods_for(wanted, options.rank)
    result: dict[str, Any] = {
        "batch": options.batch,
        "length": options.length,
        "rank": options.rank,
        "machine": machine,
        "left_out": left_out,
        "devices_gb": DEVICES,
        "models": {},
    }
    models = dict(MODELS)
    if common.TINY in options.model:
        models[common.TINY] = dataclasses.replace(
            GEMMA3_270M, layers=2, width=64, inner=128, preset=None
        )
    for name in track(options.model, "Counting"):
        config = models[name]
        published = config.published_parameters
        if published not in (None, config.parameters):
            raise AssertionError(
                f"{name}: {config.parameters:,} parameters by its config; "
                f"KerasHub publishes {published:,}."
            )
        result["models"][name] = {
            "config": dataclasses.asdict(config),
            "parameters": config.parameters,
            "published_parameters": published,
            "results": figures(
                config, methods, options.rank, options.batch, options.length
            ),
        }
    result["check"] = check_flops(options.check_against, methods, options.rank)
    page = markdown(result)
    print(page)
    common.write_json(options.results, "scale", result)
    path = options.results / "scale.md"
    path.write_text(page, encoding="utf-8")
    print(f"Written: {path}")
    plot(result, options.results / "scale.png")
    worst = max((abs(r["flops_ratio"] - 1) for r in result["check"]), default=0)
    print(f"FLOPs differ from XLA's by {worst:.1%} at most.")


if __name__ == "__main__":
    main()
