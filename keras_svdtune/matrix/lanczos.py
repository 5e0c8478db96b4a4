"""The largest eigenvalues of a Gram matrix, without the others.

SciPy's `eigsh` (ARPACK: Lanczos with implicit restarts) finds them from
products with vectors alone. At ranks 8 and 16 that takes 0.4 to 0.6 of the CPU
time of all eigenvalues on those kernels of Gemma 3 270M that have 640 rows and
columns or more, and 0.2 to 0.6 on matrices of 2048
(`tests/benchmarks/largest_components.py`).

Lanczos may miss an eigenvector, or stop too early. So the result is proved:

1. If G has no eigenvalue above μ outside of the vectors found, and they have
   values λ > μ, then their span leans out of the true one by an angle whose
   sine is at most |residual| / (λ - μ). We choose the μ at which this bound
   is `TOLERANCE`.
2. That there is no such eigenvalue is proved by the Cholesky factorisation of
   μ - G outside of the vectors, which exists only then.

Where the proof fails the caller takes another way: where values are equal,
ranks are a large part of all, or the rank of the matrix is too low.

Unlike `scipy.linalg.eigh(subset_by_index=...)`, nothing here holds Python's
lock for long, so that other threads run meanwhile.

References: Lehoucq, Sorensen, Yang, "ARPACK Users' Guide"; Davis, Kahan 1970,
https://doi.org/10.1137/0707001 (the bound).
"""

import numpy as np
from scipy.sparse import linalg

# The largest sine of the angle between the span found and the true one.
TOLERANCE = 1e-7
_FEW = 16  # Where more than a 16th is wanted, LAPACK is as fast.
_MOST = 64  # ARPACK's restarts hold Python's lock, for longer with the rank.
_RESTARTS = 40


def largest(
    gram: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Computes the largest eigenvalues of a matrix, and their vectors.

    Args:
        gram: (n, n) float64, symmetric, without negative eigenvalues.
        count: int. How many to compute.

    Returns:
        (values, vectors) of shapes (count,) ascending and (n, count), the
        same to the bit each time. None where they are too many for this to be
        fast, or are not certain to be the largest.
    """
    n = len(gram)
    if count > min(n // _FEW, _MOST):
        return None
    try:
        values, vectors = linalg.eigsh(
            gram,
            count,
            which="LA",
            v0=np.random.RandomState(0).standard_normal(n),
            ncv=min(2 * count + 20, n),
            maxiter=_RESTARTS,
            tol=1e-12,
            rng=0,
        )
    except linalg.ArpackError:  # It did not converge, or the matrix is zero.
        return None
    residual = np.linalg.norm(gram @ vectors - vectors * values)
    # No less than what rounding does to the factorisation.
    rounding = n * np.finfo("float64").eps * np.linalg.norm(gram)
    bar = values[0] - max(residual / TOLERANCE, rounding)
    if bar < values[0] / 2 or not _none_above(bar, gram, values, vectors):
        return None
    return values, vectors


def _none_above(
    bar: float, gram: np.ndarray, values: np.ndarray, vectors: np.ndarray
) -> bool:
    """Whether G has no eigenvalue above `bar` but for those given.

    Args:
        bar: float, positive.
        gram: (n, n).
        values, vectors: eigenvalues and orthonormal eigenvectors of `gram`.
    """
    rest = (vectors * values) @ vectors.T
    rest -= gram
    rest[np.diag_indices(len(rest))] += bar
    try:
        np.linalg.cholesky(rest)
    except np.linalg.LinAlgError:
        return False
    return True
