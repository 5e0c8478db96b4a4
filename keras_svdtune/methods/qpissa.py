"""QPiSSA: PiSSA on a quantized residual, both fitted in turn.

The largest components of W are its outliers. Without them the rest is narrower
and quantizes with less error, and the error that is left has large components
of its own, which the low-rank part can take over:

    A, B <- SVD_r(W);              Q <- quant(W - A·B)
    A, B <- SVD_r(W - dequant(Q)); Q <- quant(W - A·B)      T - 1 times
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import LinearMap, Weight, Weights, form_of
from keras_svdtune.methods.low_rank import branch
from keras_svdtune.methods.pissa import PiSSA
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.runtime.types import Shape, Tensor

# The largest number that a kernel to quantize has at least.
_LEAST = 1e-6


@form_of(PiSSA, "quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class QPiSSA(ReplacesBase, PiSSA):
    """PiSSA on a quantized residual: `PiSSA(rank, quantize="int4")`.

    `PiSSA` has the formulas. All but the residual Q is float32.

    Reference: Meng, Wang, Zhang 2024, https://arxiv.org/abs/2404.02948.
    """

    option = "quantize"

    @property
    def quantization(self) -> str | None:
        return self.quantize

    def weights(self, shape: Shape) -> list[Weight]:
        # Loading computes Q from a0 and b0 again: they must not be rounded.
        found = super().weights(shape)
        return [dataclasses.replace(w, dtype="float32") for w in found]

    def residual(
        self, matrix: np.ndarray, values: dict[str, np.ndarray]
    ) -> np.ndarray:
        # In float64, rounded once, so that loading an adapter file computes
        # the same residual.
        a0, b0 = (values[x].astype("float64") for x in ("a0", "b0"))
        rest = matrix.astype("float64") - self.scale * (a0 @ b0)
        return np.asarray(rest, "float32")

    def fitted(
        self,
        matrix: np.ndarray,
        values: dict[str, np.ndarray],
        rounded: Callable[[np.ndarray], np.ndarray],
        decomposed: Callable[[np.ndarray], Factors],
    ) -> dict[str, np.ndarray]:
        largest = float(np.abs(matrix).max())
        if 0.0 < largest < _LEAST:
            raise ValueError(
                f"`quantize` needs a kernel with numbers above {_LEAST:g}: "
                "Keras adds 1e-7 to the largest before it divides by it. "
                f"Received: {largest:.1e}. Leave the layer out of "
                "`target_layer_names`."
            )
        nothing_drawn = np.random.RandomState(0)
        for _ in range(self.iterations - 1):
            rest = matrix - rounded(self.residual(matrix, values))
            values = self.initial_values(rest, decomposed(rest), nothing_drawn)
        return values

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        return base() + branch(base, *_whole(weights), self.scale)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        return matrix + self.scale * ops.matmul(*_whole(weights))

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        a, b = _whole(weights)
        return a, b * self.scale


def _whole(weights: Weights) -> tuple[Tensor, Tensor]:
    """Returns A = A₀ + ΔA (in, r) and B = B₀ + ΔB (r, out), float32."""
    return weights.a0 + weights.delta_a, weights.b0 + weights.delta_b
