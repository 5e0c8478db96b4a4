"""Convolutions: what an adapter computes against its merged kernel."""

import keras
import numpy as np
import pytest
from helpers import (
    all_methods,
    assert_same,
    method_id,
    numpy,
    perturb,
    randomise,
)
from keras import KerasTensor, Sequential, layers, ops
from test_hosts import same_function, stepped

import keras_svdtune
from keras_svdtune import SVF, DoRA
from keras_svdtune.hosts.attach import plain_targets

CASES = {
    "strided": (layers.Conv2D(6, 3, strides=2, padding="same"), (5, 5, 2)),
    "dilated": (layers.Conv2D(6, 2, dilation_rate=2), (5, 5, 3)),
    "wide": (layers.Conv2D(9, 1), (3, 3, 6)),
    "causal": (layers.Conv1D(16, 2, padding="causal"), (5, 6)),
    "channels_first": (
        layers.Conv2D(6, 3, data_format="channels_first"),
        (2, 5, 5),
    ),
    "volume": (layers.Conv3D(6, 2), (3, 3, 3, 1)),
}


def adapted(name, method):
    kind, shape = CASES[name]
    layer = type(kind).from_config(kind.get_config())
    model = Sequential([layers.Input(shape), layer])
    randomise(model)
    keras_svdtune.enable_adapter(model, method)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *shape)).astype("float32")
    return model, layer, ops.convert_to_tensor(x)


@pytest.mark.parametrize(
    "name, method",
    [
        pytest.param(name, method, id=f"{name}-{method_id(method)}")
        for name in CASES
        # The kinds differ in how x is reached, which two methods show.
        for method in (
            all_methods() if name == "strided" else (SVF(), DoRA(rank=2))
        )
    ],
)
def test_output_and_gradients_are_those_of_the_merged_kernel(name, method):
    if name == "channels_first" and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow computes it on GPUs only")
    model, layer, x = adapted(name, method)
    base = numpy(layer.target.plain_layer().call(x))
    assert_same(numpy(layer(x)), base, "first step")
    perturb(model)

    def dense():
        merged = layer.merged_kernel()
        return layer.target.plain_layer(_kernel=merged).call(x)

    same_function(lambda: layer(x), dense, stepped(model))


def test_channels_first_has_the_same_matrix():
    for data_format, shape in (
        ("channels_first", (2, 5, 5)),
        ("channels_last", (5, 5, 2)),
    ):
        layer = layers.Conv2D(4, 3, data_format=data_format)
        layer.build((None, *shape))
        (target,) = plain_targets(layer)
        assert target.view.shape == (18, 4)
        if data_format == "channels_first":
            y = KerasTensor((2, 4, 3, 3))
            assert target.view.batch_dims_of_output(y) == (2, 3, 3)


def test_a_depthwise_kernel_is_left_out():
    model = Sequential(
        [
            layers.Input((4, 4, 6)),
            layers.Conv2D(6, 3, groups=6, name="depthwise"),
            layers.Conv2D(4, 1, name="pointwise"),
        ]
    )
    with pytest.warns(UserWarning, match="depthwise"):
        keras_svdtune.enable_svf(model)
    assert not hasattr(model.get_layer("depthwise"), "adapter")
    assert hasattr(model.get_layer("pointwise"), "adapter")
