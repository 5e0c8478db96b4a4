"""The decomposition against NumPy in float64, and where and how it runs."""

import tracemalloc
import warnings

import numpy as np
import pytest
from keras import ops

from keras_svdtune.matrix import algorithms, float64
from keras_svdtune.matrix import decompose as decomposition
from keras_svdtune.matrix.algorithms import small_side
from keras_svdtune.matrix.decompose import decompose
from keras_svdtune.matrix.factors import Needs
from keras_svdtune.runtime import precision

pytestmark = pytest.mark.fast

SHAPES = [(12, 7), (7, 12), (9, 9), (5, 1), (1, 5)]
SMALL = Needs("small_side")


def matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def with_spectrum(rows, columns, s, seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    n = len(s)
    u = np.linalg.qr(rng.standard_normal((rows, n)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, n)))[0]
    return ((u * s) @ v.T).astype("float32")


def on_device(monkeypatch):
    """Makes `decompose` work through keras.ops, as on a GPU."""
    monkeypatch.setattr(decomposition, "on_host", lambda: False)


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """Once on the host, once as on a GPU; in float64 both."""
    if request.param == "device":
        on_device(monkeypatch)
    return request.param


def check_small_side(w, factors, tolerance):
    """Against numpy.linalg.svd in float64."""
    rows, columns = w.shape
    n = min(rows, columns)
    w = w.astype("float64")
    s = np.linalg.svd(w, compute_uv=False)
    assert factors.s.shape == (n,) and factors.s.dtype == np.float32
    assert np.all(np.diff(factors.s) <= 0) and np.all(factors.s >= 0)
    # The Gram matrix squares the condition: small values are less exact.
    limit = np.sqrt(tolerance) * max(s[0], 1e-30)
    np.testing.assert_allclose(factors.s, s, atol=limit)
    large = s > 0.1 * s[0]
    np.testing.assert_allclose(factors.s[large], s[large], rtol=tolerance)
    if columns <= rows:
        assert factors.u is None
        basis, projected = factors.v, w @ factors.v
        rebuilt = projected @ factors.v.T
    else:
        assert factors.v is None
        basis, projected = factors.u, w.T @ factors.u
        rebuilt = factors.u @ projected.T
    assert basis.shape == (n, n) and basis.dtype == np.float32
    eye = basis.astype("float64").T @ basis
    np.testing.assert_allclose(eye, np.eye(n), atol=tolerance)
    np.testing.assert_allclose(rebuilt, w, atol=tolerance * max(s[0], 1e-30))
    # The basis is that of the singular vectors: it diagonalises WᵀW or WWᵀ.
    gram = projected.T @ projected
    off = gram - np.diag(np.diag(gram))
    assert np.abs(off).max() <= tolerance * max(s[0] ** 2, 1e-30)
    # Each in its place: the i-th column belongs to the i-th value.
    np.testing.assert_allclose(np.sqrt(np.diag(gram)), s, atol=limit)


def check_signs(w, factors):
    """The largest entry of each vector of the smaller side is positive."""
    basis = factors.v if w.shape[1] <= w.shape[0] else factors.u
    rows = np.argmax(np.abs(basis), axis=0)
    largest = basis[rows, np.arange(basis.shape[1])]
    assert np.all(largest > 0), largest


HARD = {
    "rank-deficient": [3, 2, 1, 0, 0, 0],
    "equal-values": [2, 2, 2, 1, 1, 1],
    "all-equal": [1, 1, 1, 1, 1, 1],
    "ill-conditioned": [1e3, 1, 1e-3, 1e-4, 1e-5, 0],
    "zero": [0, 0, 0, 0, 0, 0],
}
CASES = {str(shape): matrix(shape) for shape in SHAPES} | {
    f"{name}-{shape}": with_spectrum(*shape, np.array(s, "float64"))
    for name, s in HARD.items()
    for shape in ((10, 6), (6, 10))
}


@pytest.mark.parametrize("w", CASES.values(), ids=CASES)
def test_small_side(w, where):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        factors = decompose(ops.convert_to_tensor(w), SMALL)
    check_small_side(w, factors, 3e-6)
    if w.any():
        check_signs(w, factors)


def test_bfloat16_is_decomposed_in_float32(where):
    half = ops.cast(ops.convert_to_tensor(matrix((12, 7))), "bfloat16")
    exact = ops.convert_to_numpy(ops.cast(half, "float32"))
    check_small_side(exact, decompose(half, SMALL), 3e-6)


