"""Adapters on int8 and int4 bases: W stays quantized, the adapter is float.

That they keep every promise is in `test_hosts.py`.
"""

import numpy as np
import pytest
from helpers import (
    hosts_data,
    hosts_model,
    method_id,
    numpy,
    perturb,
    small_model,
)
from keras import ops
from test_hosts import quantized, same_function

import keras_svdtune
from keras_svdtune import SVF, DoRA, PiSSA
from keras_svdtune.model.targets import find_targets

NAMES = ("dense_tall", "dense_wide", "einsum_query", "einsum_output")


@pytest.mark.parametrize("mode, levels", [("int8", 127), ("int4", 7)])
def test_the_matrix_is_the_dequantized_kernel(mode, levels):
    plain = find_targets(hosts_model(names=NAMES))
    found = find_targets(quantized(mode, NAMES))
    for name, target in plain.items():
        w = numpy(target.matrix()).astype("float64")
        read = numpy(found[name].matrix())
        assert np.abs(read - w).max() <= 0.51 * np.abs(w).max() / levels, name
        assert len(np.unique(read)) < read.size or mode == "int8", name


def test_an_adapter_of_the_float_base_is_refused(tmp_path):
    names, path = ("dense_tall",), tmp_path / "adapter.safetensors"
    model = hosts_model(names=names)
    keras_svdtune.enable_svf(model)
    keras_svdtune.save_adapter(model, path)
    with pytest.raises(ValueError, match="trained on other weights"):
        keras_svdtune.load_adapter(quantized("int8", names), path)


@pytest.mark.parametrize("method", [SVF(), PiSSA(2), DoRA(2)], ids=method_id)
def test_gradients_are_those_of_the_dequantized_matrix(method):
    """int4 quantizes no input, so the layer is exactly x·W'."""
    model = quantized("int4", ("dense_tall",))
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    layer = model.get_layer("dense_tall")
    x = ops.convert_to_tensor(*hosts_data(("dense_tall",)))

    def dense():
        return ops.tanh(ops.matmul(x, layer.merged_kernel()) + layer.bias)

    same_function(lambda: layer(x), dense, model.trainable_variables)


def test_layers_that_are_quantized_meanwhile_come_back_whole():
    model = small_model()
    keras_svdtune.enable_svf(model, ["first"])
    second = model.get_layer("second")
    second.quantize("int8")
    assert second.quantization_mode == "int8"
    before = {v.path for v in second.weights}
    keras_svdtune.merge_adapter(model)
    assert {v.path for v in second.weights} == before
    assert [v.path for v in second.trainable_weights] == ["small/second/bias"]
