"""What methods with a rank share: checks, the scale, the low-rank branch."""

import dataclasses
import math
from typing import Any, ClassVar, Self

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import (
    IN,
    OUT,
    LinearMap,
    Method,
    ReverseMap,
    Weight,
    Weights,
)
from keras_svdtune.methods.settings import (
    check_alpha,
    check_rank_or_share,
    check_whole_number,
)
from keras_svdtune.runtime.types import Shape, Tensor


class RankedMethod(Method):
    """A method with a `rank` r and a scale of alpha / r.

    `by_energy` says whether `rank` may also be a share of the squared singular
    values, from which the rank of each matrix follows. A matrix of fewer than
    r components gets as many as it has, n = min(in, out), and a scale of
    alpha / n there: LoRA divides by the rank so that the sum of r trained
    terms is of one size at any r, and n is how many terms the sum has there.
    A method without a setting `alpha` has a scale of 1. `shares_ranks` says
    whether `rank` is a budget that the layers share, and not each one's own.
    """

    by_energy: ClassVar[bool] = False
    shares_ranks: ClassVar[bool] = False
    rank: int | float
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_energy:
            check_rank_or_share(self.rank)
        else:
            check_whole_number("rank", self.rank, 1)
        check_alpha(self.alpha)

    def for_shape(self, shape: Shape) -> Self:
        n = min(shape)
        if isinstance(self.rank, float) or self.rank <= n:
            return self
        changes: dict[str, Any] = {"rank": n}
        return dataclasses.replace(self, **changes)

    def resolved(self, factors: Factors | None) -> Self:
        if factors is None or not isinstance(self.rank, float):
            return self
        return self.with_rank(len(factors.s))

    def with_rank(self, rank: int) -> Self:
        """Returns the method with the integer rank found for one matrix."""
        changes: dict[str, Any] = {"rank": rank}
        if hasattr(self, "n_iter"):
            changes["n_iter"] = None  # a share takes an exact decomposition
        return dataclasses.replace(self, **changes)

    def current_rank(self, weights: Weights | None) -> int | float | None:
        return self.rank

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the branch; 1 if alpha is None."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        factors = self.low_rank_factors(weights)
        assert factors is not None  # a method without them has its own form
        return base() + reversed_branch(base, *factors)


class TwoFactors(RankedMethod):
    """A method that trains A and B of W' = W + k·A·B; B is 0 at first.

    Methods differ in where A starts. What they train is a LoRA.
    """

    rank: int

    def weights(self, shape: Shape) -> list[Weight]:
        rows, columns = shape
        return [
            Weight("a", (rows, self.rank), trainable=True, axes=(IN, None)),
            Weight("b", (self.rank, columns), trainable=True, axes=(None, OUT)),
        ]

    def neutral(self, weights: Weights) -> dict[str, Tensor]:
        return {"b": ops.zeros(weights.b.shape)}

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        return base() + branch(base, weights.a, weights.b, self.scale)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        return matrix + self.scale * ops.matmul(weights.a, weights.b)

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.convert_to_tensor(weights.a), weights.b * self.scale


class ProductMethod(RankedMethod):
    """A method that adds a product of two thin matrices, W' = W + A·B.

    It says by `factors` what A and B are, of trained and frozen weights. These
    come from W, so that a file alone does not give the product.
    """

    def factors(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Returns A (in, r) and B (r, out), float32, the scale included."""
        raise NotImplementedError

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        return base() + branch(base, *self.factors(weights), 1.0)

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        return base() + reversed_branch(base, *self.factors(weights))

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        return matrix + ops.matmul(*self.factors(weights))

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        return None if matrix is None else self.factors(weights)


def branch(base: LinearMap, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Computes scale·(x·A)·B in the dtype of `base`; A (in, r), B (r, out).

    A·B is never formed: with it the backward pass would form dW.
    """
    if scale != 1.0:
        b = b * scale  # r·out numbers, not tokens·out
    xa = base.times(ops.cast(a, base.dtype))
    return ops.matmul(xa, ops.cast(b, base.dtype))


def reversed_branch(base: ReverseMap, a: Tensor, b: Tensor) -> Tensor:
    """Computes x·(A·B)ᵀ = (x·Bᵀ)·Aᵀ in the dtype of `base`."""
    xb = base.times(ops.transpose(ops.cast(b, base.dtype)))
    return ops.matmul(xb, ops.transpose(ops.cast(a, base.dtype)))


def random_a(rows: int, rank: int, random: np.random.RandomState) -> np.ndarray:
    """Draws A (in, r) uniformly in ±1/sqrt(in), as the paper's code does."""
    bound = 1.0 / math.sqrt(rows)
    return random.uniform(-bound, bound, (rows, rank))
