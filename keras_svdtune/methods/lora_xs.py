"""LoRA-XS: a tiny matrix between frozen singular vectors."""

import dataclasses

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.base import (
    OUT,
    LinearMap,
    ReverseMap,
    Weight,
    Weights,
    register,
)
from keras_svdtune.methods.low_rank import RankedMethod
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.settings import check_n_iter, check_seed
from keras_svdtune.runtime.types import Shape, Tensor

# How much further than LoRA's A and B one step of Adam moves R: by the study,
# best rates of R are ten times LoRA's or more; this is the power of two next to
# that.
_STEP = 8.0


@register
@dataclasses.dataclass(frozen=True)
class LoRAXS(RankedMethod):
    """LoRA with extremely few parameters: r² a matrix.

    With the r largest components of W = U diag(s) Vᵀ:

        y = x·W + (alpha / rank)·x·A·R·B,
        A = U_r·diag(s_r) (in, r) and B = V_rᵀ (r, out) frozen,
        R (r, r) trainable, 0 at first

    Because W·V_r = U_r·diag(s_r), x·A = (x·W)·V_r, and only V_r is kept:

        h = x·W,  y = h + (alpha / rank)·(h·V_r)·R·V_rᵀ

    U_r and V_r are those of W rounded to bfloat16 (`Method.rebuilds_basis`); W
    itself stays as it is, and A is W·V_r, U_r·diag(s_r) but for that rounding.
    The authors' code starts R from noise of 1e-5; zero has a gradient too.

    Trainable: r² a matrix; frozen beside W: r·out.

    The variable that trains holds R / 8, so that LoRA-XS learns at rates that
    suit LoRA (`tests/benchmarks/study.py`): the authors use 10 to 20 times
    LoRA's for R. Files and formulas have R.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer. Or float
            in (0, 1], for each layer the smallest rank that holds this share
            of the squared singular values.
        alpha: float or None. The scale is alpha / rank; None means rank,
            a scale of 1.
        n_iter: int or None. Power iterations of a randomised SVD (the
            authors use 10); None is exact.
        seed: int. Seed of the randomised SVD.

    Example:

    ```python
    gemma.backbone.enable_lora_xs(rank=32)
    ```

    Reference: Bałazy et al. 2024, https://arxiv.org/abs/2405.17604.
    """

    name = "lora_xs"
    title = "LoRA-XS"
    linear = True
    rebuilds_basis = True
    example = ", rank=8"
    by_energy = True
    formula = (
        r"W' = W + \frac{\alpha}{r} U_r \operatorname{diag}(s_r) R"
        r" V_r^\top, \qquad R \in \mathbb{R}^{r \times r} \text{ trains, }"
        r" 0 \text{ at first}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("Uᵣ·sᵣ", "in", "r"),
        Block("R", "r", "r", trains="all"),
        Block("Vᵣᵀ", "r", "out"),
    )

    rank: int | float
    alpha: float | None = None
    n_iter: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_n_iter(self.n_iter)
        check_seed(self.seed)

    def needs(self, shape: Shape) -> Needs:
        return Needs("top", self.rank, self.n_iter, self.seed)

    def weights(self, shape: Shape) -> list[Weight]:
        rank = int(self.rank)
        return [
            Weight("v", (shape[1], rank), axes=(OUT, None)),
            Weight("r", (rank, rank), trainable=True, step=_STEP),
        ]

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        assert factors is not None
        return {"v": factors.v}

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        h = base()
        return h + self._change(h, weights.v, weights.r)

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        # x·(W·V_r·R·V_rᵀ)ᵀ = ((x·V_r)·Rᵀ·V_rᵀ)·Wᵀ
        xv = base.times(weights.v)
        rt = ops.transpose(self._scaled(weights.r, xv.dtype))
        return base.moved(
            ops.matmul(ops.matmul(xv, rt), ops.transpose(weights.v))
        )

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        v = ops.cast(weights.v, weights.r.dtype)
        return matrix + self._change(matrix, v, weights.r)

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        if matrix is None:  # W·V_r is not kept
            return None
        v = ops.cast(weights.v, weights.r.dtype)
        r = weights.r * self.scale
        return ops.matmul(ops.matmul(matrix, v), r), ops.transpose(v)

    def _change(self, h: Tensor, v: Tensor, r: Tensor) -> Tensor:
        components = ops.matmul(ops.matmul(h, v), self._scaled(r, h.dtype))
        return ops.matmul(components, ops.transpose(v))

    def _scaled(self, r: Tensor, dtype: str) -> Tensor:
        return ops.cast(r * self.scale, dtype)
