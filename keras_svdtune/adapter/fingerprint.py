"""Computes fingerprints that identify an adapter's base and its effect.

With fixed vectors a_k, b_k of ±1 the numbers a_kᵀ·W·b_k are each about ‖W‖ in
size and tell matrices apart:

    base fingerprint:  (‖W‖, a₁ᵀWb₁, ..., a₄ᵀWb₄)
    effect:            (a₁ᵀΔWb₁, ..., a₈ᵀΔWb₈)

where x·ΔW is what an adapter adds to x·W. Rounding W to bfloat16 moves a number
by about 0.001·‖W‖; other weights move it by ‖W‖. So a base is recognised in
either dtype, and one that was trained further is not. The effect tells whether
the frozen weights that an adapter computes from W are those it was trained
with: singular vectors with other signs, or rotated among equal singular values,
give another ΔW only where that matters.

Where the basis is that of W rounded to bfloat16, the effect is that of the
rounded W and basis too. So it is the same number in float32 and in bfloat16:
SVFT divides by small singular values, which would magnify the rounding.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
from keras import ops

from keras_svdtune.adapter.bank import over_bank
from keras_svdtune.matrix import float64
from keras_svdtune.methods.base import METHODS, Method, Weights, WeightValues
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.runtime.precision import full_precision
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Tensor

_BASE_PROBES, _EFFECT_PROBES = 4, 8
# Rounding moves a number by eps/sqrt(12)·‖W‖ (one standard deviation, from a
# uniform error within half a unit in the last place): these are > 8 of them.
_BASE_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
# The basis of W as it is, in files of before, turns by rounding / gap of the
# singular values, so ΔW moves more. (That of W rounded stays: between float32
# and bfloat16 the effects on real models are equal to the last bit.)
_EFFECT_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def fingerprint(matrix: np.ndarray) -> np.ndarray:
    """Returns the fingerprint (5,) float32 of W (in, out), or of a bank."""
    w = np.asarray(matrix).reshape(-1, matrix.shape[-1])
    a, b = _probes((w.shape[0], w.shape[1]), _BASE_PROBES)
    products, norm = float64.rows_and_norm(a, w)
    return np.array([norm, *np.sum(products * b, axis=1)], "float32")


def coarsest(dtypes: Iterable[str]) -> str:
    """Returns the dtype that rounds most."""
    return max(dtypes, key=lambda dtype: _BASE_TOLERANCE.get(dtype, 1e-5))


def matches(ours: np.ndarray, theirs: np.ndarray, *dtypes: str) -> bool:
    """Returns whether two base fingerprints are of the same matrix.

    Args:
        dtypes: the dtypes in which the two matrices were held.
    """
    if ours.shape != theirs.shape or not np.isfinite(theirs).all():
        return False
    return bool(which_match(ours[None], theirs, *dtypes)[0])


def which_match(
    ours: np.ndarray, theirs: np.ndarray, *dtypes: str
) -> np.ndarray:
    """Returns, for each row of `ours` (count, 5), whether it matches `theirs`.

    Args:
        theirs: (5,), finite.
        dtypes: the dtypes in which the matrices were held.
    """
    tolerance = _BASE_TOLERANCE.get(coarsest(dtypes), 1e-5)
    difference = np.abs(ours.astype("float64") - theirs.astype("float64"))
    allowed = tolerance * ours[:, :1].astype("float64") + 1e-12
    return np.asarray((difference <= allowed).all(axis=1))


def effect(
    method: Method, weights: Weights, matrix: Tensor, rounds: bool
) -> np.ndarray:
    """Returns the effect (8,) float32 of the ΔW that `method` adds.

    Args:
        weights: what the method's `call` takes: an adapter, or an object with
            the weights as attributes.
        matrix: W (in, out), float32; or a bank (count, in, out), which counts
            as one matrix (count·in, out). Q for a method that quantizes its
            base: then the effect is that of Q + ΔW.
        rounds: whether the basis is that of W rounded to bfloat16.
    """
    if rounds:
        method, weights, matrix = _in_bfloat16(method, weights, matrix)
    rows, columns = weights.shape
    count = math.prod(matrix.shape[:-2])
    a, b = _probes((count * rows, columns), _EFFECT_PROBES)
    x = ops.convert_to_tensor(a, "float32")
    with full_precision():
        if len(matrix.shape) == 2:
            change = _change(method, weights, x, matrix)
        else:
            x = ops.swapaxes(ops.reshape(x, (-1, count, rows)), 0, 1)
            one = functools.partial(_change, method)
            change = over_bank(one, method, weights, x, matrix)
            change = ops.sum(change, axis=0)
    change = to_numpy(change).astype("float64")
    return np.asarray(np.sum(change * b, axis=1), "float32")


def _in_bfloat16(
    method: Method, weights: Weights, matrix: Tensor
) -> tuple[Method, Weights, Tensor]:
    """Returns the same with W and the frozen weights rounded to bfloat16."""
    if isinstance(method, ReplacesBase):
        # Back to W, and to the form that leaves it alone.
        matrix = method.merged(_with_neutral(method, weights), matrix)
        method = METHODS[method.name](**method.settings())
    found = WeightValues(weights.shape)
    for weight in method.weights(weights.shape):
        value = ops.convert_to_tensor(getattr(weights, weight.name))
        # The others have a dtype of their own in every model.
        value = _to_bfloat16(value) if weight.dtype is None else value
        setattr(found, weight.name, value)
    return method, found, _to_bfloat16(matrix)


def _to_bfloat16(x: Tensor) -> Tensor:
    return ops.cast(ops.cast(x, "bfloat16"), "float32")


def effect_of_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the effect of ΔW = a·b, of shapes (in, k) and (k, out)."""
    left, right = _probes((a.shape[0], b.shape[1]), _EFFECT_PROBES)
    return np.asarray(np.sum(((left @ a) @ b) * right, axis=1), "float32")


