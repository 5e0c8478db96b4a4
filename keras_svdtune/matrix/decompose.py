"""The decomposition behind a method.

One place turns a matrix W (in, out) into W = U diag(s) Vᵀ, or into as much
of it as a method needs, and decides how:

- **Where.** On a GPU the work stays there, in float32 at full matmul
  precision through `keras.ops`. On a CPU, and for a TPU (whose compiler
  needs minutes for one full decomposition of one shape), it is done on the
  host in float64 by LAPACK, large products block by block (`blocks.py`). There
  all backends get the same basis to the last bit, so that an adapter trained
  with one loads into another.
- **How.** An orthonormal basis of the smaller side comes from the Gram matrix
  (`eigh`), 3-5 times faster than `svd`. A few components come from some of
  its eigenvectors (on the host: `leading.py`, `lapack.py`), or from a seeded
  randomised range finder where the method asks for it; those that are too
  small for that from a true SVD.

Signs are canonical: the entry of largest magnitude of each singular vector of
the smaller side (v where out <= in, else u) is positive.
Nothing here is ever differentiated: gradients of an SVD are NaN where
singular values are equal.

Reference: Halko, Martinsson, Tropp, "Finding structure with randomness",
https://arxiv.org/abs/0909.4061 (the range finder).
"""

import warnings

import keras
import numpy as np
from keras import ops

from keras_svdtune.matrix import cache
from keras_svdtune.matrix.algorithms import (
    _DEVICE,
    _HOST,
    _to_float32,
    components,
    randomised_top,
    small_side,
)
from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.runtime.precision import full_precision, on_host
from keras_svdtune.runtime.types import Array

# Of the algorithms: to be raised when one returns other numbers than it did,
# or else `cache.py` returns the old ones.
_VERSION = 2


def decompose(matrix: Array, needs: Needs, name: str = "matrix") -> Factors:
    """Decomposes one matrix.

    Args:
        matrix: (in, out), a tensor of any floating dtype.
        needs: `Needs`. Which part of the decomposition.
        name: str. What to call the matrix in an error.

    Returns:
        `Factors`, finite, with canonical signs.

    Raises:
        ValueError: the matrix holds NaN or infinity, or its rank does not
            fit.
    """
    w = finite(matrix, name)
    where = "host" if on_host() else f"device {keras.backend.backend()}"
    found = cache.recalled(
        w,
        f"{_VERSION} {where} {needs}",
        lambda: _arrays(computed(w, needs, name)),
        lambda arrays: _fit(arrays, w.shape, needs),
    )
    return Factors(found.get("u"), found["s"], found.get("v"))


def finite(matrix: Array, name: str) -> np.ndarray:
    """A matrix as a float32 array, or an error if it holds NaN or infinity."""
    if not isinstance(matrix, np.ndarray):  # it is on the host already
        matrix = ops.convert_to_numpy(ops.cast(matrix, "float32"))
    w = np.ascontiguousarray(matrix, "float32")
    if not np.isfinite(w).all():
        raise ValueError(
            f"The kernel of '{name}' holds NaN or infinity, and such a matrix "
            "has no singular values. Load its weights again, or leave the "
            "layer out of `target_layer_names`."
        )
    return w


def computed(w: np.ndarray, needs: Needs, name: str = "matrix") -> Factors:
    """What `decompose` returns for a finite w, without the cache on disk."""
    if not on_host():
        try:
            with full_precision():
                factors = _run(ops.convert_to_tensor(w), needs, _DEVICE)
        except Exception as error:
            # A solver that did not converge, or no memory left for it.
            reason = f"{type(error).__name__}: {error}"
        else:
            if _finite(factors):
                return factors
            reason = "it returned values that are not finite"
        warnings.warn(
            f"The {keras.backend.backend()} backend could not decompose the "
            f"kernel of '{name}' on its device ({reason}); LAPACK does it on "
            "the host instead.",
            stacklevel=2,
        )
    return _run(w, needs, _HOST)


def singular_values(
    matrix: Array, name: str = "matrix", keep: bool = True
) -> np.ndarray:
    """All singular values of a matrix, descending, (n,) float32.

    Those of the decomposition that SVF uses, so that it is kept for it, and
    read if it is there. On a GPU that is of the float32 Gram matrix, whose
    small values are rounded: if there are any, LAPACK does it in float64.

    Args:
        matrix, name: as for `decompose`.
        keep: bool. Whether the cache on disk is used.

    Raises:
        ValueError: as `decompose`.
    """
    needs = Needs("small_side")
    if keep:
        s = decompose(matrix, needs, name).s
    else:
        s = computed(finite(matrix, name), needs, name).s
    if on_host() or s[-1] > 1e-2 * s[0]:
        return s
    return _run(finite(matrix, name), needs, _HOST).s


def _run(w: Array, needs: Needs, xp: Array) -> Factors:
    if needs.part == "small_side":
        u, s, v = small_side(w, xp)
    elif needs.n_iter is None or isinstance(needs.rank, float):
        u, s, v = components(w, needs, xp)
    else:
        u, s, v = randomised_top(w, needs, xp)
    return Factors(_to_float32(u), _to_float32(s), _to_float32(v))


def top_on_host(w: np.ndarray, rank: int) -> Factors:
    """The `rank` largest components of w (in, out), by LAPACK in float64."""
    return _run(w, Needs("top", rank), _HOST)


def _finite(factors: Factors) -> bool:
    arrays = (factors.u, factors.s, factors.v)
    return all(x is None or bool(np.isfinite(x).all()) for x in arrays)


def _arrays(factors: Factors) -> dict[str, np.ndarray]:
    return {k: x for k, x in vars(factors).items() if x is not None}


def _fit(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], needs: Needs
) -> bool:
    """Whether arrays have the names, dtypes and shapes of these factors."""
    rows, columns = shape
    n = min(shape)
    if needs.part == "small_side":
        expected: dict[str, tuple[int, ...]]
        expected = {"s": (n,), "v" if columns <= rows else "u": (n, n)}
    else:
        rank = needs.rank
        if isinstance(rank, float):
            rank = len(arrays.get("s", ()))
        assert rank is not None
        expected = {"u": (rows, rank), "s": (rank,), "v": (columns, rank)}
    return {k: x.shape for k, x in arrays.items()} == expected and all(
        x.dtype == np.float32 for x in arrays.values()
    )
