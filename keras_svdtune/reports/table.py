"""Tables of the reports: layers of equal name and shape share a row."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import rich.console
import rich.table


class LayerRow(Protocol):
    """What a report must know of one layer."""

    @property
    def path(self) -> str: ...
    @property
    def matrix(self) -> tuple[int, int]: ...


L = TypeVar("L", bound=LayerRow)


class PrintsTable:
    """Mixin for reports that `print()` shows as a table."""

    def table(self) -> rich.table.Table:
        """Returns the table, for `rich`."""
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
    """Makes a table with a row for the layers of one name and shape.

    `columns` follow the layer, its matrix and the number of layers; `cells`
    maps the layers of a row to their cells; `highlight` is bold and green.
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
    """Groups layers by their name and the shape of their matrix, in order."""
    groups: dict[tuple[str, tuple[int, int]], list[L]] = {}
    for layer in layers:
        name = layer.path.rsplit("/", 1)[-1]
        groups.setdefault((name, layer.matrix), []).append(layer)
    return groups


def number_range(values: Iterable[float | None]) -> str:
    """Formats `"8"` or `"4-12"`; empty where no layer has such a number."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low}" if low == high else f"{low}-{high}"
