"""The picture of `step_time.py`: seconds per step, shortest on top."""

from pathlib import Path
from typing import Any

import bars


def plot(
    results: dict[str, dict[str, Any]],
    framed: tuple[str, ...],
    title: str,
    note: str,
    path: Path,
) -> None:
    """Draws a bar for each row, and the ratio to Keras' `enable_lora`.

    Args:
        results: the rows by name; the first is the floor.
        framed: how the names of rows start that are not ours.
        title, note: above and below.
        path: where the PNG goes.
    """
    pyplot = bars.pyplot()
    if pyplot is None:
        return
    names = sorted(results, key=lambda name: -results[name]["seconds"])
    floor = next(iter(results.values()))["seconds"]
    lora = next(r["seconds"] for n, r in results.items() if "enable_lora" in n)
    figure, axes = bars.of_seconds(
        pyplot, {n: results[n] for n in names}, framed, "seconds_to_lora"
    )
    for x, text in ((floor, "floor"), (lora, "enable_lora")):
        axes.axvline(x, color="#c0392b", linewidth=1, linestyle="--")
        axes.annotate(
            text,
            (x, len(names) - 0.45),
            xytext=(0, 1),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color="#c0392b",
            fontsize=9,
        )
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(
        "seconds per step: bar = median, line = fastest to slowest,\n"
        f"number = ratio to Keras enable_lora\n{note}",
        fontsize=9,
    )
    axes.set_title(title, pad=18)
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")
