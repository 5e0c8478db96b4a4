"""DoRA: LoRA for the directions of W, and a magnitude for each column."""

import dataclasses

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import (
    IN,
    OUT,
    LinearMap,
    ReverseMap,
    Weight,
    Weights,
    register,
)
from keras_svdtune.methods.dropout import DropsInput
from keras_svdtune.methods.low_rank import RankedMethod, branch, random_a
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.settings import check_seed
from keras_svdtune.runtime.types import Shape, Tensor

# Norms of columns whose squares, and sums of these, are normal in float32.
_LEAST_NORM, _LARGEST_NORM = 1e-18, 1e18


@register
@dataclasses.dataclass(frozen=True)
class DoRA(DropsInput, RankedMethod):
    """Weight-decomposed low-rank adaptation.

    Each column of W' (an output unit) has a magnitude m_j and a direction:

        W' = (W + k·A·B)·diag(m / ‖W + k·A·B‖),     k = alpha / rank,
        A (in, r) random, B (r, out) = 0, m (out,) = ‖W‖ at first

    with norms over the input axis, held constant in the backward pass (the
    paper's section 4.3). They are computed without forming W + k·A·B:

        ‖w_j + k·A·b_j‖² = ‖w_j‖² + 2k·(AᵀW)_j·b_j + k²·b_jᵀ(AᵀA)·b_j

    The trainable weight is m - ‖W‖, so that the start is exactly W. A column
    of zeros (a norm below 1e-18) has no direction and stays as it is; a norm
    above 1e18 is an error.

    Trainable: r·(in + out) + out a matrix; frozen: out.

    Its best learning rates are about LoRA's: the sweep
    https://arxiv.org/abs/2602.04998 found optima of 1 to 2 times less. The
    authors advise half of LoRA's rank.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.
        alpha: float or None. The branch is scaled by alpha / rank; None
            means rank, a scale of 1. (The authors use 2·rank.)
        seed: int. Seed of A.
        dropout: by keyword only, float, 0 or more and below 1: as for `LoRA`,
            for x·A·B alone. The authors' code and PEFT also drop x where W
            is scaled, x·W + x̃·W·(g - 1) + k·x̃·A·B·g with g = m / ‖W + k·A·B‖,
            and multiply by W twice; here x·W is scaled whole. The mean over
            x̃ is the same.

    Example:

    ```python
    gemma.backbone.enable_dora(rank=8)
    ```

    Reference: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """

    name = "dora"
    title = "DoRA"
    example = ", rank=8"
    formula = (
        r"W' = \Bigl(W + \frac{\alpha}{r} A B\Bigr)"
        r" \operatorname{diag}\Bigl(\frac{m}{\| W + \frac{\alpha}{r} A B \|}"
        r"\Bigr), \qquad A, B, m \text{ train}"
    )
    picture = (
        "(",
        Block("W", "in", "out"),
        "+",
        Block("A", "in", "r", trains="all"),
        Block("B", "r", "out", trains="all"),
        ")  ·",
        Block("diag(m / ‖·‖)", "out", "out", trains="diagonal"),
    )

    rank: int
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def weights(self, shape: Shape) -> list[Weight]:
        rows, columns = shape
        return [
            Weight("a", (rows, self.rank), trainable=True, axes=(IN, None)),
            Weight("b", (self.rank, columns), trainable=True, axes=(None, OUT)),
            Weight("magnitude_change", (columns,), trainable=True, axes=(OUT,)),
            Weight("squared_norms", (columns,), dtype="float32", axes=(OUT,)),
        ]

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        return {
            "a": random_a(matrix.shape[0], self.rank, random),
            "squared_norms": _squared_norms(ops.convert_to_numpy(matrix)),
        }

    def neutral(self, weights: Weights) -> dict[str, Tensor]:
        return {
            "b": ops.zeros(weights.b.shape),
            "magnitude_change": ops.zeros(weights.magnitude_change.shape),
        }

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        y = base() + branch(base, weights.a, _b(weights), self.scale)
        at = ops.transpose(ops.cast(weights.a, base.dtype))
        excess = self._excess(weights, ops.cast(base.rows(at), "float32"))
        wide = "float64" if base.dtype == "float64" else "float32"
        factor = ops.cast(1.0 + excess, wide)
        return ops.cast(ops.cast(y, wide) * factor, y.dtype)

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        # x·W'ᵀ = (x ⊙ (1 + e))·(W + k·A·B)ᵀ
        at = ops.transpose(ops.cast(weights.a, base.dtype))
        atw = ops.cast(base.back(at), "float32")
        excess = ops.cast(self._excess(weights, atw), base.dtype)
        y = base.moved(base.times(ops.diag(excess)))
        b = _b(weights) * self.scale
        b = ops.cast(b, base.dtype) * (1.0 + excess)
        return y + ops.matmul(base.times(ops.transpose(b)), at)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        directions = matrix + self.scale * ops.matmul(weights.a, _b(weights))
        atw = ops.matmul(ops.transpose(weights.a), matrix)
        return directions * (1.0 + self._excess(weights, atw))

    def magnitude_factors(
        self, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns (a, b, m) with W' = (W + a·b)·diag(m / ‖W + a·b‖).

        They are float32 of shapes (in, r), (r, out) and (out,); norms are of
        columns. None where W has a column of zeros.
        """
        norms = ops.sqrt(ops.convert_to_tensor(weights.squared_norms))
        if not bool(ops.all(norms > 0.0)):
            return None  # elsewhere a column of zeros would be divided by zero
        a = ops.convert_to_tensor(weights.a)
        return a, weights.b * self.scale, norms + weights.magnitude_change

    def _excess(self, weights: Weights, atw: Tensor) -> Tensor:
        """Computes m / ‖W + k·A·B‖ - 1 (out,), given AᵀW (r, out).

        With c = ‖W + k·A·B‖² - ‖W‖² and Δm = m - ‖W‖, it is computed as
        (Δm - c / (‖W‖ + ‖W + k·A·B‖)) / ‖W + k·A·B‖: exactly zero at the start,
        where Δm = c = 0, however the hardware rounds roots.
        """
        k = self.scale
        a, b = weights.a, _b(weights)
        squared_norms = ops.convert_to_tensor(weights.squared_norms)
        gram = ops.matmul(ops.transpose(a), a)
        c = 2.0 * k * ops.sum(atw * b, axis=0)
        c = c + k * k * ops.sum(b * ops.matmul(gram, b), axis=0)
        # Rounding must not take a squared norm below zero.
        c = ops.stop_gradient(ops.maximum(c, -squared_norms))
        norms = ops.sqrt(squared_norms + c)
        # A column without a direction stays, and passes no gradient on.
        alive = norms > 0.0
        safe = ops.where(alive, norms, 1.0)
        growth = c / (ops.sqrt(squared_norms) + safe)
        excess = (weights.magnitude_change - growth) / safe
        return ops.where(alive, excess, 0.0)


def _b(weights: Weights) -> Tensor:
    """Returns B (r, out), zero where W has a column of zeros."""
    alive = ops.convert_to_tensor(weights.squared_norms) > 0.0
    b = ops.convert_to_tensor(weights.b)
    return ops.where(alive, b, ops.zeros_like(b))


def _squared_norms(matrix: np.ndarray) -> np.ndarray:
    """Returns ‖w_j‖² of the columns (out,); 0 where it is next to nothing."""
    # Not by `np.square`, which would make a float64 copy of a large table.
    squares = np.einsum("ij,ij->j", matrix, matrix, dtype="float64")
    norms = np.sqrt(squares)
    if norms.max() > _LARGEST_NORM:
        raise ValueError(
            f"DoRA needs columns with a norm up to {_LARGEST_NORM:g}, whose "
            f"square fits float32. Received: {norms.max():.1e}"
        )
    # Squares of smaller norms lose their digits in float32, on some hardware
    # all of them.
    return np.where(norms < _LEAST_NORM, 0.0, squares).astype("float32")
