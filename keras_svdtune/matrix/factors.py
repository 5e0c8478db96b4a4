"""What a method needs of W = U diag(s) Vᵀ, and the factors that it gets."""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Needs:
    """The part of W = U diag(s) Vᵀ that a method needs, n = min(in, out).

    Attributes:
        part: `"small_side"`, an orthonormal basis of the smaller side: V (n, n)
            where out <= in, else U (n, n). `"top"` or `"bottom"`, the `rank`
            largest or smallest components of both sides.
        rank: int, the number of components; or float in (0, 1], the smallest
            number that holds that share of the sum of s². None for
            `"small_side"`.
        n_iter: int, the power iterations of the randomised algorithm for
            `"top"`; None for the exact one.
        seed: int. Seed of the randomised algorithm.
    """

    part: Literal["small_side", "top", "bottom"]
    rank: int | float | None = None
    n_iter: int | None = None
    seed: int = 0

    def few_of(self, n: int) -> bool:
        """Returns whether it is cheaper to compute `rank` of n components."""
        return isinstance(self.rank, int) and 4 * self.rank <= n


@dataclasses.dataclass(frozen=True)
class Factors:
    """Components of W = U diag(s) Vᵀ as float32 NumPy arrays, s descending.

    Attributes:
        u: (in, k), or None if the method does not need it.
        s: (k,).
        v: (out, k), or None.
        noise: float. Singular values up to about this may be rounding alone;
            0 for a matrix that was not rounded (`matrix/rounding.py`).
    """

    u: np.ndarray | None
    s: np.ndarray
    v: np.ndarray | None
    noise: float = 0.0


def rank_of_energy(s: np.ndarray, energy: float, part: str) -> int:
    """Returns the smallest number of components that holds a share of Σs².

    Args:
        s: (n,) singular values, descending.
        energy: float in (0, 1], the share.
        part: `"top"` counts from the largest, `"bottom"` from the smallest.
    """
    squares = np.asarray(s, "float64") ** 2
    total = np.cumsum(squares if part == "top" else squares[::-1])
    # With a tolerance for the rounding of the n sums.
    enough = total >= energy * total[-1] * (1 - 1e-12)
    return int(np.argmax(enough)) + 1
