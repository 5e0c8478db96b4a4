"""What the study tries against SVF's forgetting, and is no part of the package.

The tail of SVF leaves the largest singular values of a matrix as they are:
these carry most of what the base model does with it.
"""

import dataclasses

from keras import ops

from keras_svdtune import SVF
from keras_svdtune.methods.base import (
    LinearMap,
    ReverseMap,
    Weights,
    WeightValues,
    register,
)
from keras_svdtune.runtime.types import Tensor


@register
@dataclasses.dataclass(frozen=True, repr=False)
class TailSVF(SVF):
    """SVF that trains all singular values but the `skip` largest."""

    name = "svf_tail"
    title = "SVF tail"
    has_enable = False

    skip: int = dataclasses.field(default=8, kw_only=True)

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        return super().call(self._tail(weights), base)

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        return super().reverse(self._tail(weights), base)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        return super().merged(self._tail(weights), matrix)

    def _tail(self, weights: Weights) -> Weights:
        delta = ops.convert_to_tensor(weights.delta)
        trains = ops.cast(
            ops.arange(min(weights.shape)) >= self.skip, "float32"
        )
        return WeightValues(
            weights.shape, basis=weights.basis, delta=delta * trains
        )
