"""SVF: trains the singular values, and nothing else."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.base import (
    COMPONENTS,
    LinearMap,
    Method,
    ReverseMap,
    Weight,
    Weights,
    register,
    small_side,
)
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.settings import check_rank_or_share
from keras_svdtune.runtime.types import Shape, Tensor

# How much further than LoRA's A and B one step of Adam moves δ: by the study,
# best rates of δ are 3 to 10 times LoRA's. A power of two, so that files hold δ
# exactly.
_STEP = 8.0


@register
@dataclasses.dataclass(frozen=True)
class SVF(Method):
    """Singular value fine-tuning: one trainable number per singular value.

    With W = U diag(s) Vᵀ of shape (in, out) and n = min(in, out), the layer
    computes

        y = x·W + x·U diag(s ⊙ δ) Vᵀ,        δ (n,) trainable, 0 at first,

    that is W with its singular values scaled by 1 + δ. Because W·V = U·diag(s),
    only the singular vectors of the smaller side are kept, n² numbers:

        out <= in:  h = x·W,  y = h + ((h·V) ⊙ δ)·Vᵀ
        in < out:   y = (x + ((x·U) ⊙ δ)·Uᵀ)·W

    Trainable: n float32 numbers a matrix, the i-th of which belongs to the
    i-th largest singular value. Two tunings of the same model add up:
    δ = a·δ₁ + b·δ₂.

    U, s and V are those of W rounded to bfloat16 (`Method.rebuilds_basis`), W
    itself stays as it is. In float32 the layer then computes

        out <= in:  y = x·W·(I + V diag(δ) Vᵀ)
        in < out:   y = x·(I + U diag(δ) Uᵀ)·W

    which is W with its singular values scaled by 1 + δ where bfloat16 holds W
    exactly, and else differs from it by δ times that rounding.

    With `replace_kernel=True` the layer holds W·V instead of W (UᵀW where
    in < out), and computes half of the products with V or U:

        out <= in:  y = ((x·WV) ⊙ (1 + δ))·Vᵀ
        in < out:   y = ((x·U) ⊙ (1 + δ))·UᵀW

    That is x·W' but for rounding, also at first, and `remove_adapter` gives W
    back but for two roundings to the kernel's dtype. Adapter files are the
    same, and load into either. Dense and EinsumDense only.

    The variable that trains holds δ / 8, so that SVF learns at rates that suit
    LoRA (`tests/benchmarks/study.py`). Files and formulas have δ.

    With `rank=r` only the r largest singular values train, and only their r
    singular vectors are kept, r·n numbers: the cheap SVF. W' - W then has rank
    r, so `to_lora` and `export_peft` give the same function as a LoRA. In
    `tests/benchmarks/study.py` it learned less than all singular values did,
    and forgot more (one seed): take it where their n² numbers do not fit.

    Args:
        rank: by keyword only, int or float or None: how many singular values
            of each matrix train; a float in (0, 1] stands for the smallest
            number that holds this share of their squares. None: all.
        replace_kernel: by keyword only, bool: a faster step, without W. Not
            with `rank`.

    Example:

    ```python
    gemma.backbone.enable_svf()
    gemma.backbone.enable_svf(rank=64)
    # the same as
    gemma.backbone.enable_adapter(keras_svdtune.SVF(rank=64))
    ```

    References:
        Sun et al. 2022, https://arxiv.org/abs/2206.06122;
        Sun, Cetin, Tang 2025 (Transformers²),
        https://arxiv.org/abs/2501.06252. The latter's code trains a
        sigmoid gate from a noisy start and keeps the sum of the singular
        values; this is the form of the paper.
    """

    name = "svf"
    title = "SVF"
    linear = True
    rebuilds_basis = True
    formula = (
        r"W' = U \operatorname{diag}\bigl(s \odot (1 + \delta)\bigr) V^\top,"
        r" \qquad \delta \in \mathbb{R}^n \text{ trains, } 0 \text{ at first}"
    )
    picture = (
        Block("U", "in", "n"),
        Block("diag(s ⊙ (1 + δ))", "n", "n", trains="diagonal"),
        Block("Vᵀ", "n", "out"),
    )

    rank: int | float | None = dataclasses.field(
        default=None, repr=False, kw_only=True
    )
    replace_kernel: bool = dataclasses.field(
        default=False, compare=False, repr=False, kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_rank_or_share(self.rank)
        if not isinstance(self.replace_kernel, bool):
            raise ValueError(
                "`replace_kernel` must be True or False. Received: "
                f"replace_kernel={self.replace_kernel!r}"
            )

    def settings(self) -> dict[str, Any]:
        # Without `rank`, files are those that older releases read.
        found = super().settings()
        if self.rank is None:
            del found["rank"]
        return found

    def needs(self, shape: Shape) -> Needs:
        return Needs("small_side")

    def weights(self, shape: Shape) -> list[Weight]:
        n = min(shape)
        return [
            Weight("basis", (n, n), axes=(small_side(shape), COMPONENTS)),
            Weight(
                "delta", (n,), trainable=True, step=_STEP, axes=(COMPONENTS,)
            ),
        ]

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        assert factors is not None
        return {"basis": factors.v if factors.u is None else factors.u}

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        rows, columns = weights.shape
        return self._product(weights, base, after=columns <= rows)

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        # Wᵀ = V diag(s) Uᵀ: the same basis, on its other side.
        rows, columns = weights.shape
        return self._product(weights, base, after=columns > rows)

    def _product(
        self, weights: Weights, base: LinearMap, after: bool
    ) -> Tensor:
        """Computes x·W', the basis applied after W or before it."""
        basis, delta = weights.basis, weights.delta
        if after:
            h = base()
            return h + scaled_components(h, basis, delta)
        return base.moved(scaled(base.times(basis), basis, delta))

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        rows, columns = weights.shape
        basis = ops.cast(weights.basis, weights.delta.dtype)
        if columns <= rows:
            return matrix + scaled_components(matrix, basis, weights.delta)
        change = scaled_components(ops.transpose(matrix), basis, weights.delta)
        return matrix + ops.transpose(change)

    def core(self, weights: Weights, s: np.ndarray) -> np.ndarray:
        return np.asarray(s * ops.convert_to_numpy(weights.delta))


def scaled_components(h: Tensor, basis: Tensor, delta: Tensor) -> Tensor:
    """Computes ((h·B) ⊙ δ)·Bᵀ; h (tokens, n), B (n, n) orthonormal, δ (n,)."""
    return scaled(ops.matmul(h, basis), basis, delta)


def scaled(components: Tensor, basis: Tensor, delta: Tensor) -> Tensor:
    """Computes (components ⊙ δ)·Bᵀ, given components = h·B.

    The product with δ is taken in its dtype, float32: a bfloat16 sum over the
    tokens would lose most of δ's gradient.
    """
    change = times_delta(components, delta)
    return ops.matmul(change, ops.transpose(basis))


def times_delta(components: Tensor, delta: Tensor) -> Tensor:
    """Computes components ⊙ δ in δ's dtype, and casts the result back."""
    change = ops.cast(components, delta.dtype) * delta
    return ops.cast(change, components.dtype)
