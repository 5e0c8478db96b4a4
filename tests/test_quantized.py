"""Adapters on int8 and int4 bases: W stays quantized, the adapter is float."""

import keras
import numpy as np
import pytest
from helpers import (
    assert_same,
    dot,
    eager,
    error,
    gradient_function,
    hosts_data,
    hosts_model,
    method_id,
    numpy,
    perturb,
    small_model,
)
from keras import ops

import keras_svdtune
from keras_svdtune import SVF, DoRA, PiSSA
from keras_svdtune.hosts.host import matrix_of

NAMES = ("dense_tall", "dense_wide", "einsum_query", "einsum_output")
DATA = hosts_data(NAMES)
# How far requantizing W' may move an output: half a step of its range.
ROUNDING = {"int8": 0.02, "int4": 0.25}


def quantized(mode):
    model = hosts_model("float32", NAMES)
    model.quantize(mode)
    return model


@pytest.mark.parametrize("mode", ROUNDING)
def test_the_matrix_is_the_dequantized_kernel(mode):
    plain = hosts_model("float32", NAMES)
    model = quantized(mode)
    levels = {"int8": 127, "int4": 7}[mode]
    for name in NAMES:
        w = numpy(matrix_of(plain.get_layer(name))).astype("float64")
        found = numpy(matrix_of(model.get_layer(name)))
        step = np.abs(w).max() / levels
        assert np.abs(found - w).max() <= 0.51 * step, name
        assert len(np.unique(found)) < found.size or mode == "int8", name


@pytest.mark.parametrize("mode", ROUNDING)
@pytest.mark.parametrize("method", [SVF(), PiSSA(2), DoRA(2)], ids=method_id)
def test_trains_saves_loads_and_merges(mode, method, tmp_path):
    model = quantized(mode)
    base = eager(model, DATA)
    kernels = [numpy(v) for v in model.weights]
    keras_svdtune.enable_adapter(model, method)
    assert_same(eager(model, DATA), base, "first step")
    assert {v.dtype for v in model.trainable_variables} == {"float32"}

    model.compile(keras.optimizers.SGD(0.1), "mse")
    start = [numpy(v) for v in model.trainable_variables]
    model.fit(DATA, {k: v * 0.5 for k, v in base.items()}, verbose=0)
    assert any(
        (numpy(v) != s).any()
        for v, s in zip(model.trainable_variables, start, strict=True)
    )
    perturb(model)
    moved = eager(model, DATA)
    model.save_weights(tmp_path / "full.weights.h5")
    keras_svdtune.save_adapter(model, tmp_path / "adapter.safetensors")
    keras_svdtune.remove_adapter(model)
    assert_same([numpy(v) for v in model.weights], kernels, "the base")

    keras_svdtune.load_adapter(model, tmp_path / "adapter.safetensors")
    assert_same(eager(model, DATA), moved, "loaded")
    perturb(model, seed=9)
    model.load_weights(tmp_path / "full.weights.h5")
    assert_same(eager(model, DATA), moved, "loaded from a full save")

    keras_svdtune.merge_adapter(model)
    assert model.get_layer(NAMES[0]).quantization_mode == mode
    merged = eager(model, DATA)
    # A full save holds the merged kernel, for a plain quantized model.
    plain = quantized(mode)
    plain.load_weights(tmp_path / "full.weights.h5")
    assert_same(eager(plain, DATA), merged, "plain")
    for name in NAMES:
        assert error(merged[name], moved[name]) < ROUNDING[mode], name


def test_an_adapter_of_the_float_base_is_refused(tmp_path):
    model = hosts_model("float32", NAMES)
    keras_svdtune.enable_svf(model)
    keras_svdtune.save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="trained on other weights"):
        keras_svdtune.load_adapter(
            quantized("int8"), tmp_path / "adapter.safetensors"
        )


@pytest.mark.parametrize("method", [SVF(), PiSSA(2), DoRA(2)], ids=method_id)
def test_gradients_are_those_of_the_dequantized_matrix(method):
    """int4 quantizes no input, so the layer is exactly x·W'."""
    model = quantized("int4")
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    layer = model.get_layer("dense_tall")
    x = ops.convert_to_tensor(DATA[NAMES.index("dense_tall")])

    def dense():
        return ops.tanh(ops.matmul(x, layer.merged_kernel()) + layer.bias)

    assert error(layer(x), dense()) < 1e-5
    dy = np.random.default_rng(2).standard_normal(dense().shape)
    dy = dy.astype("float32")
    trainables = list(layer.adapter.variables_by_name(trainable=True).values())
    found = gradient_function(lambda: dot(layer(x), dy), trainables)()
    expected = gradient_function(lambda: dot(dense(), dy), trainables)()
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 1e-4


def test_layers_that_are_quantized_meanwhile_come_back_whole():
    model = small_model()
    keras_svdtune.enable_svf(model, ["first"])
    model.quantize("int8")
    second = model.get_layer("second")
    assert second.quantization_mode == "int8"
    before = {v.path for v in second.weights}
    keras_svdtune.merge_adapter(model)
    assert {v.path for v in second.weights} == before
    assert [v.path for v in second.trainable_weights] == ["small/second/bias"]
