"""What a method asks of W = U diag(s) Vᵀ, and what it gets."""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a method needs to know of W = U diag(s) Vᵀ, n = min(in, out).

    Attributes:
        part: `"small_side"`, an orthonormal basis of the smaller side: V
            (n, n) where out <= in, else U (n, n). `"top"` or `"bottom"`,
            the `rank` largest or smallest components of both sides.
        rank: int, how many components; or float in (0, 1], the smallest
            number that holds that share of the sum of s². None for
            `"small_side"`.
        n_iter: int or None. Power iterations of the randomised algorithm for
            `"top"`; None is exact.
        seed: int. Seed of the randomised algorithm.
    """

    part: Literal["small_side", "top", "bottom"]
    rank: int | float | None = None
    n_iter: int | None = None
    seed: int = 0

    def few_of(self, n: int) -> bool:
        """Whether so few of n components are wanted that all cost more."""
        return isinstance(self.rank, int) and 4 * self.rank <= n


@dataclasses.dataclass(frozen=True)
class Factors:
    """Components of W = U diag(s) Vᵀ as float32 NumPy arrays, s descending.

    Attributes:
        u: (in, k), or None where the method has no need of it.
        s: (k,).
        v: (out, k), or None.
    """

    u: np.ndarray | None
    s: np.ndarray
    v: np.ndarray | None


def rank_of_energy(s: np.ndarray, energy: float, part: str) -> int:
    """The smallest number of components with that share of the sum of s².

    Args:
        s: (n,) singular values, descending.
        energy: float in (0, 1].
        part: `"top"`, counted from the largest; `"bottom"`, from the
            smallest.
    """
    squares = np.asarray(s, "float64") ** 2
    total = np.cumsum(squares if part == "top" else squares[::-1])
    # A hair below: the last of n rounded sums may fall short of itself.
    enough = total >= energy * total[-1] * (1 - 1e-12)
    return int(np.argmax(enough)) + 1
