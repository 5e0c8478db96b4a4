"""The table and the plot of the steps that `tpu_compile.py` compiles."""

from pathlib import Path
from typing import Any

import bars
from rich.table import Table

FLOOR = "frozen floor"
LORA = "Keras enable_lora"
FULL = "full fine-tuning"


def table_of(results: dict[str, dict[str, Any]], title: str, note: str) -> Any:
    """The results as a table."""
    table = Table(title=title, caption=note)
    table.add_column("", no_wrap=True)
    for column in (
        "ms, estimated",
        "to enable_lora",
        "to floor",
        "GFLOP",
        "to enable_lora",
        "GB moved",
        "argument MB",
        "temp MB",
        "to enable_lora",
        "trainable",
        "s to compile",
    ):
        table.add_column(column, justify="right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['estimated_seconds'] * 1e3:.3g}",
            f"{r['estimated_seconds_to_lora']:.2f}",
            f"{r['estimated_seconds_to_floor']:.2f}",
            f"{r['flops'] / 1e9:.4g}",
            f"{r['flops_to_lora']:.2f}",
            f"{r['bytes_moved'] / 1e9:.3g}",
            f"{r['argument_bytes'] / 1e6:.4g}",
            f"{r['temp_bytes'] / 1e6:.4g}",
            _short(r["temp_bytes_to_lora"]),
            f"{r['trainable_parameters']:,}",
            f"{r['compile_seconds']:.1f}",
        )
    return table


def _short(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def plot(found: dict[str, Any], title: str, note: str, path: Path) -> None:
    """Draws the estimates as bars, one panel for each number of tokens."""
    pyplot = bars.pyplot()
    if pyplot is None:
        return
    names = list(next(iter(found.values())))[::-1]
    figure, panels = pyplot.subplots(
        1,
        len(found),
        figsize=(2 + 4.5 * len(found), 1.6 + 0.34 * len(names)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (tokens, results) in zip(panels[0], found.items(), strict=True):
        for i, name in enumerate(names):
            r = results[name]
            framed = name in (FLOOR, FULL) or name.startswith(LORA)
            axes.barh(
                i,
                r["estimated_seconds"] * 1e3,
                height=0.66,
                color="#b0b7c0" if framed else "#2f6db3",
            )
            axes.annotate(
                f"{r['estimated_seconds_to_lora']:.2f}",
                (r["estimated_seconds"] * 1e3, i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
            if name == FLOOR or name.startswith(LORA):
                axes.axvline(
                    r["estimated_seconds"] * 1e3,
                    color="#c0392b",
                    linewidth=1,
                    linestyle="--",
                )
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{int(tokens):,} tokens")
        axes.margins(x=0.15)
        axes.set_xlabel("milliseconds, estimated by the compiler")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.supxlabel(f"number = ratio to Keras enable_lora; {note}", fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")
