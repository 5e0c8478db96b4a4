"""What the study tries against SVF's forgetting, and is no part of the package.

The tail of SVF leaves the largest singular values of a matrix as they are:
these carry most of what the base model does with it. The bounded one moves
none far.
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
        trains = ops.cast(
            ops.arange(min(weights.shape)) >= self.skip, "float32"
        )
        return with_delta(weights, delta_of(weights) * trains)


@register
@dataclasses.dataclass(frozen=True, repr=False)
class BoundedSVF(SVF):
    """SVF with limit·tanh(δ / limit) instead of δ: no value moves further."""

    name = "svf_bounded"
    title = "SVF bounded"
    has_enable = False

    limit: float = dataclasses.field(default=0.1, kw_only=True)

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        return super().call(self._bounded(weights), base)

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        return super().reverse(self._bounded(weights), base)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        return super().merged(self._bounded(weights), matrix)

    def _bounded(self, weights: Weights) -> Weights:
        bounded = self.limit * ops.tanh(delta_of(weights) / self.limit)
        return with_delta(weights, bounded)


def delta_of(weights: Weights) -> Tensor:
    """δ, as a tensor."""
    return ops.convert_to_tensor(weights.delta)


def with_delta(weights: Weights, delta: Tensor) -> Weights:
    """The weights of SVF with another δ."""
    return WeightValues(weights.shape, basis=weights.basis, delta=delta)
