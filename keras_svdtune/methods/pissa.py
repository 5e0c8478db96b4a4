"""PiSSA: a low-rank adapter that starts from the largest components."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.base import (
    IN,
    OUT,
    LinearMap,
    Weight,
    Weights,
    register,
)
from keras_svdtune.methods.low_rank import RankedMethod, branch
from keras_svdtune.methods.picture import Block, Picture
from keras_svdtune.methods.settings import (
    check_n_iter,
    check_seed,
    check_whole_number,
)
from keras_svdtune.runtime.types import Shape, Tensor

# The quantizations of Keras' Dense and EinsumDense layers from which a float
# kernel can be read back.
QUANTIZATIONS = ("int8", "int4")


def components_picture(part: Literal["first", "last"]) -> Picture:
    """Returns the picture of a method that trains components at one end."""
    return (
        Block("A from U·√s", "in", "n", trains=part),
        Block("diag(s)", "n", "n", trains="frozen"),
        Block("B from √s·Vᵀ", "n", "out", trains=part),
    )


@dataclasses.dataclass(frozen=True)
class StartedLoRA(RankedMethod):
    """A low-rank adapter A·B that starts from some A₀·B₀.

    In the papers W is replaced by W - k·A₀·B₀, with k = alpha / rank, and A, B
    train from A₀, B₀. Here W stays, and the changes of A and B train, from
    zero:

        y = x·W + k·(x·A·B - x·A₀·B₀),      A = A₀ + ΔA,  B = B₀ + ΔB
          = x·W + k·(x·ΔA·B + x·A₀·ΔB)

    The last form is computed. Its gradients are those of A and B, it is
    exactly x·W at first, and it never subtracts two large and nearly equal
    products, which in bfloat16 would leave little but rounding. (Weight decay
    draws A towards A₀, not towards zero.)
    """

    step: ClassVar[float] = 1.0  # of ΔA and ΔB, as in `Weight`

    rank: int | float
    alpha: float | None = None

    def weights(self, shape: Shape) -> list[Weight]:
        rows, columns = shape
        rank = int(self.rank)
        return [
            Weight(
                "delta_a",
                (rows, rank),
                trainable=True,
                step=self.step,
                axes=(IN, None),
            ),
            Weight(
                "delta_b",
                (rank, columns),
                trainable=True,
                step=self.step,
                axes=(None, OUT),
            ),
            # Saved, so that a file gives the same function on any backend.
            Weight("a0", (rows, rank), saved=True, axes=(IN, None)),
            Weight("b0", (rank, columns), saved=True, axes=(None, OUT)),
        ]

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        # One product of rank 2r rather than two of rank r.
        return base() + branch(base, *self.low_rank_factors(weights), 1.0)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        return matrix + ops.matmul(*self.low_rank_factors(weights))

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns factors of rank 2r: A·B - A₀·B₀ = [ΔA A₀]·[B; ΔB]."""
        dtype = weights.delta_b.dtype
        b = ops.cast(weights.b0, dtype) + weights.delta_b
        a = [weights.delta_a, ops.cast(weights.a0, dtype)]
        return (
            ops.concatenate(a, axis=1),
            ops.concatenate([b, weights.delta_b], axis=0) * self.scale,
        )


@dataclasses.dataclass(frozen=True)
class SpectralLoRA(StartedLoRA):
    """A low-rank adapter A·B that starts from components of W.

    A₀ = U_r·√(s_r/k) and B₀ = √(s_r/k)·V_rᵀ hold r components of W.
    """

    part: ClassVar[Literal["top", "bottom"]] = "top"
    by_energy = True

    def needs(self, shape: Shape) -> Needs:
        return Needs(self.part, self.rank)

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        assert factors is not None
        assert factors.u is not None and factors.v is not None
        root = np.sqrt(factors.s / self.scale)
        return {"a0": factors.u * root, "b0": root[:, None] * factors.v.T}


