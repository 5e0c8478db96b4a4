"""The tables of the reports: layers of equal name and shape in one row."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import rich.console
import rich.table


class LayerRow(Protocol):
    """What a report knows of one layer."""

    @property
    def path(self) -> str: ...
    @property
    def matrix(self) -> tuple[int, int]: ...


L = TypeVar("L", bound=LayerRow)


class PrintsTable:
    """Mixin of a report that `print()` shows as a table."""

    def table(self) -> rich.table.Table:
        """The table, for `rich`."""
        raise NotImplementedError

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table, layers of equal name and shape in one row."""
        (console or rich.console.Console()).print(self.table())


def grouped_table(
    title: str,
    caption: str,
    layers: Sequence[L],
    columns: Sequence[str],
    cells: Callable[[Sequence[L]], Iterable[str]],
    footer: Iterable[str],
    highlight: str,
) -> rich.table.Table:
    """A table with a row for the layers of one name and shape.

    Args:
        title, caption: str, above and below.
        layers: what is known of each layer.
        columns: the names of the columns after layer, matrix and number.
        cells: function from the layers of a row to their cells.
        footer: the cells below the columns.
        highlight: str, the column that the eye is to find.
    """
    table = rich.table.Table(
        title=title, caption=caption, title_style="bold", show_footer=True
    )
    table.add_column("layer", "total", style="cyan", overflow="fold")
    table.add_column("matrix", justify="right")
    table.add_column("layers", f"{len(layers):,}", justify="right")
    for name, total in zip(columns, footer, strict=True):
        style = "bold green" if name == highlight else None
        table.add_column(name, total, justify="right", style=style)
    for (name, (rows, columns_)), group in by_kind(layers).items():
        shape = f"{rows} x {columns_}"
        table.add_row(name, shape, f"{len(group):,}", *cells(group))
    return table


def by_kind(
    layers: Iterable[L],
) -> dict[tuple[str, tuple[int, int]], list[L]]:
    """Layers by their name and the shape of their matrix, in order."""
    groups: dict[tuple[str, tuple[int, int]], list[L]] = {}
    for layer in layers:
        name = layer.path.rsplit("/", 1)[-1]
        groups.setdefault((name, layer.matrix), []).append(layer)
    return groups


def number_range(values: Iterable[float | None]) -> str:
    """`"8"` or `"4-12"`; empty where no layer has such a number."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low}" if low == high else f"{low}-{high}"
