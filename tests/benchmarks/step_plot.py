"""The picture of `step_time.py`: seconds per step, shortest on top."""

from pathlib import Path
from typing import Any


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
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted(results, key=lambda name: -results[name]["seconds"])
    floor = next(iter(results.values()))["seconds"]
    lora = next(r["seconds"] for n, r in results.items() if "enable_lora" in n)
    figure, axes = pyplot.subplots(
        figsize=(8, 1.6 + 0.36 * len(names)), layout="constrained"
    )
    for i, name in enumerate(names):
        r = results[name]
        axes.barh(
            i,
            r["seconds"],
            height=0.66,
            color="#b0b7c0" if name.startswith(framed) else "#2f6db3",
        )
        low, high = min(r["all_seconds"]), max(r["all_seconds"])
        axes.plot([low, high], [i, i], color="#222222", linewidth=1)
        axes.annotate(
            f"{r['seconds_to_lora']:.2f}",
            (max(high, r["seconds"]), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
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
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, max(max(r["all_seconds"]) for r in results.values()) * 1.1)
    axes.set_xlabel(
        "seconds per step: bar = median, line = fastest to slowest,\n"
        f"number = ratio to Keras enable_lora\n{note}",
        fontsize=9,
    )
    axes.set_title(title, pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")
