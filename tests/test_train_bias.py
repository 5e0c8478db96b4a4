"""Biases of adapted layers that train with the adapter."""

import keras
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
    tiny_gpt2,
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
    backbone = tiny_gpt2()
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


def test_verbs_wait_for_the_end_of_a_block(tmp_path):
    model = small_model()
    before = values(model)
    keras_svdtune.enable_svf(model, train_bias=True)
    fit(model)
    learned = eager(model, X)
    blocks = (keras_svdtune.adapter_disabled, keras_svdtune.adapter_merged)
    verbs = (
        keras_svdtune.remove_adapter,
        keras_svdtune.merge_adapter,
        lambda x: keras_svdtune.to_lora(x, 2),
        lambda x: keras_svdtune.save_adapter(x, tmp_path / "a.safetensors"),
        lambda x: keras_svdtune.load_adapter(x, tmp_path / "a.safetensors"),
        lambda x: keras_svdtune.enable_svf(x, name="b"),
        lambda x: keras_svdtune.set_adapter(x, None),
    )
    for block in blocks:
        with block(model):
            for verb in verbs:
                with pytest.raises(
                    ValueError, match=f"Leave .*{block.__name__}"
                ):
                    verb(model)
        assert_same(eager(model, X), learned)
    assert not (tmp_path / "a.safetensors").exists()
    keras_svdtune.remove_adapter(model)
    assert_same(values(model), before)


def test_what_is_trained_while_merged_is_lost():
    model = small_model()
    keras_svdtune.enable_svf(model, train_bias=True)
    fit(model)
    learned = eager(model, X)
    with keras_svdtune.adapter_merged(model):
        fit(model)
    assert_same(eager(model, X), learned)


def test_plain_weights_bring_their_biases_as_the_base(tmp_path):
    path = tmp_path / "other.weights.h5"
    other = small_model()
    for variable in other.variables:
        variable.assign(variable + 1.0)
    other.save_weights(path)
    model = small_model()
    keras_svdtune.enable_svf(model, train_bias=True)
    fit(model)
    model.compile()  # the file has no optimizer
    model.load_weights(path)
    assert_same(eager(model, X), eager(other, X))
    with keras_svdtune.adapter_disabled(model):
        assert_same(eager(model, X), eager(other, X))
    fit(model)
    keras_svdtune.remove_adapter(model)
    assert_same(values(model), values(other))


def test_a_full_save_of_an_adapted_model_changes_no_base(tmp_path):
    path = tmp_path / "all.weights.h5"
    model = small_model()
    before = values(model)
    keras_svdtune.enable_svf(model, train_bias=True)
    fit(model)
    model.save_weights(path)
    model.load_weights(path)
    keras_svdtune.remove_adapter(model)
    assert_same(values(model), before)


def parts():
    """A model of two, each of which can be adapted by itself."""
    encoder = keras.Sequential(
        [keras.Input((X.shape[1],)), keras.layers.Dense(4, name="e")],
        name="enc",
    )
    decoder = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(Y.shape[1], name="d")],
        name="dec",
    )
    x = keras.Input((X.shape[1],))
    whole = keras.Model(x, decoder(encoder(x)))
    random = np.random.default_rng(0)
    for variable in whole.variables:
        variable.assign(random.normal(size=variable.shape))
    return encoder, decoder, whole


def test_parts_that_were_adapted_one_by_one(tmp_path):
    files = [tmp_path / f"{x}.safetensors" for x in ("e", "d", "whole", "e2")]
    *both, whole = parts()
    for part in both:
        keras_svdtune.enable_svf(part, train_bias=True)
    fit(whole)
    learned = eager(whole, X)
    for part, file in zip(both, files, strict=False):
        keras_svdtune.save_adapter(part, file)

    *both, whole = parts()
    before = values(whole)
    for part, file in zip(both, files, strict=False):
        keras_svdtune.load_adapter(part, file)
    assert_same(eager(whole, X), learned)
    keras_svdtune.save_adapter(whole, files[2])
    keras_svdtune.load_adapter(whole, files[2])
    keras_svdtune.remove_adapter(whole)
    assert_same(values(whole), before)

    encoder, _, whole = parts()
    keras_svdtune.load_adapter(whole, files[2])
    assert_same(eager(whole, X), learned)
    keras_svdtune.save_adapter(encoder, files[3])
    again, *_ = parts()
    keras_svdtune.load_adapter(again, files[3])
    assert_same(eager(again, X), eager(encoder, X))


def test_a_bias_that_is_not_finite_is_not_merged():
    model = small_model()
    keras_svdtune.enable_svf(model, train_bias=True)
    bias = model.get_layer("first").bias
    bias.assign(np.full(bias.shape, np.nan))
    with pytest.raises(ValueError, match="bias.*NaN or infinity"):
        keras_svdtune.merge_adapter(model)


def test_an_export_says_that_it_leaves_out_those_of_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    trained = tiny_gpt2()
    trained.enable_adapter(LoRA(2), train_bias=True)
    trained.save_adapter(path)
    backbone = tiny_gpt2()
    backbone.load_adapter(path)
    with pytest.warns(UserWarning, match="besides is not exported: .*bias"):
        backbone.export_peft(tmp_path / "folder")
