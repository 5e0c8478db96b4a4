"""Methods under which a layer holds another kernel than W."""

from collections.abc import Callable

import numpy as np

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import Method


class ReplacesBase(Method):
    """A method that puts another kernel in the place of W.

    `call` and `merged` then know that kernel as their base. The first step is
    not the base's to the bit, and the kernel is put back on removal only up
    to rounding. Dense and EinsumDense layers only.

    Attributes:
        option: str, the setting that asked for it, for messages.
    """

    option: str

    @property
    def quantization(self) -> str | None:
        """What Keras quantizes the new kernel to: `"int4"`; None: nothing."""
        return None

    def residual(
        self, matrix: np.ndarray, values: dict[str, np.ndarray]
    ) -> np.ndarray:
        """The new kernel as a matrix (in, out), float32, before quantization.

        Args:
            matrix: W (in, out), a float32 array.
            values: the first values of the weights.
        """
        raise NotImplementedError

    def fitted(
        self,
        matrix: np.ndarray,
        values: dict[str, np.ndarray],
        rounded: Callable[[np.ndarray], np.ndarray],
        decomposed: Callable[[np.ndarray], Factors],
    ) -> dict[str, np.ndarray]:
        """First values that suit the quantized kernel.

        Args:
            matrix: W (in, out), a float32 array.
            values: what `initial_values` returned for it.
            rounded: function from a matrix to what quantization makes of it.
            decomposed: function from a matrix to what `needs` asks for.
        """
        return values
