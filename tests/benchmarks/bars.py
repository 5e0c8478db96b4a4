"""What the pictures of the benchmarks share: bars of seconds."""

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot` for files, or None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def of_seconds(
    pyplot: Any,
    results: dict[str, dict[str, Any]],
    framed: str | tuple[str, ...],
    ratio: str,
) -> tuple[Any, Any]:
    """A bar for each row, lowest first: median, fastest to slowest, a ratio.

    Args:
        pyplot: as above.
        results: the rows by name, with `seconds` and `all_seconds`.
        framed: how the names of rows start that are not ours.
        ratio: what is written beside a bar, where a row has it.

    Returns:
        The figure and its axes.
    """
    figure, axes = pyplot.subplots(
        figsize=(8, 1.6 + 0.36 * len(results)), layout="constrained"
    )
    for i, (name, r) in enumerate(results.items()):
        low, high = min(r["all_seconds"]), max(r["all_seconds"])
        color = "#b0b7c0" if name.startswith(framed) else "#2f6db3"
        axes.barh(i, r["seconds"], height=0.66, color=color)
        axes.plot([low, high], [i, i], color="#222222", linewidth=1)
        if ratio in r:
            axes.annotate(
                f"{r[ratio]:.2f}",
                (high, i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
    axes.set_yticks(range(len(results)), list(results))
    axes.set_xlim(0, max(max(r["all_seconds"]) for r in results.values()) * 1.1)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
