"""A picture of what each method trains, as SVG.

Grey is frozen, orange trains. Drawn on no background, in colours that are
readable on white and on black.
"""

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FROZEN, TRAINED, TEXT = "#8a8a8a", "#D55E00", "#7d7d7d"
IN, OUT, RANK = 5.0, 3.4, 0.7  # n = min(in, out) = OUT


class Picture:
    """Blocks in a row, from left to right."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(7, 2.9))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_aspect("equal")
        self.axes.axis("off")
        self.x = 0.0

    def block(
        self, height: float, width: float, name: str, trained: bool = False
    ) -> tuple[float, float]:
        """A matrix; returns its left end and its top."""
        left, top = self.x, height / 2
        colour = TRAINED if trained else FROZEN
        self.fill(left, top, width, height, colour, 0.75 if trained else 0.25)
        self.rectangle(
            *(left, top, width, height),
            fill=False,
            edgecolor=colour,
            linewidth=1.4,
        )
        self.text(left + width / 2, -IN / 2 - 0.45, name)
        self.x += width + 0.5
        return left, top

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
            *(left, top, width, height),
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

    def diagonal(
        self, left: float, top: float, size: float, band: int, trained: bool
    ) -> None:
        """The diagonal of a square, and `band` more on each side."""
        steps = 13
        d = size / steps
        for i in range(steps):
            for j in range(max(0, i - band), min(steps, i + band + 1)):
                self.fill(
                    left + j * d,
                    top - i * d,
                    d * 0.92,
                    d * 0.92,
                    TRAINED if trained else FROZEN,
                    0.9,
                )

    def text(self, x: float, y: float, text: str, size: int = 12) -> None:
        """A text in the middle of (x, y)."""
        self.axes.text(
            x, y, text, ha="center", va="center", color=TEXT, fontsize=size
        )

    def svg(self) -> str:
        """The picture."""
        self.text((self.x - 0.5) / 2, IN / 2 + 0.75, "orange trains", 11)
        self.axes.set_xlim(-0.4, max(self.x, 11.0))
        self.axes.set_ylim(-IN / 2 - 0.9, IN / 2 + 1.1)
        out = io.StringIO()
        # Without a date and with fixed ids, the same picture is the same file.
        with rc_context(
            {"svg.hashsalt": "keras_svdtune", "svg.fonttype": "path"}
        ):
            self.figure.savefig(
                out, format="svg", transparent=True, metadata={"Date": None}
            )
        return out.getvalue()


def between(picture: Picture, core: str) -> tuple[float, float]:
    """U, what is between, and Vᵀ; returns the left and top of the middle."""
    picture.block(IN, OUT, "U")
    found = picture.block(OUT, OUT, core)
    picture.block(OUT, OUT, "Vᵀ")
    return found


def svf() -> str:
    """All singular values."""
    picture = Picture()
    left, top = between(picture, "diag(s ⊙ (1 + δ))")
    picture.diagonal(left, top, OUT, 0, True)
    return picture.svg()


def svft() -> str:
    """A band between the singular vectors."""
    picture = Picture()
    left, top = between(picture, "diag(s) + M")
    picture.diagonal(left, top, OUT, 2, True)
    return picture.svg()


def _components(last: bool) -> str:
    """The first or the last components, on both sides."""
    picture = Picture()
    left, top = picture.block(IN, OUT, "A from U·√s")
    picture.fill(left + (OUT - RANK if last else 0.0), top, RANK, IN)
    left, top = picture.block(OUT, OUT, "diag(s)")
    picture.diagonal(left, top, OUT, 0, False)
    left, top = picture.block(OUT, OUT, "B from √s·Vᵀ")
    picture.fill(left, top - (OUT - RANK if last else 0.0), OUT, RANK)
    return picture.svg()


def pissa() -> str:
    """The largest components."""
    return _components(last=False)


def milora() -> str:
    """The smallest components."""
    return _components(last=True)


def lora_xs() -> str:
    """A square between the largest singular vectors."""
    picture = Picture()
    picture.block(IN, OUT, "W")
    picture.sign("+")
    picture.block(IN, RANK, "Uᵣ·sᵣ")
    picture.block(RANK, RANK, "R", trained=True)
    picture.block(RANK, OUT, "Vᵣᵀ")
    return picture.svg()


def lora() -> str:
    """Two thin matrices beside W."""
    picture = Picture()
    picture.block(IN, OUT, "W")
    picture.sign("+")
    picture.block(IN, RANK, "A", trained=True)
    picture.block(RANK, OUT, "B", trained=True)
    return picture.svg()


def dora() -> str:
    """The same, and a magnitude for each column."""
    picture = Picture()
    picture.sign("(")
    picture.block(IN, OUT, "W")
    picture.sign("+")
    picture.block(IN, RANK, "A", trained=True)
    picture.block(RANK, OUT, "B", trained=True)
    picture.sign(")  ·")
    left, top = picture.block(OUT, OUT, "diag(m / ‖·‖)")
    picture.diagonal(left, top, OUT, 0, True)
    return picture.svg()


def adalora() -> str:
    """Triplets beside W, some of which are masked."""
    picture = Picture()
    size = 2 * RANK
    picture.block(IN, OUT, "W")
    picture.sign("+")
    picture.block(IN, size, "P", trained=True)
    left, top = picture.block(size, size, "λ ⊙ mask")
    for i, kept in enumerate((True, False, True, True, False)):
        d = size / 5
        picture.fill(
            left + i * d,
            top - i * d,
            d * 0.9,
            d * 0.9,
            TRAINED if kept else FROZEN,
            0.9,
        )
    picture.block(size, OUT, "Q", trained=True)
    return picture.svg()


PICTURES = {
    "svf": svf,
    "svft": svft,
    "pissa": pissa,
    "milora": milora,
    "lora_xs": lora_xs,
    "lora": lora,
    "dora": dora,
    "adalora": adalora,
}
