"""Decomposes a matrix W (in, out), or as much of it as a method needs.

W = U diag(s) Vᵀ is computed only here, which decides:

- **Where.** On a GPU the work stays there, through `keras.ops`. On a CPU, and
  for a TPU (whose compiler needs minutes for one full decomposition of one
  shape), LAPACK does it on the host, where all backends get the same basis to
  the last bit. Both work in float64, large products block by block
  (`float64.py`), and so agree to the rounding of float32: an adapter trained in
  one place loads in another.
- **How.** An orthonormal basis of the smaller side comes from the Gram matrix
  (`eigh`), 3-5 times faster than `svd`. A few components come from some of its
  eigenvectors (on the host: `lanczos.py`, `lapack.py`), or from a seeded
  randomised range finder if the method asks for it; components too small for
  that come from a true SVD.

Signs are canonical: the entry of largest magnitude of each singular vector of
the smaller side (v where out <= in, else u) is positive. Nothing here is ever
differentiated: gradients of an SVD are NaN where singular values are equal.

Reference: Halko, Martinsson, Tropp, "Finding structure with randomness",
https://arxiv.org/abs/0909.4061 (the range finder).
"""

import warnings

import keras
import numpy as np
from keras import ops

from keras_svdtune.matrix import cache, lanczos, lapack
from keras_svdtune.matrix.algorithms import (
    DEVICE,
    HOST,
    Numbers,
    components,
    randomised_top,
    signs,
    small_side,
    to_float32,
)
from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.runtime.precision import float64_on_device, on_host
from keras_svdtune.runtime.types import Array

# The version of the algorithms. Raise it when one of them returns other
# numbers than before, or `cache.py` returns the old ones.
_VERSION = 3
# The largest number of a matrix: its norm, and products with it, fit float32.
LARGEST = 1e30
# A device squares numbers in float32, where those beyond overflow or vanish.
_ON_DEVICE = (1e-15, 1e15)


def decompose(matrix: Array, needs: Needs, name: str = "matrix") -> Factors:
    """Decomposes one matrix.

    Args:
        matrix: (in, out), a tensor of any floating dtype.
        needs: `Needs`. Which part of the decomposition.
        name: str. What to call the matrix in an error.

    Returns:
        `Factors`, finite, with canonical signs.

    Raises:
        ValueError: the matrix holds NaN or infinity, or its rank does not fit.
    """
    w = finite(matrix, name)
    backend = keras.backend.backend()
    where = "host" if on_host() else f"device {backend} float64"
    found = cache.recalled(
        w,
        f"{_VERSION} {where} {needs}",
        lambda: _arrays(computed(w, needs, name)),
        lambda arrays: _fit(arrays, w.shape, needs),
    )
    return Factors(found.get("u"), found["s"], found.get("v"))


def finite(matrix: Array, name: str) -> np.ndarray:
    """Returns a matrix as float32, checked by `check_finite`."""
    if not isinstance(matrix, np.ndarray):  # that is on the host
        matrix = ops.convert_to_numpy(ops.cast(matrix, "float32"))
    w = np.ascontiguousarray(matrix, "float32")
    check_finite(w, name)
    return w


def check_finite(matrix: Array, name: str) -> None:
    """Raises a ValueError for NaN, infinity and numbers near to it."""
    xp = np if isinstance(matrix, np.ndarray) else ops
    # A little more: what was rounded to bfloat16 may be larger by so much.
    if not bool(xp.all(xp.absolute(matrix) <= LARGEST * (1.0 + 2.0**-8))):
        raise ValueError(
            f"The kernel of '{name}' holds NaN or infinity, or a number above "
            f"{LARGEST:g}, whose products overflow in float32. Load its "
            "weights again, or leave the layer out of `target_layer_names`."
        )


def computed(w: np.ndarray, needs: Needs, name: str = "matrix") -> Factors:
    """Returns what `decompose` does for a finite w, without the disk cache."""
    if not on_host() and _fits_device(w):
        try:
            with float64_on_device():
                factors = _run(ops.convert_to_tensor(w), needs, DEVICE)
        except Exception as error:
            # The solver did not converge, or ran out of memory.
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
    return _run(w, needs, HOST)


def _fits_device(w: np.ndarray) -> bool:
    least, most = _ON_DEVICE
    largest = float(np.abs(w).max())
    return largest == 0.0 or least <= largest <= most


def singular_values(
    matrix: Array, name: str = "matrix", keep: bool = True
) -> np.ndarray:
    """Returns all singular values of a matrix, descending, (n,) float32.

    They come from the same decomposition as a basis, so both share the cache.

    Args:
        matrix, name: as for `decompose`, with the same errors.
        keep: bool. Whether to use the cache on disk.
    """
    needs = Needs("small_side")
    if keep:
        return decompose(matrix, needs, name).s
    return computed(finite(matrix, name), needs, name).s


def _run(w: Array, needs: Needs, xp: Numbers) -> Factors:
    if needs.part == "small_side":
        u, s, v = small_side(w, xp)
    elif needs.n_iter is None or isinstance(needs.rank, float):
        u, s, v = components(w, needs, xp)
    else:
        u, s, v = randomised_top(w, needs, xp)
    return Factors(to_float32(u), to_float32(s), to_float32(v))


def top_on_host(w: np.ndarray, rank: int) -> Factors:
    """Returns the `rank` largest components of w (in, out), by LAPACK."""
    return _run(w, Needs("top", rank), HOST)


def top_eigenvectors(gram: np.ndarray, rank: int) -> np.ndarray:
    """Returns the eigenvectors of the largest eigenvalues, by LAPACK.

    Args:
        gram: (n, n) float64, symmetric, without negative eigenvalues.
        rank: int, 1 to n. How many.

    Returns:
        (n, rank) float64, the largest first. The entry of largest magnitude of
        each is positive.
    """
    n = len(gram)
    found = lanczos.largest(gram, rank)
    if found is None:
        found = lapack.eigh_part(gram, n - rank, n)
    if found is None:
        found = np.linalg.eigh(gram)
    vectors = np.flip(found[1], axis=1)[:, :rank]
    signed: np.ndarray = vectors * signs(vectors, HOST)
    return signed


def _finite(factors: Factors) -> bool:
    arrays = (factors.u, factors.s, factors.v)
    return all(x is None or bool(np.isfinite(x).all()) for x in arrays)


def _arrays(factors: Factors) -> dict[str, np.ndarray]:
    arrays = {"u": factors.u, "s": factors.s, "v": factors.v}
    return {k: x for k, x in arrays.items() if x is not None}


def _fit(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], needs: Needs
) -> bool:
    """Returns whether arrays have the names, dtypes and shapes needed."""
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