def same_effect(
    ours: np.ndarray, theirs: np.ndarray, norm: float, *dtypes: str
) -> bool:
    """Returns whether two effects are of the same ΔW.

    Args:
        norm: ‖W‖; float32 computes x·W to about 1e-6 of it.
        dtypes: the dtypes in which the two bases were held.
    """
    if ours.shape != theirs.shape or not np.isfinite(theirs).all():
        return False
    tolerance = max(_EFFECT_TOLERANCE.get(d, 1e-3) for d in dtypes)
    f, g = ours.astype("float64"), theirs.astype("float64")
    size = max(np.abs(f).max(), np.abs(g).max())
    return bool((np.abs(f - g) <= tolerance * size + 1e-5 * norm).all())


def _change(
    method: Method, weights: Weights, x: Tensor, matrix: Tensor
) -> Tensor:
    """Returns x·ΔW in float32; x·W' if the adapter has a quantized base."""
    base = _Product(x, matrix)
    y = ops.cast(method.call(weights, base), "float32")
    if not isinstance(method, ReplacesBase):
        return y - base()
    if method.quantization is not None:
        return y
    without = _with_neutral(method, weights)
    return y - ops.cast(method.call(without, base), "float32")


def _with_neutral(method: Method, weights: Weights) -> Weights:
    """Returns the weights with trainables that change nothing."""
    values = {
        w.name: getattr(weights, w.name) for w in method.weights(weights.shape)
    }
    return WeightValues(weights.shape, **values | method.neutral(weights))


class _Product:
    """The `LinearMap` of x·W for a given x and W, in float32."""

    dtype = "float32"

    def __init__(self, x: Tensor, matrix: Tensor):
        self._x, self._matrix = x, matrix

    def __call__(self) -> Tensor:
        return self.rows(self._x)

    def times(self, a: Tensor) -> Tensor:
        return ops.matmul(self._x, a)

    def moved(self, change: Tensor) -> Tensor:
        return self.rows(self._x + change)

    def rows(self, r: Tensor) -> Tensor:
        return ops.matmul(r, self._matrix)


def _probes(
    shape: tuple[int, int], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the vectors a (count, in) and b (count, out) of ±1."""
    rows, columns = shape
    a = [_plus_minus(rows, 2 * i) for i in range(count)]
    b = [_plus_minus(columns, 2 * i + 1) for i in range(count)]
    return np.stack(a), np.stack(b)


def _plus_minus(n: int, seed: int) -> np.ndarray:
    """Returns n values of ±1 by splitmix64, the same everywhere for ever."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) + np.uint64(seed << 40)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.where(z & np.uint64(1), 1.0, -1.0)
