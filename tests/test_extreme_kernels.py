"""Kernels that are not finite, very large, very small, or float64."""

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_same,
    eager,
    method_id,
    must_stay,
    numpy,
    perturb,
    values,
)

import keras_svdtune
from keras_svdtune import (
    PSOFT,
    SVF,
    SVFT,
    AdaLoRA,
    DoRA,
    LoRA,
    LoRAXS,
    MiCA,
    MiLoRA,
    OPLoRA,
    PiSSA,
)
from keras_svdtune.matrix import decompose
from keras_svdtune.matrix.factors import Needs

METHODS = [
    SVF(),
    SVF(replace_kernel=True),
    SVFT("plain"),
    SVFT("banded", 2),
    SVFT("random", 1),
    SVFT("top_k", 1),
    PiSSA(rank=2),
    PiSSA(rank=2, n_iter=2),
    PiSSA(rank=2, quantize="int8"),
    MiLoRA(rank=2),
    MiLoRA(rank=0.3),
    LoRAXS(rank=2),
    LoRA(rank=2),
    DoRA(rank=2),
    AdaLoRA(rank=2),
    MiCA(rank=2),
    PSOFT(rank=2),
    OPLoRA(rank=2, keep=2),
]
REPLACES = [x for x in METHODS if hasattr(x, "option")]
SHAPES = {"square": (8, 8), "tall": (8, 4)}


def model_of(scale, dtype="float32"):
    """Two layers side by side; the largest number of a kernel is `scale`."""
    rng = np.random.default_rng(0)
    x = keras.Input((8,))
    outputs = []
    for name, shape in SHAPES.items():
        kernel = rng.standard_normal(shape)
        kernel *= scale / np.abs(kernel).max()
        layer = keras.layers.Dense(shape[1], name=name, dtype=dtype)
        outputs.append(layer(x))
        layer._kernel.assign(kernel.astype(layer.variable_dtype))
    return keras.Model(x, outputs)


def inputs(scale):
    """Numbers of size 1 / scale."""
    x = np.random.default_rng(1).standard_normal((5, 8))
    return (x / scale).astype("float32")


@pytest.mark.parametrize("method", METHODS, ids=method_id)
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e31])
def test_no_method_takes_a_kernel_that_is_not_finite(method, bad):
    """The error names the layer, and nothing has changed."""
    model = model_of(1.0)
    kernel = numpy(model.get_layer("tall")._kernel).copy()
    kernel[2, 3] = bad
    model.get_layer("tall")._kernel.assign(kernel)
    before = values(model)
    with pytest.raises(ValueError, match="'tall' holds NaN or infinity, or"):
        keras_svdtune.enable_adapter(model, method)
    assert not adapted(model)
    assert_same(values(model), before)


def test_declared_layers_and_banks_must_be_finite():
    plain = keras.layers.Dense(4)
    plain.build((None, 8))
    plain.kernel.assign(np.full((8, 4), np.inf, "float32"))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        keras_svdtune.LoRADense.from_layer(plain, rank=2)
    x = keras.Input((6, 8))
    layer = keras.layers.Conv1D(8, 3, groups=2, name="two")
    model = keras.Model(x, layer(x))
    kernel = numpy(layer._kernel).copy()
    kernel[0, 0, 7] = np.nan  # of the second group
    layer._kernel.assign(kernel)
    with pytest.raises(ValueError, match="'two#1' holds NaN or infinity"):
        keras_svdtune.enable_adapter(model, LoRA(rank=2))


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-40])
@pytest.mark.parametrize(
    "method", [x for x in METHODS if x not in REPLACES], ids=method_id
)
def test_very_large_and_very_small_kernels(method, scale, tmp_path):
    """Enabled, trained, saved, loaded and merged as ever, or refused."""
    model = model_of(scale)
    x = inputs(max(scale, 1.0))
    base = eager(model, x)
    if method == DoRA(rank=2) and scale == 1e30:
        with must_stay(model, x), pytest.raises(ValueError) as caught:
            keras_svdtune.enable_adapter(model, method)
        assert "'square': DoRA needs columns with a norm up" in str(
            caught.value
        ) or "'tall': DoRA needs columns" in str(caught.value)
        return
    keras_svdtune.enable_adapter(model, method)
    assert_same(eager(model, x), base)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(x, [np.ones_like(y) for y in base], verbose=0)
    perturb(model, size=0.02)
    trained = eager(model, x)
    assert all(np.isfinite(y).all() for y in trained)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path)
    other = model_of(scale)
    keras_svdtune.load_adapter(other, path)
    assert_same(eager(other, x), trained)
    keras_svdtune.merge_adapter(model)
    for found, expected in zip(eager(model, x), trained, strict=True):
        size = max(np.abs(expected).max(), 1e-30)
        assert np.abs(found - expected).max() <= 2e-5 * size


def test_kernels_near_the_largest_float16():
    model = model_of(65504.0, "float16")
    x = inputs(65504.0)
    keras_svdtune.enable_svf(model)
    layer = model.get_layer("square")
    layer.adapter.delta.assign(np.full(8, 0.5))
    trained = values(model)
    with pytest.raises(ValueError, match="'square'.*too large for float16"):
        keras_svdtune.merge_adapter(model)
    assert_same(values(model), trained)  # neither of the two is merged
    layer.adapter.delta.assign(np.full(8, -0.5))
    before = eager(model, x)
    keras_svdtune.merge_adapter(model)
    for found, expected in zip(eager(model, x), before, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-2)
    with pytest.raises(ValueError, match="too large for float16"):
        keras_svdtune.enable_svf(
            model_of(65504.0, "float16"), replace_kernel=True
        )


