"""The largest components of a matrix, without its full decomposition.

1. In float32, the largest eigenvectors of the Gram matrix G = WᵀW of the
   smaller side. Small matrices: by LAPACK (`lapack.py`). Large ones: by block
   Lanczos, every block made orthogonal to all before it, where 8·(rank + 10)
   directions find them but for float32's rounding.
2. That rounding turns them among their neighbours, which are close: so not
   `rank` but 2·rank + 8 vectors Q are taken, and the components within
   their span computed in float64, from W itself.
3. What is left is an error towards everything else. It is bounded, whatever
   went before: if G outside of Q has no eigenvalue above μ, then an
   eigenvector with value λ > μ leans out of Q by at most |residual| / (λ - μ).
   LAPACK misses none. After Lanczos that there is none is proved by the
   Cholesky factorisation of μ - G there, which exists only then.

Where the bound is not small the caller computes them in float64: values that
are equal, ranks that are a large part of all, matrices of too low a rank.

References: Golub, Van Loan, "Matrix Computations", chapter 10 (block Lanczos);
Davis, Kahan 1970, https://doi.org/10.1137/0707001 (the bound).
"""

import numpy as np

from keras_svdtune.matrix import float64
from keras_svdtune.matrix.lapack import eigh_part

# From this many rows for each direction on, Lanczos is faster than LAPACK.
_LARGE = 5
_BLOCK = 4  # small blocks need fewer directions, large ones fewer passes
# Of the bound, which float32's rounding fills; the error itself is 1.2e-6 at
# most on the matrices of Gemma 3 270M (`tests/benchmarks/enable_time.py`).
TOLERANCE = 1e-4


def top(
    w: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The `rank` largest components of w, or None where they are not certain.

    Args:
        w: (in, out) float32.
        rank: int.

    Returns:
        (u, s, v) in float64, of shapes (in, rank), (rank,), (out, rank),
        s descending.
    """
    if w.shape[1] > w.shape[0]:
        found = top(w.T, rank)
        return found and (found[2], found[1], found[0])
    n, count, wanted = w.shape[1], 8 * (rank + 10), 2 * rank + 8
    if 3 * wanted > n:
        return None
    gram = w.T @ w
    if not np.isfinite(gram).all():
        return None  # the squares are too large for float32
    small = n < _LARGE * count
    q = _by_lapack(gram, wanted) if small else _lanczos(gram, count, wanted)
    if q is None:
        return None
    wq = float64.matmul(w, q)
    values, turn = np.linalg.eigh(wq.T @ wq)
    values, turn = values[::-1], turn[:, ::-1]
    q, wq = q @ turn, (wq @ turn)[:, :rank]
    residuals = float64.matmul(w.T, wq) - q[:, :rank] * values[:rank]
    bar = (values[rank - 1] + values[-1]) / 2
    limit = TOLERANCE * (values[rank - 1] - bar)
    if not np.linalg.norm(residuals) < limit:
        return None
    if not small and not _none_above(bar, gram, q):
        return None
    s = np.sqrt(values[:rank])
    return wq / s, s, q[:, :rank]


def _by_lapack(gram: np.ndarray, wanted: int) -> np.ndarray | None:
    found = eigh_part(gram, len(gram) - wanted, len(gram))
    return found and np.linalg.qr(found[1].astype("float64"))[0]


def _lanczos(gram: np.ndarray, count: int, wanted: int) -> np.ndarray:
    """(n, wanted) orthonormal, the largest Ritz vectors of `count`."""
    n = len(gram)
    basis, images = np.empty((2, count, n), "float32")
    start = np.random.RandomState(0).standard_normal((n, _BLOCK))
    block = np.linalg.qr(start.astype("float32"))[0]
    for i in range(0, count, _BLOCK):
        now = slice(i, i + _BLOCK)
        image = gram @ block
        basis[now], images[now] = block.T, image.T
        before = basis[: now.stop]
        block = np.linalg.qr(image - before.T @ (before @ image))[0]
        block = np.linalg.qr(block - before.T @ (before @ block))[0]
    _, ritz = np.linalg.eigh((basis @ images.T).astype("float64"))
    vectors = basis.T @ ritz[:, -wanted:].astype("float32")
    return np.linalg.qr(vectors.astype("float64"))[0]


def _none_above(bar: float, gram: np.ndarray, q: np.ndarray) -> bool:
    """Whether G has no eigenvalue above `bar` orthogonal to the columns of q.

    With P = I - QQᵀ the matrix PGP is G - QCᵀ - CQᵀ, C = GQ - Q(QᵀGQ)/2.
    """
    q = q.astype("float32")
    gq = gram @ q
    change = q @ (gq - q @ (q.T @ gq / 2)).T
    rest = change + change.T - gram
    rest[np.diag_indices(len(rest))] += np.float32(bar)
    try:
        np.linalg.cholesky(rest)
    except np.linalg.LinAlgError:
        return False
    return True
