"""Computes float64 products of float32 matrices without a float64 copy.

The table of an embedding has hundreds of millions of numbers: in float64 it
alone would take twice the memory of the model. So it is converted by blocks.
"""

from collections.abc import Iterator

import numpy as np

_NUMBERS = 2**23  # in a block: 64 MiB in float64


def gram(w: np.ndarray) -> np.ndarray:
    """Returns wᵀ·w in float64 for w (rows, columns) of any floating dtype."""
    total = np.zeros((w.shape[1], w.shape[1]))
    for rows in blocks(*w.shape):
        block = w[rows].astype("float64", copy=False)
        total += block.T @ block  # BLAS halves the work: it is one array
    return total


def rows_and_norm(a: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns a·w and ‖w‖ (Frobenius) in float64; a (k, rows) has few rows.

    Each block of w (rows, columns) is converted once for both.
    """
    total, squares = np.zeros((len(a), w.shape[1])), 0.0
    for rows in blocks(*w.shape):
        block = w[rows].astype("float64")
        total += a[:, rows] @ block
        squares += float(np.vdot(block, block))
    return total, float(np.sqrt(squares))


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a·b in float64 for 2-D operands of any floating dtype."""
    if a.size < b.size:
        return matmul(b.T, a.T).T
    b = b.astype("float64", copy=False)
    if a.shape[0] >= a.shape[1]:
        return np.concatenate(
            [a[rows].astype("float64") @ b for rows in blocks(*a.shape)]
        )
    total = np.zeros((a.shape[0], b.shape[1]))
    for columns in blocks(*a.shape[::-1]):
        total += a[:, columns].astype("float64") @ b[columns]
    return total


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yields the rows of each block of a matrix (rows, columns)."""
    step = max(_NUMBERS // columns, 1)
    return (slice(i, i + step) for i in range(0, rows, step))