@register
@dataclasses.dataclass(frozen=True)
class PiSSA(SpectralLoRA):
    """Principal singular values and vectors adaptation.

    A and B start from the r largest components of W = U diag(s) Vᵀ:

        y = x·W + (alpha / rank)·(x·A·B - x·A₀·B₀),
        A₀ = U_r·√s_r (in, r),  B₀ = √s_r·V_rᵀ (r, out)

    W is never changed (save with `quantize`). PEFT replaces it by the
    residual, and so does not give the base model back when the adapter is
    switched off.

    Trainable: r·(in + out) a matrix, and as many frozen. A component with
    s = 0 has A₀ = B₀ = 0, no gradient, and stays as it is.

    **QPiSSA.** With `quantize="int4"` (or `"int8"`) the float kernel W is
    replaced, as in the paper, by the quantized residual Q of A₀·B₀. The layer
    holds Q from then on, and all of A·B beside it:

        y = x·Q + (alpha / rank)·x·A·B,     Q = quant(W - k·A₀·B₀)

    A₀·B₀ and Q are fitted in turn, `iterations` times. At first the layer
    computes x·(Q + k·A₀·B₀), which is nearer to x·W than x·quant(W) is
    (`quantization_error` says by how much). A₀, B₀, A and B are float32. W is
    gone: `adapter_disabled` gives the model as it was just after enabling, and
    `remove_adapter` a plain quantized layer of Q + k·A₀·B₀. `merge_adapter`
    quantizes Q + k·A·B. An adapter file is loaded into the same float base,
    where Q is computed again. Dense and EinsumDense only; not for layers that
    are declared (`PiSSADense`).

    The variables that train hold 4·ΔA and 4·ΔB, so that PiSSA learns at rates
    that suit LoRA (`tests/benchmarks/study.py`): the sweep
    https://arxiv.org/abs/2602.04998 found optima 2 to 10 times below LoRA's.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer. Or float
            in (0, 1], for each layer the smallest rank that holds this share
            of the squared singular values.
        alpha: float or None. The scale is alpha / rank; None means rank,
            a scale of 1, as the authors advise.
        n_iter: int or None. Power iterations of a randomised SVD, which is
            faster on large matrices; 4 are usual, 16 close to exact. None
            is exact.
        seed: int. Seed of the randomised SVD.
        quantize: by keyword only, `"int4"`, `"int8"` or None. What Keras
            quantizes the residual to; None leaves W as it is.
        iterations: by keyword only, int, 1 or more. How often A₀·B₀ and Q are
            fitted with `quantize`; 1 takes the components of W itself.

    Raises:
        ValueError: a setting is none of these; on enabling with `quantize`, a
            layer is quantized already or is neither Dense nor EinsumDense.

    Example:

    ```python
    gemma.backbone.enable_pissa(rank=16)
    gemma.backbone.enable_pissa(rank=128, quantize="int4")
    ```

    Reference: Meng, Wang, Zhang 2024, https://arxiv.org/abs/2404.02948.
    """

    name = "pissa"
    title = "PiSSA"
    step = 0.25
    example = ", rank=8"

    formula = (
        r"W' = W + \frac{\alpha}{r} (A B - A_0 B_0), \qquad"
        r" A_0 = U_r \sqrt{s_r}, \quad B_0 = \sqrt{s_r} V_r^\top,"
        r" \qquad A, B \text{ train}"
    )
    picture = components_picture("first")

    n_iter: int | None = None
    seed: int = 0
    quantize: str | None = dataclasses.field(default=None, kw_only=True)
    iterations: int = dataclasses.field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_n_iter(self.n_iter)
        check_seed(self.seed)
        if self.quantize not in (None, *QUANTIZATIONS):
            raise ValueError(
                "`quantize` must be 'int8' or 'int4', which Keras quantizes "
                "Dense and EinsumDense layers to, or None. "
                f"Received: quantize={self.quantize!r}"
            )
        check_whole_number("iterations", self.iterations, 1)

    def needs(self, shape: Shape) -> Needs:
        return Needs("top", self.rank, self.n_iter, self.seed)
