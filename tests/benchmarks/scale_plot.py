"""The picture of `scale.py`: gigabytes of each method, and what has as many."""

import math
from pathlib import Path
from typing import Any

import bars


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws a panel for each model, a bar for each way to train it.

    Args:
        result: what `scale.py` writes.
        path: where the PNG goes.
    """
    pyplot = bars.pyplot()
    if pyplot is None:
        return
    models = result["models"]
    columns = min(2, len(models))
    rows = math.ceil(len(models) / columns)
    names = list(next(iter(models.values()))["results"])
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(6.4 * columns, (0.9 + 0.27 * len(names)) * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, model) in zip(grid.flat, models.items(), strict=False):
        found = model["results"].values()
        whole = [r["total_bytes"] / 1e9 for r in found]
        remat = [r["total_bytes_with_remat"] / 1e9 for r in found]
        axes.barh(names, whole, height=0.7, color="#c9d6e6")
        axes.barh(names, remat, height=0.7, color="#2f6db3")
        for i, need in enumerate(remat):
            axes.annotate(
                f"{need:.3g}",
                (need, i),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox={"facecolor": "#c9d6e6", "linewidth": 0, "pad": 0.5},
            )
        for size in sorted(set(result["devices_gb"].values())):
            axes.axvline(size, color="#c0392b", linewidth=1, linestyle="--")
            axes.annotate(
                str(size),
                (size, -0.6),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color="#c0392b",
                fontsize=7,
            )
        axes.set_xlim(0, max(*whole, 90) * 1.02)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(title, loc="left", fontweight="bold", pad=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    for axes in grid.flat[len(models) :]:
        axes.set_visible(False)
    devices: dict[int, list[str]] = {}
    for device, size in result["devices_gb"].items():
        devices.setdefault(size, []).append(device.partition("-")[0])
    figure.supxlabel(
        f"GB on one device, {result['batch']} x {result['length']:,} tokens, "
        f"bfloat16, rank {result['rank']}: dark with rematerialisation, light "
        "without.\nDashed: "
        + ", ".join(f"{k} GB ({', '.join(v)})" for k, v in devices.items()),
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    print(f"Written: {path}")
