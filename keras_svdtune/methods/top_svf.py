"""SVF of the largest singular values alone: the cheap one."""

import dataclasses
from typing import Self

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.base import (
    Weight,
    Weights,
    form_of,
    small_side,
)
from keras_svdtune.methods.settings import check_rank_or_share
from keras_svdtune.methods.svf import SVF
from keras_svdtune.runtime.types import Shape, Tensor


@form_of(SVF, "rank")
@dataclasses.dataclass(frozen=True, repr=False)
class TopSVF(SVF):
    """SVF of the r largest singular values: `SVF(rank=r)`.

    The formulas are those of `SVF`, with the r columns of V (or of U) that
    belong to them: 4·r·n multiplications a token in place of 4·n², beside the
    product with W. The idea of training few of them is SVFit's, which drops
    the rest of W; here W stays.

    Reference: Sun et al. 2024 (SVFit), https://arxiv.org/abs/2409.05926.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_or_share(self.rank)  # None may come from a `rank_pattern`

    def __repr__(self) -> str:
        return f"SVF(rank={self.rank!r})"

    def for_shape(self, shape: Shape) -> Self:
        if not isinstance(self.rank, int) or self.rank <= min(shape):
            return self
        return self.with_rank(min(shape))

    def resolved(self, factors: Factors | None) -> Self:
        assert factors is not None
        return self.with_rank(len(factors.s))

    def with_rank(self, rank: int) -> Self:
        """Returns the method with the integer rank found for one matrix."""
        return dataclasses.replace(self, rank=rank)

    def needs(self, shape: Shape) -> Needs:
        return Needs("top", self.rank)

    def weights(self, shape: Shape) -> list[Weight]:
        basis, delta = super().weights(shape)
        assert isinstance(self.rank, int)  # the method has been resolved
        n, rank = min(shape), self.rank
        axes = (small_side(shape), None)
        return [
            dataclasses.replace(basis, shape=(n, rank), axes=axes),
            dataclasses.replace(delta, shape=(rank,), axes=(None,)),
        ]

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        assert factors is not None
        rows, columns = matrix.shape
        return {"basis": factors.v if columns <= rows else factors.u}

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        if matrix is None:  # neither W·V nor Uᵀ·W is kept
            return None
        rows, columns = weights.shape
        basis = ops.cast(weights.basis, weights.delta.dtype)
        if columns <= rows:
            a = ops.matmul(matrix, basis) * weights.delta
            return a, ops.transpose(basis)
        return basis * weights.delta, ops.matmul(ops.transpose(basis), matrix)

    def core(self, weights: Weights, s: np.ndarray) -> np.ndarray:
        found = np.zeros_like(s)
        delta = ops.convert_to_numpy(weights.delta)
        found[: len(delta)] = s[: len(delta)] * delta
        return found

    def current_rank(self, weights: Weights | None) -> int | float | None:
        return self.rank