def test_equals_plain_numpy_to_the_bit():
    """So every backend gets the same factors."""
    w = matrix((30, 20))
    factors = decompose(ops.convert_to_tensor(w), SMALL)
    w = w.astype("float64")
    values, v = np.linalg.eigh(w.T @ w)
    s, v = np.sqrt(values[::-1]), v[:, ::-1]
    v = v * np.sign(v[np.argmax(np.abs(v), axis=0), np.arange(20)])
    assert np.array_equal(factors.s, s.astype("float32"))
    assert np.array_equal(factors.v, v.astype("float32"))


@pytest.mark.parametrize("shape", [(50, 3), (3, 50), (20, 20)])
def test_products_by_blocks(shape, monkeypatch):
    """A block holds less than the matrix does, and the last is smaller."""
    monkeypatch.setattr(float64, "_NUMBERS", 21)
    w = matrix(shape)
    w64 = w.astype("float64")
    np.testing.assert_allclose(float64.gram(w), w64.T @ w64, atol=1e-13)
    a = matrix((3, w.shape[0])).astype("float64")
    product, norm = float64.rows_and_norm(a, w)
    np.testing.assert_allclose(product, a @ w64, atol=1e-12)
    np.testing.assert_allclose(norm, np.linalg.norm(w64))
    for other in (matrix((shape[1], 4)), matrix((shape[1], 70))):
        expected = w64 @ other.astype("float64")
        for a, b, c in ((w, other, expected), (other.T, w.T, expected.T)):
            found = float64.matmul(a, b)
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, c, atol=1e-13)
    small = decompose(ops.convert_to_tensor(w), SMALL)
    check_small_side(w, small, 1e-6)
    top = decompose(ops.convert_to_tensor(w), Needs("top", 2))
    check_components(w, top, "top", 2, 1e-6)


def test_a_large_matrix_is_not_copied_to_float64(monkeypatch):
    """The table of an embedding: what is allocated is little beside it."""
    monkeypatch.setattr(float64, "_NUMBERS", 2**17)
    w = np.ones((2**16, 32), "float32")
    w[np.arange(32), np.arange(32)] += np.arange(1, 33)
    tracemalloc.start()
    try:
        algorithms.small_side(w, algorithms.HOST)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A block and the next, and little else; a copy would be twice the matrix.
    assert peak < 2.5 * float64._NUMBERS * 8 < 0.2 * 2 * w.nbytes


# The ends of the spectrum.


def check_components(w, factors, part, rank, tolerance):
    u, s, vt = np.linalg.svd(w.astype("float64"), full_matrices=False)
    part = slice(0, rank) if part == "top" else slice(len(s) - rank, None)
    expected = (u[:, part] * s[part]) @ vt[part]
    assert factors.u.shape == (w.shape[0], rank)
    assert factors.v.shape == (w.shape[1], rank)
    assert factors.s.shape == (rank,)
    for x in (factors.u, factors.s, factors.v):
        assert x.dtype == np.float32
    assert np.all(np.diff(factors.s) <= 0)
    np.testing.assert_allclose(factors.s, s[part], atol=tolerance * s[0])
    for basis in (factors.u, factors.v):
        eye = basis.astype("float64").T @ basis
        np.testing.assert_allclose(eye, np.eye(rank), atol=tolerance)
    found = (factors.u.astype("float64") * factors.s) @ factors.v.T
    np.testing.assert_allclose(found, expected, atol=tolerance * s[0])
    # Each pair belongs together: W·v = s·u.
    np.testing.assert_allclose(
        w.astype("float64") @ factors.v,
        factors.u.astype("float64") * factors.s,
        atol=tolerance * s[0],
    )
    check_signs(w, factors)


