"""What trains besides the adapters is in the file, and comes back.

The head of a Task, layers around a backbone, a layer that the user thawed, the
moving statistics of a BatchNormalization that is not frozen.
"""

import warnings

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_differ,
    assert_same,
    numpy,
    perturb,
    tiny_bert,
    tokens,
)

import keras_svdtune
from keras_svdtune.files.format import read_adapter

X = np.random.RandomState(0).normal(size=(8, 6)).astype("float32")
Y = np.random.RandomState(1).normal(size=(8, 3)).astype("float32")


def classifier(base=None, seed=0):
    """A classifier whose head is drawn by `seed`, on the weights of `base`."""
    keras.utils.set_random_seed(seed)
    task = keras_hub.models.BertTextClassifier(
        backbone=tiny_bert(num_layers=1), num_classes=2, preprocessor=None
    )
    if base is not None:
        task.backbone.set_weights(base)
    task.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return task


WORDS = tokens(segments=True, batch=4)


def trained_classifier():
    task = classifier()
    base = task.backbone.get_weights()
    task.enable_svf()
    task.fit(WORDS, np.array([0, 1, 0, 1]), epochs=2, verbose=0)
    return task, base


def test_the_head_of_a_task(tmp_path):
    task, base = trained_classifier()
    learned = task.predict(WORDS, verbose=0)
    file = tmp_path / "a.safetensors"
    task.save_adapter(file)
    keys = read_adapter(file).beside
    assert keys == ["logits/kernel", "logits/bias"]

    fresh = classifier(base, seed=1)
    untrained = fresh.predict(WORDS, verbose=0)
    fresh.load_adapter(file)
    assert_close(fresh.predict(WORDS, verbose=0), learned, 1e-6)
    with fresh.adapter_disabled():
        assert_close(fresh.predict(WORDS, verbose=0), untrained, 1e-6)
    assert_close(fresh.predict(WORDS, verbose=0), learned, 1e-6)
    again = tmp_path / "b.safetensors"
    fresh.save_adapter(again)
    assert_same(read_adapter(again).arrays, read_adapter(file).arrays)
    fresh.remove_adapter()
    assert_close(fresh.predict(WORDS, verbose=0), untrained, 1e-6)

    # Onto an adapted one, whose own head was trained since.
    other = classifier(base, seed=2)
    other.enable_svf()
    other.fit(WORDS, np.array([1, 1, 0, 0]), verbose=0)
    other.load_adapter(file)
    assert_close(other.predict(WORDS, verbose=0), learned, 1e-6)
    other.merge_adapter()
    assert np.abs(other.predict(WORDS, verbose=0) - learned).max() < 1e-5


def test_the_head_can_be_left_out(tmp_path):
    task, base = trained_classifier()
    file = tmp_path / "a.safetensors"
    task.save_adapter(file, adapter_only=True)
    assert read_adapter(file).beside == []
    fresh = classifier(base, seed=1)
    head = numpy(fresh.get_layer("logits").kernel)
    with pytest.warns(UserWarning, match="holds the adapter alone.*logits"):
        fresh.load_adapter(file)
    assert_same(numpy(fresh.get_layer("logits").kernel), head)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh.load_adapter(file, adapter_only=True)

    task.save_adapter(file)
    fresh.load_adapter(file, adapter_only=True)
    assert_same(numpy(fresh.get_layer("logits").kernel), head)
    with pytest.raises(ValueError, match="BertTextClassifier.*adapter_only"):
        classifier(base).backbone.load_adapter(file)


def test_another_head_is_an_error_and_changes_nothing(tmp_path):
    task, base = trained_classifier()
    file = tmp_path / "a.safetensors"
    task.save_adapter(file)
    other = keras_hub.models.BertTextClassifier(
        backbone=tiny_bert(num_layers=1), num_classes=5, preprocessor=None
    )
    other.backbone.set_weights(base)
    before = other.get_weights()
    with pytest.raises(ValueError, match=r"'logits/kernel' of shape \(\d+, 2"):
        other.load_adapter(file)
    for now, then in zip(other.get_weights(), before, strict=True):
        assert_same(now, then)


