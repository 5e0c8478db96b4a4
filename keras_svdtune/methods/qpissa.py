"""QPiSSA: what PiSSA's start leaves of W, quantized; and both fitted in turn.

The largest components of W are its outliers. Without them the rest is narrower
and quantizes to less error, and what error is left has large components of its
own, which the low-rank part can take over:

    A, B <- SVD_r(W);              Q <- quant(W - A·B)
    A, B <- SVD_r(W - dequant(Q)); Q <- quant(W - A·B)      T - 1 times

Only matrices here: `rounded` is dequant(quant(·)) of whatever quantizer.

Reference: Meng, Wang, Zhang 2024, https://arxiv.org/abs/2404.02948.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_svdtune.hosts.quantized import MODES


def residual(
    matrix: np.ndarray, a0: np.ndarray, b0: np.ndarray, scale: float
) -> np.ndarray:
    """W - k·A₀·B₀ (in, out), in float64 and rounded once to float32.

    So that it comes out the same where an adapter file is loaded.
    """
    product = a0.astype("float64") @ b0.astype("float64")
    return (matrix.astype("float64") - scale * product).astype("float32")


def alternate(
    matrix: np.ndarray,
    values: dict[str, Any],
    scale: float,
    steps: int,
    rounded: Callable[[np.ndarray], np.ndarray],
    start: Callable[[np.ndarray], dict[str, Any]],
) -> dict[str, Any]:
    """A₀ and B₀ after `steps` more rounds of the algorithm above.

    Args:
        matrix: W (in, out), float32.
        values: a0 (in, r) and b0 (r, out) of W.
        scale: k, of the product A₀·B₀.
        steps: T - 1.
        rounded: function from a matrix to what quantization makes of it.
        start: function from a matrix to the a0 and b0 of its top r
            components.
    """
    for _ in range(steps):
        rest = rounded(residual(matrix, values["a0"], values["b0"], scale))
        values = start(matrix - rest)
    return values


def check_settings(quantize: Any, iterations: Any) -> None:
    """Raises a ValueError unless these are settings of QPiSSA."""
    if quantize is not None and quantize not in MODES:
        raise ValueError(
            "`quantize` must be 'int8' or 'int4', which Keras quantizes Dense "
            "and EinsumDense layers to, or None. "
            f"Received: quantize={quantize!r}"
        )
    if type(iterations) is not int or iterations < 1:
        raise ValueError(
            "`iterations` must be an integer, 1 or more. "
            f"Received: iterations={iterations!r}"
        )
