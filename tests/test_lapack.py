"""Some eigenvectors against all of NumPy's."""

import threading
import time

import keras
import numpy as np
import pytest

from keras_svdtune.matrix.lapack import eigh_part

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="knows no backend: on JAX"
)


def symmetric(n, dtype="float64"):
    w = np.random.default_rng(0).standard_normal((n, n)).astype(dtype)
    return w.T @ w


@pytest.mark.parametrize("part", [(0, 1), (0, 7), (33, 40), (12, 20), (0, 40)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_is_a_part_of_all(dtype, part):
    matrix = symmetric(40, dtype)
    before = matrix.copy()
    values, vectors = eigh_part(matrix, *part)
    assert np.array_equal(matrix, before)
    assert values.dtype == vectors.dtype == dtype
    expected, basis = np.linalg.eigh(matrix.astype("float64"))
    wanted = slice(*part)
    tolerance = 100 * np.finfo(dtype).eps
    scale = expected[-1]
    np.testing.assert_allclose(values, expected[wanted], atol=tolerance * scale)
    np.testing.assert_allclose(
        vectors.T @ vectors, np.eye(len(values)), atol=tolerance
    )
    residual = matrix @ vectors - vectors * values
    np.testing.assert_allclose(residual, 0, atol=tolerance * scale)
    cosines = np.abs(np.sum(basis[:, wanted] * vectors, axis=0))
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((30, 30)),
        np.eye(30),
        np.ones((30, 30)),
        np.diag(np.repeat([0.0, 1.0, 2.0], 10)),
    ],
    ids=["0", "equal", "rank 1", "clusters"],
)
def test_equal_values_get_orthonormal_vectors(matrix):
    for part in ((0, 8), (15, 30)):
        values, vectors = eigh_part(matrix, *part)
        np.testing.assert_allclose(
            vectors.T @ vectors, np.eye(len(values)), atol=1e-12
        )
        np.testing.assert_allclose(
            matrix @ vectors, vectors * values, atol=1e-12
        )


def test_nan_is_no_answer():
    assert eigh_part(np.full((9, 9), np.nan), 0, 3) is None


def test_other_threads_run_meanwhile():
    """Python's lock is free: another thread counts while LAPACK works."""
    matrix = symmetric(1000)
    counts = []
    done = threading.Event()

    def count():
        while not done.is_set():
            counts.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    start = time.perf_counter()
    eigh_part(matrix, 0, 9)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(start < t < end for t in counts) > 3