def test_it_is_in_the_summary():
    task, _ = trained_classifier()
    cost = task.adapter_summary()
    assert cost.beside["logits/bias"] == (2,)
    assert "logits/bias (2,)" in cost.table().caption
    assert task.backbone.adapter_summary().beside == {}


def around():
    """A model around a part, with unnamed layers in both."""
    part = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(6, "tanh")], name="part"
    )
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(part(inputs))
    outputs = keras.layers.Dense(3)(keras.layers.Dense(6)(x))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, part


def test_a_head_around_a_part_that_keras_numbers_otherwise(tmp_path):
    """Both have a `dense`, and the numbers of a second model are others."""
    model, part = around()
    part_weights = part.get_weights()
    keras_svdtune.enable_svf(part)
    model.fit(X, Y, epochs=3, verbose=0)
    file = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, file)
    names = [key.split("/")[-1] for key in read_adapter(file).beside]
    assert sorted(names) == sorted(
        ["gamma", "beta", "moving_mean", "moving_variance"]
        + 2 * ["kernel", "bias"]
    )
    keras.layers.Dense(2)  # takes a number
    fresh, part = around()
    part.set_weights(part_weights)
    keras_svdtune.load_adapter(fresh, file)
    learned = model.predict(X, verbose=0)
    assert_same(fresh.predict(X, verbose=0), learned)


def test_what_the_user_thawed(tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(5, name="a"),
                keras.layers.BatchNormalization(name="n"),
                keras.layers.Dense(3, name="b"),
            ],
            name="m",
        )

    model = make()
    base = model.predict(X, verbose=0)
    keras_svdtune.enable_svf(model)
    model.get_layer("a").bias.trainable = True
    model.get_layer("n").trainable = True
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(X, Y, epochs=3, verbose=0)
    file = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, file)
    of_norm = ("gamma", "beta", "moving_mean", "moving_variance")
    wanted = {"m/a/bias", *(f"m/n/{name}" for name in of_norm)}
    assert {
        key if key[:2] == "m/" else f"m/{key}"
        for key in read_adapter(file).beside
    } == wanted
    fresh = make()
    keras_svdtune.load_adapter(fresh, file)
    assert_same(fresh.predict(X, verbose=0), model.predict(X, verbose=0))
    keras_svdtune.remove_adapter(fresh)
    assert_same(fresh.predict(X, verbose=0), base)


@pytest.mark.parametrize("around", [False, True])
def test_a_layer_that_was_thawed(around, tmp_path):
    """It trains until all is frozen, and again after; nothing else does."""

    def make():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        x = keras.layers.Dense(5, name="a")(inputs)
        x = keras.layers.BatchNormalization(name="n")(x)
        x = keras.layers.LayerNormalization(name="l")(x)
        inner = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
        return inner, keras.Sequential([inner]) if around else inner

    inner, model = make()
    base = model.predict(X, verbose=0)
    keras_svdtune.enable_svf(inner, ["a"])
    alone = [id(v) for v in inner.trainable_variables]
    head = inner.get_layer("head")
    assert all(x.get_config()["trainable"] is True for x in inner.layers[3:])
    head.trainable = True
    both = [id(v) for v in inner.trainable_variables]
    assert set(both) == {*alone, id(head.kernel), id(head.bias)}

    model.trainable = True
    assert [id(v) for v in model.trainable_variables] == both
    model.trainable = False
    assert not model.trainable_variables and not inner.trainable_variables
    model.trainable = True
    assert [id(v) for v in model.trainable_variables] == both
    assert not inner.get_layer("n").trainable

    model.compile(keras.optimizers.SGD(0.1), "mse")
    others = {v.path: numpy(v) for v in inner.get_layer("l").weights}
    model.fit(X, Y, epochs=2, verbose=0)
    for variable in inner.get_layer("l").weights:
        assert_same(numpy(variable), others[variable.path])
    keras_svdtune.save_adapter(inner, tmp_path / "a.safetensors")
    fresh, whole = make()
    keras_svdtune.load_adapter(fresh, tmp_path / "a.safetensors")
    assert_same(whole.predict(X, verbose=0), model.predict(X, verbose=0))
    keras_svdtune.remove_adapter(fresh)
    assert_same(whole.predict(X, verbose=0), base)
    head.trainable = False
    model.trainable = True
    assert [id(v) for v in inner.trainable_variables] == alone

    keras_svdtune.remove_adapter(inner)
    assert len(inner.trainable_variables) == 8
    assert all(layer.trainable is True for layer in inner.layers)


