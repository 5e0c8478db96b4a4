"""Rounds a matrix to bfloat16, so that its basis is the same in either dtype.

A model is trained in bfloat16 and served in float32, or the reverse. The two
kernels differ by rounding, which turns neighbouring singular vectors into each
other, so that what one basis was trained for would not fit the other. Their
roundings to bfloat16 are the same matrix, to the bit, and so are its singular
vectors. A method that computes its basis from the kernel again on loading
therefore takes the basis of the rounded matrix (`Method.rebuilds_basis`); the
kernel that it multiplies by stays as it is.

float16 has three bits more than bfloat16 and a smaller range. A float16 kernel
rounds to a bfloat16 matrix too, but a float32 kernel that came by way of
float16 is rounded twice: one entry in 16 then is the other neighbour, and the
basis turns. So float16 and float32 share a basis only if float16 holds the
kernel exactly.
"""

import ml_dtypes
import numpy as np
from keras import ops

from keras_svdtune.runtime.types import Array


def rounded(matrix: Array) -> np.ndarray:
    """Returns a matrix rounded to bfloat16, to even, as a float32 array."""
    w = ops.convert_to_numpy(matrix)
    return np.asarray(w.astype(ml_dtypes.bfloat16), "float32")


def noise(s: np.ndarray) -> float:
    """Returns how far rounding may move W·v for a unit vector v.

    It moves each entry of W by less than 2⁻⁸ of it, by half of that on average,
    so W·v by about 2⁻⁹ of the root mean square of all singular values s (n,).
    """
    return float(2.0**-9 * np.sqrt(np.mean(np.square(s, dtype="float64"))))
