"""BatchNormalization is frozen while an adapter is there, and given back."""

import keras
import numpy as np
import pytest
from helpers import assert_differ, assert_same, must_stay, numpy, randomise

import keras_svdtune
from keras_svdtune.hosts import attach

IMAGES = np.random.default_rng(0).standard_normal((8, 6, 6, 3)) + 1.0
STATISTICS = ("moving_mean", "moving_variance")


@pytest.fixture
def model():
    """A convolution and two normalizations, one of them frozen by the user."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(momentum=0.5, name="norm"),
            layers.BatchNormalization(name="frozen", trainable=False),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )
    randomise(model)
    for name in ("norm", "frozen"):
        layer = model.get_layer(name)
        layer.moving_variance.assign(np.abs(numpy(layer.moving_variance)) + 1)
    return model


def statistics(model):
    norm = model.get_layer("norm")
    return [numpy(getattr(norm, name)) for name in STATISTICS]


def call(model, training):
    return numpy(model(IMAGES, training=training))


@pytest.mark.parametrize("end", ["remove_adapter", "merge_adapter"])
def test_its_statistics_stay_and_are_what_training_computes_by(model, end):
    flags = [layer.trainable for layer in model.layers]
    weights = [v.path for v in model.trainable_weights]
    base, before = call(model, False), statistics(model)
    live = call(model, True)
    assert_differ(live, base, "training by the batch")
    for name, value in zip(STATISTICS, before, strict=True):
        getattr(model.get_layer("norm"), name).assign(value)

    keras_svdtune.enable_svf(model)
    assert_same(call(model, True), base, "enabled")
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(IMAGES, np.ones((8, 2)), batch_size=4, epochs=2, verbose=0)
    assert_same(statistics(model), before)
    learned = call(model, False)
    assert_differ(learned, base, "trained")
    assert_same(call(model, True), learned, "trained")
    with keras_svdtune.adapter_disabled(model):
        assert_same(call(model, True), base, "disabled")

    getattr(keras_svdtune, end)(model)
    assert [layer.trainable for layer in model.layers] == flags
    assert [v.path for v in model.trainable_weights] == weights
    assert_same(statistics(model), before)
    if end == "remove_adapter":
        assert_same(call(model, True), live, "it is live again")


def test_an_interrupted_enable_gives_it_back(model, monkeypatch):
    made = []

    def interrupted(*args, **kwargs):
        made.append(args)
        raise KeyboardInterrupt

    with must_stay(model, IMAGES, compiled=False):
        monkeypatch.setattr(attach, "Adapter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keras_svdtune.enable_svf(model)
    assert made


def test_one_that_is_thawed_by_hand_is_live(model):
    keras_svdtune.enable_svf(model)
    before = statistics(model)
    model.get_layer("norm").trainable = True
    call(model, True)
    assert_differ(statistics(model)[0], before[0])
