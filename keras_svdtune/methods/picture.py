"""Pictures of what a method trains, each a row of blocks.

The documentation draws them: grey is frozen, orange trains.
"""

import dataclasses
from typing import Literal

Size = Literal["in", "out", "n", "r", "2r"]
Part = Literal[
    "nothing", "all", "diagonal", "band", "some", "first", "last", "frozen"
]


@dataclasses.dataclass(frozen=True)
class Block:
    """One matrix of the picture.

    Attributes:
        label: str, the text below it.
        rows, columns: its size. `"n"` is min(in, out), `"r"` the rank.
        trains: which part is orange: `"all"`; `"diagonal"`; the `"band"`
            around the diagonal; `"some"` entries of the diagonal; the
            `"first"` or `"last"` components; `"nothing"`. `"frozen"` draws a
            diagonal in grey.
    """

    label: str
    rows: Size
    columns: Size
    trains: Part = "nothing"


# Blocks from left to right; a string is a sign between two of them.
Picture = tuple[Block | str, ...]
