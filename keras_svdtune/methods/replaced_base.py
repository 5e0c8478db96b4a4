"""The base class of methods that replace the kernel W of a layer."""

from collections.abc import Callable

import numpy as np

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import Method


class ReplacesBase(Method):
    """A method that puts another kernel in the place of W.

    `call` and `merged` get that kernel as their base. At first the layer does
    not compute exactly what the base did, and removal restores the kernel
    only up to rounding. Dense and EinsumDense layers only. `option` is the
    setting that asked for it, for messages.
    """

    option: str

    @property
    def quantization(self) -> str | None:
        """What Keras quantizes the new kernel to, such as `"int4"`; or None."""
        return None

    def residual(
        self, matrix: np.ndarray, values: dict[str, np.ndarray]
    ) -> np.ndarray:
        """Computes the new kernel (in, out) in float32, before quantization.

        `matrix` is W (in, out), a float32 array, and `values` the first values
        of the weights.
        """
        raise NotImplementedError

    def restored(
        self, kernel: np.ndarray, values: dict[str, np.ndarray]
    ) -> np.ndarray:
        """Computes W (in, out) in float32 again, but for rounding.

        `kernel` is what `residual` returned, and `values` are the weights, as
        the layer holds them. Only for a kernel that is not quantized.
        """
        raise NotImplementedError

    def fitted(
        self,
        matrix: np.ndarray,
        values: dict[str, np.ndarray],
        rounded: Callable[[np.ndarray], np.ndarray],
        decomposed: Callable[[np.ndarray], Factors],
    ) -> dict[str, np.ndarray]:
        """Returns first values of the weights that suit the quantized kernel.

        `matrix` and `values` are as for `residual`. `rounded` quantizes a
        matrix and reads it back; `decomposed` computes the factors that `needs`
        names.
        """
        return values
