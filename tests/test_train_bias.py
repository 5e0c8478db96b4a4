"""Biases of adapted layers that train with the adapter."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_same,
    eager,
    must_stay,
    numpy,
    perturb,
    picture,
    small_data,
    small_model,
    tiny_bert,
    tiny_gemma,
    values,
)

import keras_svdtune
from keras_svdtune import SVF, LoRA
from keras_svdtune.files.format import read_adapter

X, Y = small_data()
NAMES = ["first", "second"]


def biases(model):
    return [numpy(model.get_layer(name).bias) for name in NAMES]


def kernels(model):
    return [numpy(model.get_layer(name)._kernel) for name in NAMES]


def fit(model, epochs=3):
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model.fit(X, Y, epochs=epochs, verbose=0).history["loss"]


def test_they_train_are_kept_and_given_back(tmp_path):
    path = tmp_path / "a.safetensors"
    model = small_model()
    base, before, at_first = eager(model, X), values(model), biases(model)
    keras_svdtune.enable_svf(model, train_bias=True)
    assert_same(eager(model, X), base)
    assert len(model.trainable_variables) == 4
    summary = keras_svdtune.adapter_summary(model)
    assert sorted(summary.beside.values()) == [(4,), (5,)]
    kept = kernels(model)
    losses = fit(model)
    assert losses[-1] < losses[0]
    trained, learned = biases(model), eager(model, X)
    for x, y in zip(trained, at_first, strict=True):
        assert not np.any(x == y)
    assert_same(kernels(model), kept)
    with keras_svdtune.adapter_disabled(model):
        assert_same(eager(model, X), base)
    assert_same(eager(model, X), learned)
    with keras_svdtune.adapter_merged(model):
        assert_close(eager(model, X), learned, 1e-5)
    assert_same(eager(model, X), learned)

    keras_svdtune.save_adapter(model, path)
    assert sorted(
        x.shape
        for k, x in read_adapter(path).arrays.items()
        if k.endswith("/bias")
    ) == [(4,), (5,)]
    keras.backend.clear_session(free_memory=False)
    fresh = small_model()
    keras_svdtune.load_adapter(fresh, path)
    assert_same(eager(fresh, X), learned)
    keras_svdtune.remove_adapter(fresh)
    assert_same(eager(fresh, X), base)

    # To train on.
    keras_svdtune.enable_svf(fresh, train_bias=True)
    keras_svdtune.load_adapter(fresh, path)
    assert_same(eager(fresh, X), learned)
    fit(fresh)
    assert not np.array_equal(biases(fresh)[0], trained[0])
    # A file without them gives the biases of the base.
    keras_svdtune.load_adapter(fresh, path, adapter_only=True)
    assert_same(biases(fresh), at_first)
    fit(fresh)
    keras_svdtune.remove_adapter(fresh)
    assert_same(values(fresh), before)
    assert len(fresh.trainable_variables) == 4

    keras_svdtune.merge_adapter(model)
    assert_close(eager(model, X), learned, 1e-5)
    assert_same(biases(model), trained)
    assert len(model.trainable_variables) == 4


def test_removing_leaves_the_model_as_it_was():
    model = small_model()
    model.get_layer("first").bias.trainable = False
    before = picture(model, X, compiled=False)
    keras_svdtune.enable_adapter(model, LoRA(2), train_bias=True)
    perturb(model)
    fit(model)
    keras_svdtune.remove_adapter(model)
    assert_same(picture(model, X, compiled=False), before)


def test_full_saves(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = small_model()
    keras_svdtune.enable_adapter(model, LoRA(2), train_bias=True)
    fit(model)
    learned = eager(model, X)
    model.save_weights(path)
    keras.backend.clear_session(free_memory=False)
    other = small_model()
    other.load_weights(path)
    assert_close(eager(other, X), learned, 1e-5)
    other = small_model()
    keras_svdtune.enable_adapter(other, LoRA(2), train_bias=True)
    other.compile(keras.optimizers.Adam(1e-2), "mse")
    other.load_weights(path)
    assert_same(eager(other, X), learned)


def test_each_named_adapter_has_its_own():
    model = small_model()
    base = eager(model, X)
    keras_svdtune.enable_svf(model, name="a", train_bias=True)
    fit(model)
    first, ours = eager(model, X), biases(model)
    keras_svdtune.enable_svf(model, name="b")
    assert_same(eager(model, X), base)
    fit(model, 5)
    second = eager(model, X)
    keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), first)
    assert_same(biases(model), ours)
    keras_svdtune.set_adapter(model, "b")
    assert_same(eager(model, X), second)
    with pytest.raises(ValueError, match="has also trained"):
        keras_svdtune.set_adapter(model, {"a": 0.5, "b": 0.5})
    keras_svdtune.remove_adapter(model)
    assert_same(eager(model, X), base)


def test_only_the_biases_of_what_is_adapted():
    model = small_model()
    keras_svdtune.enable_svf(model, ["first"], train_bias=True)
    assert model.get_layer("first").bias.trainable
    assert not model.get_layer("second").bias.trainable
    bert = tiny_bert(num_layers=1)
    bert.enable_adapter(LoRA(2), [".*(query|value)"], train_bias=True)
    found = {
        v.path.split("/")[-2]
        for v in bert.trainable_variables
        if v.name == "bias"
    }
    assert found == {"query", "value"} and len(adapted(bert)) == 2


def test_a_convolution_and_what_is_transposed(tmp_path):
    path = tmp_path / "a.safetensors"

    def make():
        keras.utils.set_random_seed(0)
        keras.backend.clear_session(free_memory=False)
        x = keras.Input((6, 6, 2))
        y = keras.layers.Conv2D(4, 3, name="first")(x)
        y = keras.layers.Conv2DTranspose(3, 2, name="second")(y)
        return keras.Model(x, y)

    model, x = make(), np.ones((2, 6, 6, 2), "float32")
    base = eager(model, x)
    keras_svdtune.enable_svf(model, train_bias=True)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, base + 1, epochs=2, verbose=0)
    assert all(np.all(b != 0.0) for b in biases(model))
    learned = eager(model, x)
    keras_svdtune.save_adapter(model, path)
    other = make()
    keras_svdtune.load_adapter(other, path)
    assert_close(eager(other, x), learned, 1e-6)
    weights = tmp_path / "model.weights.h5"
    model.save_weights(weights)
    other = make()
    other.load_weights(weights)
    assert_close(eager(other, x), learned, 1e-5)
    keras_svdtune.remove_adapter(model)
    assert_same(eager(model, x), base)


def test_clear_errors():
    model = small_model()
    with must_stay(model, X), pytest.raises(ValueError, match="True or False"):
        keras_svdtune.enable_svf(model, train_bias=1)
    keras_svdtune.enable_svf(model, name="a")
    with must_stay(model, X), pytest.raises(ValueError, match="without `train"):
        keras_svdtune.enable_svf(model, name="b", train_bias=True)
    with pytest.raises(ValueError, match="has a bias"):
        tiny_gemma().enable_adapter(SVF(), train_bias=True)


def test_an_export_says_that_it_leaves_them_out(tmp_path):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=32,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )
    backbone.enable_adapter(LoRA(2), train_bias=True)
    with pytest.warns(UserWarning, match="besides is not exported: .*bias"):
        backbone.export_peft(tmp_path / "folder")


def test_what_becomes_a_lora_keeps_its_biases(tmp_path):
    path = tmp_path / "lora.safetensors"
    model = small_model()
    before = biases(model)
    keras_svdtune.enable_pissa(model, rank=2, train_bias=True)
    fit(model)
    trained, learned = biases(model), eager(model, X)
    keras_svdtune.to_lora(model)
    assert_same(biases(model), trained)
    assert_close(eager(model, X), learned, 1e-5)
    assert len(model.trainable_variables) == 6
    keras_svdtune.save_adapter(model, path)
    other = small_model()
    keras_svdtune.load_adapter(other, path)
    assert_same(biases(other), trained)
    assert_close(eager(other, X), learned, 1e-5)
    keras_svdtune.remove_adapter(model)
    assert_same(biases(model), before)
