"""BatchNormalization and dropout go on as before the adapter was enabled."""

import keras
import numpy as np
import pytest
from helpers import assert_same, numpy
from tiny_backbones import TINY

import keras_svdtune

# The moving statistics, and dropout as well in the last.
NAMES = ("DeepLabV3Backbone", "EfficientNetBackbone", "SegFormerBackbone")


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Each program runs once or twice: its compilation is most of the time."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def moving_statistics(model):
    """Those of every BatchNormalization."""
    return [
        variable
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def restore(variables, values):
    """Dropout has variables for its seeds; torch has one seed for all."""
    keras.utils.set_random_seed(0)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_statistics_stay(name):
    model, inputs = TINY[name]()
    plain = list(model.variables)
    start = [numpy(v) for v in plain]

    def run():
        restore(plain, start)
        inference = model(inputs, training=False)
        training = model(inputs, training=True)
        statistics = [numpy(v) for v in moving_statistics(model)]
        return numpy(inference), numpy(training), statistics

    before = run()
    assert np.any(before[0] != before[1]), "training changes nothing"
    keras_svdtune.enable_svf(model)
    assert_same(run(), before)
    assert not any(layer.trainable is False for layer in model.layers)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_moves_the_statistics_alike(name):
    model, inputs = TINY[name]()
    plain = list(model.variables)
    start = [numpy(v) for v in plain]
    target = np.zeros_like(numpy(model(inputs)))
    statistics = moving_statistics(model)

    def step():
        restore(plain, start)
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        model.train_on_batch(inputs, target)
        return [numpy(v) for v in statistics]

    before = [numpy(v) for v in statistics]
    expected = step()
    assert all(np.any(a != b) for a, b in zip(before, expected, strict=True))
    keras_svdtune.enable_svf(model)
    # Where the mean should be zero it is all rounding: an absolute bound.
    for variable, found, value in zip(
        statistics, step(), expected, strict=True
    ):
        np.testing.assert_allclose(
            found, value, rtol=1e-5, atol=1e-5, err_msg=variable.path
        )
    assert any(np.any(numpy(v)) for v in model.trainable_variables)
