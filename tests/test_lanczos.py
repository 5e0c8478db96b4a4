"""The largest components, without the others, against NumPy in float64."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
import threadpoolctl
from keras import ops

from keras_svdtune.matrix import decompose as decomposition
from keras_svdtune.matrix import float64, lanczos, lapack
from keras_svdtune.matrix.decompose import decompose
from keras_svdtune.matrix.factors import Needs

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="knows no backend: on JAX"
)
N = 480
SMALL = 100


def with_spectrum(rows, columns, s, seed=0):
    rng = np.random.default_rng(seed)
    n = min(rows, columns)
    u = np.linalg.qr(rng.standard_normal((rows, n)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, n)))[0]
    return ((u * s) @ v.T).astype("float32")


def gaussian(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)).astype("float32")


def top(w, rank):
    """(u, s, v) of the largest components, or None."""
    if w.shape[1] > w.shape[0]:
        found = top(w.T, rank)
        return found and (found[2], found[1], found[0])
    found = lanczos.largest(float64.gram(w), rank)
    if found is None:
        return None
    values, vectors = (np.flip(x, axis=-1) for x in found)
    s = np.sqrt(values)
    return float64.matmul(w, vectors) / s, s, vectors


def check(w, found, rank):
    """That these are the singular vectors, and the largest."""
    u, s, vt = np.linalg.svd(w.astype("float64"), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    np.testing.assert_allclose(found[1], s, rtol=1e-9)
    for basis, exact in ((found[0], u), (found[2], v)):
        assert basis.shape == exact.shape and basis.dtype == np.float64
        inside = exact.T @ basis
        # Principal angles, and every vector for itself.
        assert np.linalg.norm(basis - exact @ inside, 2) < 1e-6
        np.testing.assert_allclose(np.abs(inside), np.eye(rank), atol=1e-4)
        np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(w @ found[2], found[0] * found[1], atol=1e-4)


SPECTRA = {
    "falling": lambda n: 1.0 / np.arange(1, n + 1),
    "a share of noise": lambda n: np.r_[
        5, 4, 3.5, 3, 2.9, np.linspace(2, 1, n - 5)
    ],
    "low rank": lambda n: np.r_[np.linspace(3, 1, 20), np.zeros(n - 20)],
    "pairs": lambda n: np.repeat(np.linspace(2, 1, n // 2) ** (n / 75), 2),
}


@pytest.mark.parametrize(
    "shape", [(N, N), (N + 99, N), (N, 700), (SMALL, SMALL), (SMALL, 900)]
)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_is_the_exact_one(spectrum, shape):
    s = SPECTRA[spectrum](min(shape))
    w = with_spectrum(*shape, s)
    found = top(w, 2)
    assert found is not None
    if spectrum == "pairs":  # in which any two will do
        np.testing.assert_allclose(found[1], s[:2], rtol=1e-6)
        spanned = found[0] @ (found[0].T @ w)
        np.testing.assert_allclose(
            np.linalg.norm(spanned), np.linalg.norm(found[1]), rtol=1e-9
        )
    else:
        check(w, found, 2)
    again = top(w, 2)
    for a, b in zip(found, again, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("n", [N, SMALL])
@pytest.mark.parametrize(
    "spectrum",
    [
        lambda n: np.zeros(n),
        lambda n: np.ones(n),
        lambda n: np.r_[2, np.ones(n - 1)],
        lambda n: np.r_[1, np.zeros(n - 1)],
        lambda n: np.r_[np.full(n // 2, 2.0), np.ones(n - n // 2)],
        lambda n: np.r_[1, np.full(n - 1, 1e-4)],
        lambda n: np.full(n, 1e30),
    ],
    ids=["0", "equal", "equal but one", "rank 1", "half", "small", "huge"],
)
def test_what_is_not_certain_is_left_to_the_caller(spectrum, n):
    with np.errstate(over="ignore", invalid="ignore"):
        assert top(with_spectrum(n, n, spectrum(n)), 2) is None


def test_large_ranks_are_left_too():
    assert top(gaussian(SMALL, 900), 13) is None


def test_where_lapack_does_not_converge_the_caller_goes_on(monkeypatch):
    w = gaussian(SMALL, 200)
    found = decompose(w, Needs("top", 2))
    low = decompose(w, Needs("bottom", 2))
    monkeypatch.setattr(lanczos, "largest", lambda *a: None)
    monkeypatch.setattr(lapack, "eigh_part", lambda *a: None)
    for ours, again in (
        (found, decompose(w, Needs("top", 2))),
        (low, decompose(w, Needs("bottom", 2))),
    ):
        np.testing.assert_allclose(ours.u, again.u, atol=1e-6)
        np.testing.assert_allclose(ours.v, again.v, atol=1e-6)


def test_a_component_that_was_missed_is_noticed(monkeypatch):
    """The certificate, not the luck of the start: residuals are small."""
    w = with_spectrum(N, N, SPECTRA["falling"](N))
    values, exact = np.linalg.eigh(float64.gram(w))

    def misses_the_second(gram, count, **options):
        return values[[-3, -1]], exact[:, [-3, -1]]

    def misses_none(gram, count, **options):
        return values[-count:], exact[:, -count:]

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", misses_none)
    check(w, top(w, 2), 2)
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", misses_the_second)
    assert top(w, 2) is None


def test_what_has_not_converged_is_noticed(monkeypatch):
    """The residuals, not the certificate: nothing large is left outside."""
    w = with_spectrum(N, N, SPECTRA["falling"](N))
    values, exact = np.linalg.eigh(float64.gram(w))

    def turned(gram, count, **options):
        q = exact[:, -count:].copy()
        q[:, 0] += 1e-3 * exact[:, -count - 1]
        return values[-count:], np.linalg.qr(q)[0]

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", turned)
    assert top(w, 2) is None


def test_where_arpack_gives_up_lapack_goes_on(monkeypatch):
    w = gaussian(N, 500)
    found = decompose(w, Needs("top", 2))
    monkeypatch.setattr(lanczos, "_RESTARTS", 1)
    assert top(w, 2) is None
    again = decompose(w, Needs("top", 2))
    np.testing.assert_allclose(found.u, again.u, atol=1e-6)
    np.testing.assert_allclose(found.v, again.v, atol=1e-6)


def test_other_threads_run_meanwhile():
    """Python's lock is free: this thread counts while another decomposes."""
    gram = float64.gram(gaussian(1500, 1500))
    worker = threading.Thread(target=lanczos.largest, args=(gram, 16))
    pauses, last = [], time.perf_counter()
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        pauses.append(time.perf_counter() - last)
        last += pauses[-1]
    assert len(pauses) > 20 and max(pauses) < sum(pauses) / 2


