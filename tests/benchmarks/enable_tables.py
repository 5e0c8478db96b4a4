"""The tables of `enable_time.py`, and its picture."""

from pathlib import Path
from typing import Any

import bars
from rich.table import Table


def enabling_table(results: dict[str, Any], title: str, note: str) -> Table:
    """The first table."""
    table = Table(title=title, caption=note)
    table.add_column("", no_wrap=True)
    for column in (
        "seconds",
        "min - max",
        "to torch svd",
        "CPU s",
        "to torch svd",
        "trainable",
        "kept MB",
        "peak extra MB",
        "limit MB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['seconds']:.2f}",
            f"{min(r['all_seconds']):.2f} - {max(r['all_seconds']):.2f}",
            _ratio(r.get("seconds_to_torch")),
            f"{r['cpu_seconds']:.2f}",
            _ratio(r.get("cpu_seconds_to_torch")),
            _or_dash(r["trainable_parameters"], 1),
            _or_dash(r["kept_bytes"], 1e6),
            _or_dash(r["peak_extra_bytes"], 1e6),
            _or_dash(r["limit_bytes"], 1e6),
        )
    return table


def cache_table(results: dict[str, Any]) -> Table:
    """The second table."""
    table = Table(title="With the cache of decompositions")
    for column in ("", "first s", "second s", "ratio", "first CPU s"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("second CPU s", "ratio", "equal to the bit"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        row = [name]
        for unit in ("seconds", "cpu_seconds"):
            first, second = r[f"first_{unit}"], r[f"second_{unit}"]
            row += [f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}"]
        table.add_row(*row, "yes" if r["equal_bits"] else "NO")
    return table


def subspace_table(results: dict[str, Any], rank: int) -> Table:
    """The third table."""
    table = Table(title=f"The {rank} largest components")
    table.add_column("")
    for column in ("median sine", "largest sine", "energy lost, at most"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        table.add_row(name, *(f"{x:.1e}" for x in r.values()))
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _or_dash(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def alternatives_table(results: dict[str, Any], note: str) -> Table:
    """The fourth table."""
    table = Table(title="A basis of the smaller side, by shape", caption=note)
    for column in ("matrix", "algorithm"):
        table.add_column(column, no_wrap=True)
    for column in (
        "first call s",
        "seconds",
        "CPU s",
        "all of this shape, s",
        "ΔW differs by",
        "|BᵀB - I|",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for shape, result in results.items():
        for i, (name, r) in enumerate(result["alternatives"].items()):
            table.add_row(
                f"{result['count']} of {shape}" if i == 0 else "",
                name,
                f"{r['first_seconds']:.3f}",
                f"{r['seconds']:.3f}",
                f"{r['cpu_seconds']:.3f}",
                f"{r['seconds'] * result['count']:.2f}",
                f"{r['relative_difference']:.1e}",
                f"{r['orthogonality']:.1e}",
            )
        table.add_section()
    return table


def plot(
    results: dict[str, dict[str, Any]], title: str, note: str, path: Path
) -> None:
    """Draws the seconds of enabling, fewest on top, and the ratio to torch.

    Args:
        results: the rows of the first table.
        title, note: above and below.
        path: where the PNG goes.
    """
    pyplot = bars.pyplot()
    if pyplot is None:
        return
    names = sorted(results, key=lambda name: -results[name]["seconds"])
    figure, axes = bars.of_seconds(
        pyplot, {n: results[n] for n in names}, "torch", "seconds_to_torch"
    )
    axes.set_xlabel(
        "seconds: bar = median, line = fastest to slowest,\n"
        f"number = ratio to torch.linalg.svd of the same matrices\n{note}",
        fontsize=9,
    )
    axes.set_title(title)
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")
