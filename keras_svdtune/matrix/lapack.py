"""Some eigenvectors of a symmetric matrix, which cost less than all of them.

LAPACK's `syevr` makes the matrix tridiagonal, as for all of them, and then
finds by bisection and inverse iteration those that are asked for: it misses
none. Where they are few that is faster: enabling MiLoRA on Gemma 3 270M takes
0.6 of the time of SVF, which wants all (`tests/benchmarks/enable_time.py`).

`scipy.linalg.eigh(subset_by_index=...)` is this routine too, but holds
Python's lock while it runs, so that the cores would wait for each other. Called
by ctypes, through the table that SciPy has for compiled code, it does not.
"""

import ctypes
from typing import Any

import numpy as np
from scipy.linalg import cython_lapack

_ARGUMENTS = 21
_WORK = 70  # numbers a row: blocks of 64, as LAPACK itself asks for


def _routine(name: str) -> Any:
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = cython_lapack.__pyx_capi__[name]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * _ARGUMENTS)(address)


_SYEVR = {"float32": _routine("ssyevr"), "float64": _routine("dsyevr")}


def eigh_part(
    matrix: np.ndarray, first: int, last: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The eigenvalues from the `first` to before the `last`, and their vectors.

    Args:
        matrix: (n, n) symmetric, float32 or float64.
        first, last: int, 0 <= first < last <= n, counted from the smallest.

    Returns:
        (values, vectors) of shapes (k,) ascending and (n, k), in the dtype of
        `matrix`; None where LAPACK did not converge.
    """
    n, k, dtype = len(matrix), last - first, matrix.dtype
    a = np.array(matrix, order="C")  # it is overwritten
    values, vectors = np.empty(n, dtype), np.empty((k, n), dtype)
    work = np.empty(_WORK * n, dtype)
    integers = np.empty(10 * n, np.intc)
    support, found, info = (np.zeros(x, np.intc) for x in (2 * n, 1, 1))
    size = np.array([n, first + 1, last, work.size, integers.size], np.intc)
    n_, first_, last_, work_size, integers_size = (
        size[i:].ctypes.data for i in range(len(size))
    )
    zero = np.zeros(1, dtype)  # no range of values; the default tolerance
    options = np.frombuffer(b"VIL", "uint8")  # vectors, by index, lower half
    _SYEVR[dtype.name](
        *(options[i:].ctypes.data for i in range(3)),
        *(n_, a.ctypes.data, n_, zero.ctypes.data, zero.ctypes.data),
        *(first_, last_, zero.ctypes.data, found.ctypes.data),
        *(values.ctypes.data, vectors.ctypes.data, n_, support.ctypes.data),
        *(work.ctypes.data, work_size, integers.ctypes.data, integers_size),
        info.ctypes.data,
    )
    if info[0] != 0 or found[0] != k:
        return None
    return values[:k], vectors.T