@pytest.mark.parametrize("part", ["top", "bottom"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_components(shape, part, where):
    w = with_spectrum(*shape, np.arange(min(shape), 0, -1.0))
    for rank in (1, 3, min(shape)):
        factors = decompose(ops.convert_to_tensor(w), Needs(part, rank))
        check_components(w, factors, part, rank, 1e-6)


@pytest.mark.parametrize("part", ["top", "bottom"])
@pytest.mark.parametrize(
    "shape, s, limit",
    [
        # Where a rounded Gram matrix has lost the smallest components.
        ((20, 8), 10.0 ** -np.arange(8), 1e-3),
        ((8, 20), 10.0 ** -np.arange(8), 1e-3),
        ((10, 6), np.array([3.0, 2.0, 1.0, 0, 0, 0]), 0.0),
    ],
)
def test_components_of_hard_matrices(shape, s, limit, part, where):
    w = with_spectrum(*shape, s)
    factors = decompose(ops.convert_to_tensor(w), Needs(part, 4))
    for basis in (factors.u, factors.v):
        eye = basis.astype("float64").T @ basis
        np.testing.assert_allclose(eye, np.eye(4), atol=1e-5)
    exact = np.linalg.svd(w.astype("float64"), compute_uv=False)
    exact = exact[:4] if part == "top" else exact[-4:]
    atol = 0.0 if limit else 1e-6
    np.testing.assert_allclose(factors.s, exact, rtol=limit, atol=atol)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_randomised_top(shape, where):
    w = with_spectrum(*shape, 2.0 ** -np.arange(30))
    needs = Needs("top", 4, n_iter=4)
    factors = decompose(ops.convert_to_tensor(w), needs)
    check_components(w, factors, "top", 4, 1e-5)
    again = decompose(ops.convert_to_tensor(w), needs)
    assert np.array_equal(again.u, factors.u)  # the seed says it all
    assert np.array_equal(again.v, factors.v)


NEEDS = [
    SMALL,
    Needs("top", 3),
    Needs("bottom", 3),
    Needs("top", 0.5),
    Needs("top", 30),
    Needs("top", 3, n_iter=2),
]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (64, 64)])
def test_a_device_finds_what_the_host_finds(shape, needs, monkeypatch):
    """So a file that was made on a GPU loads on a CPU: the same vectors, signs
    and all, to the rounding of float32. In float32 neighbours would turn."""
    w = matrix(shape)
    host = decompose(ops.convert_to_tensor(w), needs)
    on_device(monkeypatch)
    monkeypatch.setattr(float64, "_NUMBERS", 21 * shape[1])  # several blocks
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # The workers share a cache of programs; one may read it half written.
        warnings.filterwarnings("ignore", "Error reading persistent")
        device = decompose(ops.convert_to_tensor(w), needs)
    for a, b in zip(
        (host.u, host.s, host.v), (device.u, device.s, device.v), strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(b, a, atol=1e-6 * np.abs(a).max())


def test_power_iterations_and_seed_matter():
    w = matrix((60, 50))  # a flat spectrum, hard for a random sketch
    exact = np.linalg.svd(w.astype("float64"), compute_uv=False)[:4]

    def off(n_iter):
        needs = Needs("top", 4, n_iter=n_iter)
        return np.abs(
            decompose(ops.convert_to_tensor(w), needs).s - exact
        ).max()

    assert off(0) > 10 * off(8) and off(8) < 0.05 * exact[0]
    a, b = (
        decompose(ops.convert_to_tensor(w), Needs("top", 4, 1, seed))
        for seed in (0, 1)
    )
    assert not np.array_equal(a.u, b.u)


@pytest.mark.parametrize("part, expected", [("top", 2), ("bottom", 3)])
def test_rank_as_a_share_of_the_squares(part, expected):
    s = np.array([4.0, 2.0, 1.0, 1.0])  # squares 16, 4, 1, 1 of 22
    w = with_spectrum(8, 4, s)
    energy = {"top": 20 / 22 - 1e-3, "bottom": 5 / 22}[part]
    factors = decompose(ops.convert_to_tensor(w), Needs(part, energy))
    assert len(factors.s) == expected
    check_components(w, factors, part, expected, 1e-6)
    for share in (1e-6, 1.0):
        found = decompose(ops.convert_to_tensor(w), Needs(part, share))
        assert len(found.s) == (1 if share < 1 else 4)


# What may go wrong.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_layer(bad, where):
    w = matrix((4, 3))
    w[2, 1] = bad
    with pytest.raises(ValueError, match="'block_3/query' holds NaN or inf"):
        decompose(ops.convert_to_tensor(w), SMALL, "block_3/query")


@pytest.mark.parametrize("failure", ["raises", "returns NaN"])
def test_falls_back_to_the_host(failure, monkeypatch):
    w = matrix((8, 5))
    expected = decompose(ops.convert_to_tensor(w), SMALL)
    on_device(monkeypatch)
    calls = []
    eigh = ops.eigh

    def broken(x):
        calls.append(x)
        if failure == "raises":
            raise RuntimeError("cusolver did not converge")
        values, vectors = eigh(x)
        return values, vectors * float("nan")

    monkeypatch.setattr(ops, "eigh", broken)
    reason = "cusolver did not" if failure == "raises" else "not finite"
    with pytest.warns(UserWarning) as caught:
        found = decompose(ops.convert_to_tensor(w), SMALL, "block/query")
    assert len(calls) == 1
    (message,) = [str(x.message) for x in caught if "LAPACK" in str(x.message)]
    assert reason in message and "'block/query'" in message
    assert np.array_equal(found.v, expected.v)
    assert np.array_equal(found.s, expected.s)


def test_interrupt_is_no_failure(monkeypatch):
    on_device(monkeypatch)

    def interrupted(x):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "eigh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decompose(ops.ones((4, 3)), SMALL)


def test_a_cpu_and_a_tpu_use_the_host(monkeypatch, keras_backend):
    assert precision.on_host()  # these tests run on a CPU
    if keras_backend == "jax":
        import jax

        for platform, expected in (("tpu", True), ("gpu", False)):
            monkeypatch.setattr(jax, "default_backend", lambda p=platform: p)
            assert precision.on_host() is expected
    elif keras_backend == "torch":
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert not precision.on_host()
    elif keras_backend == "tensorflow":
        import tensorflow as tf

        monkeypatch.setattr(
            tf.config, "list_physical_devices", lambda kind: [kind]
        )
        assert not precision.on_host()


# Precision.


@pytest.mark.parametrize("fails", [False, True])
def test_precision_is_put_back(fails, keras_backend):
    class Expected(Exception):
        pass

    def check(low, get, set_):
        before = get()
        try:
            set_(low)
            if fails:
                with pytest.raises(Expected), precision.full_precision():
                    raise Expected
            else:
                with precision.full_precision():
                    assert get() != low, "not at full precision"
            assert get() == low
        finally:
            set_(before)

    if keras_backend == "torch":
        import torch

        check(
            "medium",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        )
    elif keras_backend == "tensorflow":
        import tensorflow as tf

        config = tf.config.experimental
        check(
            True,
            config.tensor_float_32_execution_enabled,
            config.enable_tensor_float_32_execution,
        )
    elif keras_backend == "jax":
        import jax

        check(
            "bfloat16",
            lambda: jax.config.jax_default_matmul_precision,
            lambda x: jax.config.update("jax_default_matmul_precision", x),
        )


def _products(jaxpr):
    """The dtype of every dot_general, in inner programs too."""
    import jax

    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(str(equation.outvars[0].aval.dtype))
        for value in equation.params.values():
            for inner in jax.tree.leaves(
                value, is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += _products(inner)
    return found


# The exact components come from one of them, but for their other side.
DEVICE_PATHS = [
    lambda w: small_side(w, algorithms.DEVICE),
    lambda w: algorithms.randomised_top(
        w, Needs("top", 3, n_iter=2), algorithms.DEVICE
    ),
]


@pytest.mark.parametrize("shape", [(16, 14), (14, 16)])
@pytest.mark.parametrize("i", range(2))
def test_a_device_computes_in_float64(i, shape, keras_backend):
    """What a GPU would be told, from the traced program."""
    if keras_backend != "jax":
        pytest.skip("only JAX shows its program")
    import jax

    w = jax.ShapeDtypeStruct(shape, "float32")

    def trace():
        # None, the first of a small-side triple, is no output of a program.
        return jax.make_jaxpr(
            lambda w: [x for x in DEVICE_PATHS[i](w) if x is not None]
        )(w)

    with precision.float64_on_device():
        assert set(_products(trace().jaxpr)) == {"float64"}
    # And nothing is left on: the program of the model stays float32.
    assert ops.ones(2, "float32").dtype == ops.multiply(1.0, ops.ones(2)).dtype
    assert not jax.config.jax_enable_x64


def test_equal_shapes_compile_once(monkeypatch, keras_backend):
    if keras_backend != "jax":
        pytest.skip("only JAX compiles the ops of a decomposition")
    import jax

    on_device(monkeypatch)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # A shape that no other test has.
        first = ops.convert_to_tensor(matrix((23, 11)))
        second = ops.convert_to_tensor(matrix((23, 11), seed=1))
        decompose(first, SMALL)
        assert compiled, "the listener hears nothing"
        n = len(compiled)
        decompose(second, SMALL)
        assert len(compiled) == n
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
