"""The largest components by Lanczos' method against NumPy in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_svdtune import krylov, svd
from keras_svdtune.svd import Needs, decompose

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="knows no backend: on JAX"
)
N = 300  # the smallest side at which rank 2 is found so


def with_spectrum(rows, columns, s, seed=0):
    rng = np.random.default_rng(seed)
    n = min(rows, columns)
    u = np.linalg.qr(rng.standard_normal((rows, n)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, n)))[0]
    return ((u * s) @ v.T).astype("float32")


def gaussian(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)).astype("float32")


def check(w, found, rank):
    """That these are the singular vectors, and the largest."""
    u, s, vt = np.linalg.svd(w.astype("float64"), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    np.testing.assert_allclose(found[1], s, rtol=1e-9)
    for basis, exact in ((found[0], u), (found[2], v)):
        assert basis.shape == exact.shape and basis.dtype == np.float64
        inside = exact.T @ basis
        # Principal angles, and every vector for itself.
        assert np.linalg.norm(basis - exact @ inside, 2) < 1e-5
        np.testing.assert_allclose(np.abs(inside), np.eye(rank), atol=1e-4)
        np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(w @ found[2], found[0] * found[1], atol=1e-4)


SPECTRA = {
    "falling": 1.0 / np.arange(1, N + 1),
    "a share of noise": np.r_[5, 4, 3.5, 3, 2.9, np.linspace(2, 1, N - 5)],
    "low rank": np.r_[np.linspace(3, 1, 20), np.zeros(N - 20)],
    "pairs": np.repeat(np.linspace(2, 1, N // 2) ** 4, 2),
}


@pytest.mark.parametrize("shape", [(N, N), (N + 99, N), (N, 700)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_is_the_exact_one(spectrum, shape):
    w = with_spectrum(*shape, SPECTRA[spectrum])
    found = krylov.top(w, 2)
    assert found is not None
    if spectrum == "pairs":  # in which any two will do
        np.testing.assert_allclose(found[1], SPECTRA[spectrum][:2], rtol=1e-6)
        spanned = found[0] @ (found[0].T @ w)
        np.testing.assert_allclose(
            np.linalg.norm(spanned), np.linalg.norm(found[1]), rtol=1e-9
        )
    else:
        check(w, found, 2)
    again = krylov.top(w, 2)
    for a, b in zip(found, again, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "s",
    [
        np.zeros(N),
        np.ones(N),
        np.r_[2, np.ones(N - 1)],
        np.r_[1, np.zeros(N - 1)],
        np.r_[np.full(200, 2.0), np.ones(N - 200)],
        np.r_[1, np.full(N - 1, 1e-4)],
        np.full(N, 1e30),
    ],
    ids=["0", "equal", "equal but one", "rank 1", "200", "small", "huge"],
)
def test_what_is_not_certain_is_left_to_the_caller(s):
    with np.errstate(over="ignore", invalid="ignore"):
        assert krylov.top(with_spectrum(N, N, s), 2) is None


def test_small_matrices_and_large_ranks_are_left_too():
    assert krylov.top(gaussian(N - 20, 900), 2) is None
    assert krylov.top(with_spectrum(N, N, SPECTRA["falling"]), 3) is None


def test_a_component_that_was_missed_is_noticed(monkeypatch):
    """The certificate, not the luck of the start: residuals are small."""
    w = with_spectrum(N, N, SPECTRA["falling"])
    exact = np.linalg.svd(w.astype("float64"))[2].T

    def misses_the_second(gram, count, wanted):
        return np.delete(exact, 1, axis=1)[:, :wanted]

    def misses_none(gram, count, wanted):
        return exact[:, :wanted]

    monkeypatch.setattr(krylov, "_lanczos", misses_none)
    check(w, krylov.top(w, 2), 2)
    monkeypatch.setattr(krylov, "_lanczos", misses_the_second)
    assert krylov.top(w, 2) is None


def test_what_has_not_converged_is_noticed(monkeypatch):
    """The residuals, not the certificate: nothing large is left outside."""
    w = with_spectrum(N, N, SPECTRA["falling"])
    exact = np.linalg.svd(w.astype("float64"))[2].T

    def turned(gram, count, wanted):
        q = exact[:, :wanted].copy()
        q[:, 0] += 1e-3 * exact[:, wanted]
        return np.linalg.qr(q)[0]

    monkeypatch.setattr(krylov, "_lanczos", turned)
    assert krylov.top(w, 2) is None


@pytest.mark.parametrize("shape", [(N, 320), (320, N)])
def test_decompose_takes_it(shape, monkeypatch):
    w = with_spectrum(*shape, SPECTRA["falling"])
    needs = Needs("top", 2)
    calls = []
    top = krylov.top
    monkeypatch.setattr(krylov, "top", lambda *a: calls.append(a) or top(*a))
    fast = decompose(ops.convert_to_tensor(w), needs)
    assert calls and top(w, 2) is not None
    monkeypatch.setattr(krylov, "top", lambda *a: None)
    exact = decompose(ops.convert_to_tensor(w), needs)
    for a, b in ((fast.u, exact.u), (fast.s, exact.s), (fast.v, exact.v)):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-6)  # signs too
    monkeypatch.undo()
    monkeypatch.setattr(krylov, "top", None)
    for other in (Needs("top", 0.5), Needs("bottom", 2), Needs("top", 2, 1)):
        decompose(ops.convert_to_tensor(w), other)
    monkeypatch.setattr(svd, "on_host", lambda: False)
    decompose(ops.convert_to_tensor(w), needs)
