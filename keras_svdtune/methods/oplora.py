"""OPLoRA: a LoRA that leaves W's largest components exactly as they are."""

import dataclasses
from typing import Self

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.base import (
    IN,
    OUT,
    Weight,
    Weights,
    register,
)
from keras_svdtune.methods.low_rank import ProductMethod, random_a
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.settings import check_seed, check_whole_number
from keras_svdtune.runtime.types import Shape, Tensor


@register
@dataclasses.dataclass(frozen=True)
class OPLoRA(ProductMethod):
    """LoRA between orthogonal projections, which keeps what W does most.

    With the k = `keep` largest components of W = U diag(s) Vᵀ:

        y = x·W + (alpha / rank)·x·(I - U_k·U_kᵀ)·A·B·(I - V_k·V_kᵀ),
        A (in, r) random and B (r, out) = 0 at first, trainable

    Whatever A and B become, W' has the same k singular values and vectors as
    W: W'·V_k = W·V_k and U_kᵀ·W' = U_kᵀ·W. A and B are projected and not x,
    which is cheaper and the same.

    U_k and V_k are those of W rounded to bfloat16 (`Method.rebuilds_basis`),
    where the authors take W as it is: the two equations hold all the same. They
    are held in float32, since rounded vectors would let some of the change
    through.

    Trainable: r·(in + out) a matrix; frozen: k·(in + out).

    Args:
        rank: int, 1 or more; at most min(in, out) - k in each layer.
        keep: int, 0 or more. The number k of components that stay; at most
            half of min(in, out) in each layer. 0 is LoRA.
        alpha: float or None. The branch is scaled by alpha / rank; None
            means rank, a scale of 1.
        seed: int. Seed of A.

    Example:

    ```python
    gemma.backbone.enable_oplora(rank=8, keep=32)
    ```

    Reference: Xiong, Xie 2025, https://arxiv.org/abs/2510.13003.
    """

    name = "oplora"
    title = "OPLoRA"
    rebuilds_basis = True
    trains_other_components = True
    example = ", rank=8"
    formula = (
        r"W' = W + \frac{\alpha}{r} (I - U_k U_k^\top) A B"
        r" (I - V_k V_k^\top), \qquad A, B \text{ train, }"
        r" B = 0 \text{ at first}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("I - UₖUₖᵀ", "in", "in"),
        Block("A", "in", "r", trains="all"),
        Block("B", "r", "out", trains="all"),
        Block("I - VₖVₖᵀ", "out", "out"),
    )

    rank: int
    keep: int = 16
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_number("keep", self.keep, 0)
        check_seed(self.seed)

    def for_shape(self, shape: Shape) -> Self:
        keep = min(self.keep, min(shape) // 2)
        rank = min(self.rank, min(shape) - keep)
        return dataclasses.replace(self, rank=rank, keep=keep)

    def needs(self, shape: Shape) -> Needs | None:
        return Needs("top", self.keep) if self.keep else None

    def weights(self, shape: Shape) -> list[Weight]:
        rows, columns = shape
        rank, k = self.rank, self.keep
        found = [
            Weight("a", (rows, rank), trainable=True, axes=(IN, None)),
            Weight("b", (rank, columns), trainable=True, axes=(None, OUT)),
        ]
        if k:
            found += [
                Weight("u", (rows, k), dtype="float32", axes=(IN, None)),
                Weight("v", (columns, k), dtype="float32", axes=(OUT, None)),
            ]
        return found

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {
            "a": random_a(matrix.shape[0], self.rank, random)
        }
        if factors is not None:
            found |= {"u": factors.u, "v": factors.v}
        return found

    def neutral(self, weights: Weights) -> dict[str, Tensor]:
        return {"b": ops.zeros(weights.b.shape)}

    def factors(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Returns the projected A (in, r) and B (r, out), B with the scale."""
        a = ops.convert_to_tensor(weights.a)
        b = weights.b * self.scale
        if self.keep:
            u = ops.convert_to_tensor(weights.u)
            v = ops.convert_to_tensor(weights.v)
            a = a - ops.matmul(u, ops.matmul(ops.transpose(u), a))
            b = b - ops.matmul(ops.matmul(b, v), ops.transpose(v))
        return a, b
