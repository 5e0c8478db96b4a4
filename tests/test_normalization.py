"""BatchNormalization and dropout go on as before the adapter was enabled."""

import keras
import numpy as np
import pytest
from helpers import assert_same, numpy
from tiny_backbones import TINY

import keras_svdtune
from keras_svdtune.files.save_load import saved_adapter

# The moving statistics, and dropout as well in the last.
NAMES = ("DeepLabV3Backbone", "EfficientNetBackbone", "SegFormerBackbone")


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


# What it learned belongs to the adapter.

IMAGES = np.random.default_rng(0).standard_normal((16, 6, 6, 3)) + 1.0


def small():
    """A convolution, its normalization, and a head."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(momentum=0.5, name="norm"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )


def trained():
    """The model, adapted and trained, and what it computed before."""
    model = small()
    base = numpy(model(IMAGES))
    keras_svdtune.enable_svf(model)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(IMAGES, np.ones((16, 2)), batch_size=8, epochs=2, verbose=0)
    norm = model.get_layer("norm")
    assert np.abs(numpy(norm.moving_mean)).max() > 0.1
    assert np.any(numpy(model(IMAGES)) != base)
    return model, base


def test_remove_and_disabled_give_the_base_back():
    model, base = trained()
    learned = numpy(model(IMAGES))
    with keras_svdtune.adapter_disabled(model):
        assert_same(numpy(model(IMAGES)), base, "disabled")
    assert_same(numpy(model(IMAGES)), learned, "enabled again")
    keras_svdtune.remove_adapter(model)
    assert_same(numpy(model(IMAGES)), base, "removed")
    for ours, theirs in zip(model.weights, small().weights, strict=True):
        assert_same(ours, numpy(theirs), ours.path)


def test_a_file_holds_what_moved(tmp_path):
    model, base = trained()
    learned = numpy(model(IMAGES))
    path = tmp_path / "adapter.safetensors"
    keras_svdtune.save_adapter(model, path)
    fresh = small()
    keras_svdtune.load_adapter(fresh, path)
    assert_same(numpy(fresh(IMAGES)), learned, "into the base")
    # Onto one that has learned something else, and onto one that has none.
    fresh.get_layer("norm").moving_mean.assign(np.full(4, 7.0))
    keras_svdtune.load_adapter(fresh, path)
    assert_same(numpy(fresh(IMAGES)), learned, "into an adapted one")
    still = small()
    keras_svdtune.enable_svf(still)
    keras_svdtune.save_adapter(still, tmp_path / "still.safetensors")
    keras_svdtune.load_adapter(fresh, tmp_path / "still.safetensors")
    assert_same(numpy(fresh(IMAGES)), base, "one that was not trained")
    with pytest.raises(ValueError, match="cannot be added up"):
        keras_svdtune.compose({path: 0.5, tmp_path / "still.safetensors": 0.5})


def test_merging_keeps_what_moved():
    model, _ = trained()
    learned = numpy(model(IMAGES))
    keras_svdtune.merge_adapter(model)
    np.testing.assert_allclose(numpy(model(IMAGES)), learned, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda key, value: {key: value[:2]},
        lambda key, value: {key: value * np.float32("nan")},
        lambda key, value: {"norm_2/moving_mean": value},
    ],
    ids=["shape", "nan", "layer"],
)
def test_statistics_of_another_model_are_refused(change):
    model, _ = trained()
    file = saved_adapter(model)
    key = next(k for k in file.statistics if k.endswith("mean"))
    for name, value in change(key, file.arrays.pop(key)).items():
        file.arrays[name] = value
        file.about["statistics"] = [
            name if k == key else k for k in file.statistics
        ]
    fresh = small()
    before = [numpy(v) for v in fresh.weights]
    with pytest.raises(ValueError, match="holds moving statistics"):
        keras_svdtune.load_adapter(fresh, file)
    assert_same([numpy(v) for v in fresh.weights], before)


def test_disabled_from_a_model_around_gives_the_base_back():
    inner = small()
    x = np.random.default_rng(0).standard_normal((8, *inner.input_shape[1:]))
    outer = keras.Sequential([keras.Input(inner.input_shape[1:]), inner])
    before = numpy(outer(x))
    keras_svdtune.enable_svf(inner)
    for _ in range(3):
        inner(x + 1.0, training=True)
    with keras_svdtune.adapter_disabled(outer):
        assert_same(numpy(outer(x)), before)
    assert np.any(numpy(outer(x)) != before)


def test_a_plain_file_brings_the_base_statistics_too(tmp_path):
    trained_before = small()
    x = np.random.default_rng(0).standard_normal(
        (8, *trained_before.input_shape[1:])
    )
    for _ in range(3):
        trained_before(x + 1.0, training=True)
    for variable in trained_before.weights:
        if variable.name == "kernel":
            variable.assign(variable.value * 1.5)
    trained_before.save_weights(tmp_path / "plain.weights.h5")
    expected = numpy(trained_before(x))
    model = small()
    keras_svdtune.enable_svf(model)
    model.load_weights(tmp_path / "plain.weights.h5")
    with keras_svdtune.adapter_disabled(model):
        assert_same(numpy(model(x)), expected)
    keras_svdtune.remove_adapter(model)
    assert_same(numpy(model(x)), expected)
