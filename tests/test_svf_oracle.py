"""SVF against an oracle in float64 NumPy that shares no code with it."""

import keras
import numpy as np
import pytest
from helpers import dot, gradients, numpy
from keras import ops

import keras_svdtune

SHAPES = [(8, 5), (5, 8), (6, 6)]


class Oracle:
    """y = x·U diag(s·(1 + δ)) Vᵀ and its gradients, by numpy.linalg.svd."""

    def __init__(self, w, delta):
        self.u, self.s, self.vt = np.linalg.svd(
            w.astype("float64"), full_matrices=False
        )
        self.delta = delta.astype("float64")

    def merged(self):
        return (self.u * (self.s * (1 + self.delta))) @ self.vt

    def forward(self, x):
        return x.astype("float64") @ self.merged()

    def gradient(self, x, dy):
        """d sum(y·dy) / dδᵢ = sᵢ·uᵢᵀ(xᵀdy)vᵢ."""
        dw = x.astype("float64").T @ dy
        return self.s * np.einsum("ri,rc,ic->i", self.u, dw, self.vt)


def arrays(rows, columns):
    rng = np.random.default_rng(rows * 10 + columns)
    n = min(rows, columns)
    # Singular values well apart, so that the i-th δ means the i-th vector.
    u = np.linalg.qr(rng.standard_normal((rows, n)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, n)))[0]
    w = ((u * np.linspace(3, 1, n)) @ v.T).astype("float32")
    x = rng.standard_normal((7, rows)).astype("float32")
    dy = rng.standard_normal((7, columns)).astype("float32")
    delta = (0.5 * rng.standard_normal(n)).astype("float32")
    return w, x, dy, delta


def dense_with(w, dtype="float32"):
    rows, columns = w.shape
    model = keras.Sequential(
        [
            keras.layers.Input((rows,)),
            keras.layers.Dense(columns, use_bias=False, name="d", dtype=dtype),
        ]
    )
    model.layers[0].kernel.assign(w)
    keras_svdtune.enable_svf(model)
    return model, model.layers[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape):
    w, x, _, delta = arrays(*shape)
    model, layer = dense_with(w)
    layer.adapter.delta.assign(delta)
    expected = Oracle(w, delta).forward(x)
    np.testing.assert_allclose(numpy(model(x)), expected, atol=1e-5)
    assert np.abs(expected - x @ w).max() > 0.1  # δ does something


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, at_start):
    w, x, dy, delta = arrays(*shape)
    delta = np.zeros_like(delta) if at_start else delta
    model, layer = dense_with(w)
    layer.adapter.delta.assign(delta)
    (found,) = gradients(lambda: dot(model(x), dy), [layer.adapter.delta])
    expected = Oracle(w, delta).gradient(x, dy)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_merge(shape):
    w, x, _, delta = arrays(*shape)
    model, layer = dense_with(w)
    layer.adapter.delta.assign(delta)
    keras_svdtune.merge_adapter(model)
    expected = Oracle(w, delta).merged()
    np.testing.assert_allclose(numpy(layer.kernel), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step(shape):
    """One step of `fit` is a step along the oracle's gradient."""
    w, x, dy, delta = arrays(*shape)
    model, layer = dense_with(w)
    layer.adapter.delta.assign(delta)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    oracle = Oracle(w, delta)
    y = oracle.forward(x)
    loss = model.fit(x, dy, batch_size=7, verbose=0).history["loss"][0]
    np.testing.assert_allclose(loss, np.mean((y - dy) ** 2), rtol=1e-4)
    gradient = oracle.gradient(x, 2 * (y - dy) / dy.size)
    np.testing.assert_allclose(
        numpy(layer.adapter.delta), delta - 0.01 * gradient, atol=1e-5
    )


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_near(shape, policy):
    """Within a few roundings to bfloat16 (2**-8) of the exact result."""
    w, x, dy, delta = arrays(*shape)
    model, layer = dense_with(w, policy)
    layer.adapter.delta.assign(delta)
    oracle = Oracle(numpy(layer._kernel), delta)
    scale = np.abs(oracle.forward(x)).max()
    found = numpy(ops.cast(model(x), "float32"))
    np.testing.assert_allclose(found, oracle.forward(x), atol=0.03 * scale)
    (found,) = gradients(
        lambda: dot(ops.cast(model(x), "float32"), dy),
        [layer.adapter.delta],
    )
    expected = oracle.gradient(x, dy)
    limit = 0.03 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=limit)


def test_einsum_heads():
    """On a query kernel (heads, in, head_dim) the matrix is in x (n·h)."""
    w, x, _, delta = arrays(8, 6)
    model = keras.Sequential(
        [
            keras.layers.Input((7, 8)),
            keras.layers.EinsumDense("btd,ndh->btnh", (None, 3, 2)),
        ]
    )
    layer = model.layers[0]
    layer.kernel.assign(w.reshape(8, 3, 2).transpose(1, 0, 2))
    keras_svdtune.enable_svf(model)
    layer.adapter.delta.assign(delta)
    expected = Oracle(w, delta).forward(x).reshape(1, 7, 3, 2)
    np.testing.assert_allclose(numpy(model(x[None])), expected, atol=1e-5)