def test_an_adapter_of_nan_is_not_merged():
    model = model_of(1.0)
    keras_svdtune.enable_svf(model)
    model.get_layer("tall").adapter.delta.assign(np.full(4, np.nan))
    trained = values(model)
    with pytest.raises(ValueError, match="'tall' holds NaN or infinity"):
        keras_svdtune.merge_adapter(model)
    assert_same(values(model), trained)
    keras_svdtune.remove_adapter(model)


def test_keras_cannot_quantize_very_small_kernels():
    model = model_of(1e-8)
    with pytest.raises(ValueError, match="`quantize` needs a kernel with"):
        keras_svdtune.enable_pissa(model, 2, quantize="int8")
    assert not adapted(model)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_a_device_leaves_extreme_matrices_to_the_host(scale, monkeypatch):
    """In float32 their squares vanish, or overflow."""
    monkeypatch.setattr(decompose, "on_host", lambda: False)  # as on a GPU
    w = np.random.default_rng(0).standard_normal((12, 9)).astype("float32")
    w *= np.float32(scale)
    expected = np.linalg.svd(w.astype("float64"), compute_uv=False)
    found = decompose.computed(w, Needs("small_side")).s
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture
def double():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")


@pytest.mark.parametrize(
    "method", [x for x in METHODS if x not in REPLACES], ids=method_id
)
def test_float64_kernels_keep_their_digits(method, double):
    """Merged untrained, they are what they were; trained, W + dW is float64."""
    model = model_of(1.0, "float64")
    if numpy(model.get_layer("tall")._kernel).dtype != "float64":
        pytest.skip("JAX has no float64 unless it is told to")
    before = values(model)
    kernels = {n: numpy(model.get_layer(n)._kernel) for n in SHAPES}
    x = np.random.default_rng(1).standard_normal((5, 8))
    base = eager(model, x)
    keras_svdtune.enable_adapter(model, method)
    assert_same(eager(model, x), base)
    keras_svdtune.merge_adapter(model)
    assert_same(values(model), before)

    keras_svdtune.enable_adapter(model, method)
    for layer in adapted(model).values():
        for v in layer.adapter.variables_by_name(trainable=True).values():
            v.assign(numpy(v) + 1e-6)  # dW is tiny beside W
    exact = {n: change_by_numpy(model.get_layer(n)) for n in SHAPES}
    keras_svdtune.merge_adapter(model)
    for name, change in exact.items():
        layer = model.get_layer(name)
        found = numpy(layer._kernel) - kernels[name]
        assert np.abs(change).max() > 1e-9
        np.testing.assert_allclose(
            found, change, atol=1e-5 * np.abs(change).max()
        )


def change_by_numpy(layer):
    """dW = W' - W from the adapter's weights, in float64."""
    a = {
        name.partition("_")[2] if "lora_xs" not in name else name[8:]: (
            numpy(v).astype("float64")
        )
        for name, v in layer.adapter.variables_by_name().items()
    }
    method, w = layer.adapter.method, numpy(layer._kernel)
    if method.name == "svf":
        return (w @ a["basis"] * a["delta"]) @ a["basis"].T
    if method.name == "svft":
        n = w.shape[1]
        m = np.zeros((n, n))
        if "positions" in a:
            m.flat[a["positions"].astype(int)] = a["m"]
        else:
            start = 0
            d = 0 if method.pattern == "plain" else method.off_diagonals
            for k in range(-d, d + 1):
                i = np.arange(max(-k, 0), n - max(k, 0))
                m[i, i + k] = a["m"][start : start + len(i)]
                start += len(i)
        return w @ a["basis"] * a["inverse_s"] @ m @ a["basis"].T
    if method.name in ("pissa", "milora"):
        new = (a["a0"] + a["delta_a"]) @ (a["b0"] + a["delta_b"])
        return new - a["a0"] @ a["b0"]
    if method.name == "lora_xs":
        return w @ a["v"] @ a["r"] @ a["v"].T
    if method.name == "lora":
        return a["a"] @ a["b"]
    if method.name == "adalora":
        return (a["p"] * a["singular_values"]) @ a["q"]
    assert method.name == "dora"
    directions = w + a["a"] @ a["b"]
    norms = np.linalg.norm(w, axis=0)
    m = norms + a["magnitude_change"]
    return directions * (m / np.linalg.norm(directions, axis=0)) - w


def test_no_float32_kernel_takes_the_place_of_a_float64_one(double):
    model = model_of(1.0, "float64")
    if numpy(model.get_layer("tall")._kernel).dtype != "float64":
        pytest.skip("JAX has no float64 unless it is told to")
    with pytest.raises(ValueError, match="float64 kernel.*`replace_kernel`"):
        keras_svdtune.enable_svf(model, replace_kernel=True)


def test_adalora_trains_a_float64_model(double):
    """TensorFlow adds no float32 penalty to a float64 loss."""
    model = model_of(1.0, "float64")
    x = np.random.default_rng(1).standard_normal((16, 8))
    keras_svdtune.enable_adalora(model, rank=2)
    model.compile("adam", "mse")
    allocator = keras_svdtune.RankAllocator()
    y = [np.ones((16, 8)), np.ones((16, 4))]
    history = model.fit(x, y, 4, 3, verbose=0, callbacks=[allocator]).history
    assert np.isfinite(history["loss"]).all()
    assert 0.0 < history["orthogonality"][-1] < 1.0
