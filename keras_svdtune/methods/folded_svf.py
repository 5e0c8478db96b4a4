"""SVF with the basis folded into the kernel: a faster step that gives up W."""

import dataclasses

import numpy as np
from keras import ops

from keras_svdtune.matrix import float64
from keras_svdtune.methods.base import LinearMap, ReverseMap, Weights, form_of
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.methods.svf import SVF, scaled, times_delta
from keras_svdtune.runtime.types import Tensor


@form_of(SVF, "replace_kernel")
@dataclasses.dataclass(frozen=True, repr=False)
class FoldedSVF(ReplacesBase, SVF):
    """SVF whose layers hold W·V (or Uᵀ·W): `SVF(replace_kernel=True)`.

    `SVF` has the formulas. W is the kernel as it is here too, and V that of the
    rounded one.

    Reference: Sun et al. 2022, https://arxiv.org/abs/2206.06122.
    """

    option = "replace_kernel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            raise ValueError(
                "`replace_kernel` needs all singular vectors, and `rank` "
                f"keeps some. Received: rank={self.rank!r}, "
                "replace_kernel=True"
            )

    def residual(
        self, matrix: np.ndarray, values: dict[str, np.ndarray]
    ) -> np.ndarray:
        rows, columns = matrix.shape
        basis = values["basis"]
        if columns <= rows:
            return float64.matmul(matrix, basis).astype("float32")
        return float64.matmul(basis.T, matrix).astype("float32")

    def restored(
        self, kernel: np.ndarray, values: dict[str, np.ndarray]
    ) -> np.ndarray:
        rows, columns = kernel.shape
        basis = values["basis"]
        if columns <= rows:
            return float64.matmul(kernel, basis.T).astype("float32")
        return float64.matmul(basis, kernel).astype("float32")

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        rows, columns = weights.shape
        if columns <= rows:
            return scaled(base(), weights.basis, 1.0 + weights.delta)
        components = base.times(weights.basis)
        return base.rows(times_delta(components, 1.0 + weights.delta))

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        raise NotImplementedError  # no embedding gets another kernel

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        rows, columns = weights.shape
        basis = ops.cast(weights.basis, weights.delta.dtype)
        if columns <= rows:
            return scaled(matrix, basis, 1.0 + weights.delta)
        change = scaled(ops.transpose(matrix), basis, 1.0 + weights.delta)
        return ops.transpose(change)