def test_threads_at_once_get_what_one_alone_gets():
    grams = [float64.gram(gaussian(700, N, seed)) for seed in range(4)]
    # ARPACK restarts at random where the rank is less than it has room for.
    low = with_spectrum(N, N, SPECTRA["low rank"](N))
    grams.append(float64.gram(low))
    alone = [lanczos.largest(gram, 6) for gram in grams]
    with (
        threadpoolctl.threadpool_limits(1, "blas"),
        ThreadPoolExecutor(4) as pool,
    ):
        expected = [lanczos.largest(gram, 6) for gram in grams]
        found = list(pool.map(lambda g: lanczos.largest(g, 6), 8 * grams))
    for i, (values, vectors) in enumerate(found):
        for a, b in zip((values, vectors), expected[i % 5], strict=True):
            assert np.array_equal(a, b)
        np.testing.assert_allclose(values, alone[i % 5][0], rtol=1e-9)


@pytest.mark.parametrize("shape", [(N, 500), (500, N), (SMALL, 90)])
def test_decompose_takes_it(shape, monkeypatch):
    w = with_spectrum(*shape, SPECTRA["falling"](min(shape)))
    needs = Needs("top", 2)
    assert top(w, 2) is not None
    monkeypatch.setattr(lapack, "eigh_part", None)
    fast = decompose(ops.convert_to_tensor(w), needs)
    monkeypatch.undo()
    monkeypatch.setattr(lanczos, "largest", lambda *a: None)
    exact = decompose(ops.convert_to_tensor(w), needs)
    for a, b in ((fast.u, exact.u), (fast.s, exact.s), (fast.v, exact.v)):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-6)  # signs too
    monkeypatch.undo()
    monkeypatch.setattr(lanczos, "largest", None)
    for other in (Needs("top", 0.5), Needs("bottom", 2), Needs("top", 2, 1)):
        decompose(ops.convert_to_tensor(w), other)
    monkeypatch.setattr(decomposition, "on_host", lambda: False)
    decompose(ops.convert_to_tensor(w), needs)
