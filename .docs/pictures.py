"""Draws the picture of what a method trains, as SVG.

    python .docs/pictures.py

draws some methods as one picture, `pages/methods.svg`, for README.md. Grey is
frozen, orange trains. There is no background, and the colours are readable on
white and on black.
"""

import io
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keras_svdtune.methods.picture import Block, Picture

FROZEN, TRAINED, TEXT = "#8a8a8a", "#D55E00", "#7d7d7d"
SIZES = {"in": 5.0, "out": 3.4, "n": 3.4, "r": 0.7, "2r": 1.4}
TALLEST, RANK = max(SIZES.values()), SIZES["r"]


def draw(picture: Picture) -> str:
    """The SVG of a method's `picture`."""
    figure = Figure(figsize=(7, 2.9))
    drawing = Drawing(figure.add_axes((0, 0, 1, 1)))
    drawing.parts(picture)
    drawing.finish("orange trains", 11)
    return svg(figure)


def draw_all(pictures: dict[str, Picture]) -> str:
    """The SVG of several pictures by their titles, two in a row."""
    rows = -(-len(pictures) // 2)
    figure = Figure(figsize=(7.4, 2.1 * rows))
    for i, (title, picture) in enumerate(pictures.items()):
        left, top = (i % 2) / 2, 1 - (i // 2) / rows
        drawing = Drawing(
            figure.add_axes((left, top - 0.98 / rows, 0.49, 0.96 / rows))
        )
        drawing.parts(picture)
        drawing.finish(title, 12)
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as SVG: the same figure is always the same text."""
    out = io.StringIO()
    # Without a date and with fixed ids.
    with rc_context({"svg.hashsalt": "keras_svdtune", "svg.fonttype": "path"}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None}
        )
    return out.getvalue()


class Drawing:
    """Blocks in a row, from left to right."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.axes.set_aspect("equal")
        self.axes.axis("off")
        self.x = 0.0

    def parts(self, picture: Picture) -> None:
        """All parts of a picture."""
        for part in picture:
            if isinstance(part, Block):
                self.block(part)
            else:
                self.sign(part)

    def block(self, block: Block) -> None:
        """A matrix with its label below, and the part of it that trains."""
        height, width = SIZES[block.rows], SIZES[block.columns]
        left, top = self.x, height / 2
        whole = block.trains == "all"
        colour = TRAINED if whole else FROZEN
        self.fill(left, top, width, height, colour, 0.75 if whole else 0.25)
        self.rectangle(
            left,
            top,
            width,
            height,
            fill=False,
            edgecolor=colour,
            linewidth=1.4,
        )
        match block.trains:
            case "first" | "last":
                self.components(block, left, top, height, width)
            case "diagonal" | "band" | "some" | "frozen":
                self.diagonal(block, left, top, min(height, width))
        self.text(left + width / 2, -TALLEST / 2 - 0.45, block.label)
        self.x += width + 0.5

    def components(
        self, block: Block, left: float, top: float, height: float, width: float
    ) -> None:
        """The first or the last components: rows of Vᵀ, or columns of U."""
        last = block.trains == "last"
        if block.rows == "n":
            self.fill(left, top - last * (height - RANK), width, RANK)
        else:
            self.fill(left + last * (width - RANK), top, RANK, height)

    def diagonal(
        self, block: Block, left: float, top: float, size: float
    ) -> None:
        """The entries of a diagonal, for a band with two more on each side."""
        steps = 13 if size > SIZES["2r"] else 5
        band = 2 if block.trains == "band" else 0
        d = size / steps
        for i in range(steps):
            masked = block.trains == "some" and i in (1, 4)
            frozen = masked or block.trains == "frozen"
            for j in range(max(0, i - band), min(steps, i + band + 1)):
                self.fill(
                    left + j * d,
                    top - i * d,
                    d * 0.92,
                    d * 0.92,
                    FROZEN if frozen else TRAINED,
                    0.9,
                )

    def sign(self, text: str) -> None:
        """A sign between two blocks."""
        self.text(self.x + 0.15, 0.0, text, 18)
        self.x += 0.8

    def fill(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        colour: str = TRAINED,
        alpha: float = 0.75,
    ) -> None:
        """A part of a block."""
        self.rectangle(
            left,
            top,
            width,
            height,
            facecolor=colour,
            alpha=alpha,
            linewidth=0,
        )

    def rectangle(
        self, left: float, top: float, width: float, height: float, **how: Any
    ) -> None:
        """A rectangle, as matplotlib's `Rectangle` is told to look."""
        corner = (left, top - height)
        self.axes.add_patch(Rectangle(corner, width, height, **how))

    def text(self, x: float, y: float, text: str, size: int = 12) -> None:
        """A text in the middle of (x, y)."""
        self.axes.text(
            x, y, text, ha="center", va="center", color=TEXT, fontsize=size
        )

    def finish(self, title: str, size: int) -> None:
        """The title, and the limits of the picture."""
        self.text((self.x - 0.5) / 2, TALLEST / 2 + 0.75, title, size)
        self.axes.set_xlim(-0.4, max(self.x, 11.0))
        self.axes.set_ylim(-TALLEST / 2 - 0.9, TALLEST / 2 + 1.2)


if __name__ == "__main__":
    from keras_svdtune import METHODS

    shown = ("lora", "svf", "lora_xs", "svft", "pissa", "milora")
    found = {METHODS[x].title: METHODS[x].picture for x in shown}
    PAGES = Path(__file__).parent / "pages"
    (PAGES / "methods.svg").write_text(draw_all(found), "utf-8")