def test_nothing_besides_is_nothing_in_the_file(tmp_path):
    backbone = tiny_bert(num_layers=1)
    backbone.enable_svf()
    perturb(backbone)
    file = tmp_path / "a.safetensors"
    backbone.save_adapter(file)
    about = read_adapter(file).about
    assert "beside" not in about and "saved_from" not in about


@pytest.mark.parametrize("where", ["adapter", "head"])
def test_what_is_not_finite_is_not_saved(where, tmp_path):
    task, _ = trained_classifier()
    file = tmp_path / "a.safetensors"
    task.save_adapter(file)
    before = file.read_bytes()
    variable = task.get_layer("logits").bias
    if where == "adapter":
        variable = task.backbone.trainable_variables[0]
    value = numpy(variable).copy()
    value.flat[0] = np.nan
    variable.assign(value)
    with pytest.raises(ValueError, match="NaN or infinity"):
        task.save_adapter(file)
    assert file.read_bytes() == before
    if where == "adapter":
        kernel = numpy(task.backbone.layers[-1].weights[0])
        with pytest.raises(ValueError, match="'svf_delta' of layer.*merged"):
            task.merge_adapter()
        assert_same(numpy(task.backbone.layers[-1].weights[0]), kernel)


def test_files_with_a_head_do_not_add_up(tmp_path):
    task, _ = trained_classifier()
    file = tmp_path / "a.safetensors"
    task.save_adapter(file)
    with pytest.raises(ValueError, match="adapter_only=True"):
        keras_svdtune.compose({file: 0.5})
    whole = keras_svdtune.compose({file: 1.0})
    assert whole.beside == ["logits/kernel", "logits/bias"]


def test_declared_layers_and_what_is_plain_beside_them(tmp_path):
    def make(seed):
        keras.utils.set_random_seed(seed)
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras_svdtune.SVFDense(5, name="a"),
                keras.layers.Dense(3, name="b"),
            ],
            name="m",
        )

    model, fresh = make(0), make(1)
    fresh.get_layer("a").set_weights(model.get_layer("a").get_weights())
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(X, Y, verbose=0)
    file = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, file)
    before = fresh.predict(X, verbose=0)
    keras_svdtune.load_adapter(fresh, file)
    assert_differ(fresh.predict(X, verbose=0), before)
    assert_same(
        numpy(fresh.get_layer("b").kernel), numpy(model.get_layer("b").kernel)
    )


def test_moving_statistics_of_an_old_file_numbered_otherwise(tmp_path):
    """Release 0.1 wrote the keys of moving statistics, and nothing else."""

    def make():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(6),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(6),
                keras.layers.BatchNormalization(),
            ],
            name="m",
        )

    model = make()
    keras_svdtune.enable_svf(model)
    for number, layer in enumerate(model.layers):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = True
            layer.moving_mean.assign(np.full(6, 1.0 + number))
    file = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, file)
    old = read_adapter(file)
    old.about["statistics"] = sorted(old.about.pop("beside"))
    del old.about["saved_from"]
    old.save(file)

    keras.layers.BatchNormalization()  # takes a number
    fresh = make()
    keras_svdtune.load_adapter(fresh, file)
    assert_same(fresh.predict(X, verbose=0), model.predict(X, verbose=0))


def test_removing_gives_back_what_a_file_has_set_around_a_part(tmp_path):
    """The adapter was enabled on the part, the file is of the whole."""
    model, part = around()
    keras_svdtune.enable_svf(part)
    model.fit(X, Y, verbose=0)
    file = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, file)
    before = numpy(model.layers[-1].kernel)
    model.fit(X, Y, verbose=0)
    now = numpy(model.layers[-1].kernel)
    assert_differ(now, before)
    keras_svdtune.load_adapter(model, file)
    assert_same(numpy(model.layers[-1].kernel), before)
    keras_svdtune.remove_adapter(model)
    assert_same(numpy(model.layers[-1].kernel), now)
