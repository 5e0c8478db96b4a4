"""Several adapters in one model: named, set, mixed, one for each example."""

import contextlib
import random

import h5py
import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    Counter,
    adapted,
    all_methods,
    assert_close,
    assert_differ,
    assert_same,
    compiles,
    default_methods,
    eager,
    flat,
    hosts_data,
    hosts_model,
    method_id,
    numpy,
    perturb,
    predict,
    randomise,
    scaled,
    small_data,
    small_model,
    tiny_bert,
    tiny_gemma,
    tokens,
    trainables,
    values,
)
from test_interrupts import Raises

import keras_svdtune
from keras_svdtune import SVF, SVFT, LoRA, LoRAXS, PiSSA
from keras_svdtune.files.format import read_adapter
from keras_svdtune.model.state import open_blocks, record_of
from keras_svdtune.model.targets import adapted_targets

X, Y = small_data()
FEW = ("dense_tall", "dense_wide", "einsum_query")
every_method = pytest.mark.parametrize("method", all_methods(), ids=method_id)
one_of_each = pytest.mark.parametrize(
    "method", default_methods(), ids=method_id
)
LINEAR = [x for x in all_methods() if x.linear]


def two(method, model=None, **kwargs):
    """A model with the adapters "a" and "b", and what it computes with each
    and without. "b" is set."""
    model = model or small_model(**kwargs)
    data = X if model.name == "small" else hosts_data(FEW)
    base = eager(model, data)
    keras_svdtune.enable_adapter(model, method, name="a")
    perturb(model, 1)
    a = eager(model, data)
    keras_svdtune.enable_adapter(model, method, name="b")
    assert_same(eager(model, data), base, "a fresh adapter")
    perturb(model, 2)
    return model, {None: base, "a": a, "b": eager(model, data)}


def merged(model):
    """W' of each layer, by path."""
    return {
        path: numpy(target.adapted.merged(target.matrix()))
        for path, target in adapted_targets(model).items()
    }


# By name.


@every_method
def test_all_that_one_adapter_can_do(method, tmp_path):
    """Off, merged for a while, in full saves, as a LoRA, for PEFT, for good."""
    gemma, data = tiny_gemma(num_layers=1), tokens()
    base = eager(gemma, data)
    gemma.enable_adapter(method, name="a")
    perturb(gemma, 1)
    expected = eager(gemma, data)
    gemma.enable_adapter(method, name="b")
    perturb(gemma, 2)
    other = eager(gemma, data)
    gemma.set_adapter("a")
    with keras_svdtune.adapter_disabled(gemma):
        assert_same(eager(gemma, data), base, "off")
    with keras_svdtune.adapter_merged(gemma):
        assert_close(eager(gemma, data), expected, 1e-5, "for a while")
    assert_same(eager(gemma, data), expected, "after it")
    gemma.save_weights(tmp_path / "a.weights.h5")
    plain = tiny_gemma(num_layers=1)
    plain.load_weights(tmp_path / "a.weights.h5")
    assert_close(eager(plain, data), expected, 1e-5, "a full save")
    gemma.export_peft(tmp_path / "peft", rank=32)  # all of dW
    again = tiny_gemma(num_layers=1)
    again.load_adapter(tmp_path / "peft")
    assert_close(eager(again, data), expected, 1e-4, "what PEFT gets")
    gemma.set_adapter("b")
    assert_same(eager(gemma, data), other, "the other one")
    gemma.merge_adapter()
    assert_close(eager(gemma, data), other, 1e-5, "for good")
    assert not adapted(gemma)


@one_of_each
def test_training_that_was_interrupted_goes_on(method, tmp_path):
    """With `BackupAndRestore`, on the adapter that is set."""

    def fit(folder, epochs, model=None):
        keras.utils.set_random_seed(0)
        keras.backend.clear_session(free_memory=False)
        model = small_model()
        keras_svdtune.enable_adapter(model, method, name="a")
        perturb(model, 1)
        keras_svdtune.enable_adapter(model, method, name="b")
        model.compile(keras.optimizers.Adam(0.01), "mse")
        callbacks = [keras.callbacks.BackupAndRestore(folder)]
        if method.name == "adalora":
            callbacks.append(keras_svdtune.RankAllocator(total_steps=12))

        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == epochs:
                    raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            model.fit(
                X,
                Y,
                batch_size=8,
                epochs=4,
                shuffle=False,
                verbose=0,
                callbacks=[*callbacks, Stop()],
            )
        return model

    expected = fit(tmp_path / "whole", None)
    fit(tmp_path / "parts", 2)
    found = fit(tmp_path / "parts", None)
    assert_close(eager(found, X), eager(expected, X), 1e-6, "b")
    for model in (found, expected):
        keras_svdtune.set_adapter(model, "a")
    assert_same(eager(found, X), eager(expected, X), "a")


@every_method
def test_each_adapter_comes_back(method, tmp_path):
    model, outputs = two(method, hosts_model(names=FEW))
    data = hosts_data(FEW)
    assert_differ(outputs["a"], outputs["b"])
    assert model.trainable_variables
    for name in ("a", None, "b", "a", "a", None):
        keras_svdtune.set_adapter(model, name)
        assert_same(eager(model, data), outputs[name], str(name))
    assert keras_svdtune.adapter_names(model) == ["a", "b"]
    # What is trained belongs to the one that is set.
    keras_svdtune.set_adapter(model, "a")
    perturb(model, 3)
    moved = eager(model, data)
    keras_svdtune.set_adapter(model, "b")
    assert_same(eager(model, data), outputs["b"])
    # To a file, each, and from there into another model.
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        keras_svdtune.save_adapter(model, path, name=name)
    assert_same(eager(model, data), outputs["b"])
    other = hosts_model(names=FEW)
    for name in ("b", "a"):
        path = tmp_path / f"{name}.safetensors"
        keras_svdtune.load_adapter(other, path, name=name)
    assert_same(eager(other, data), moved)
    keras_svdtune.set_adapter(other, "b")
    assert_same(eager(other, data), outputs["b"])
    keras_svdtune.remove_adapter(other)
    assert_same(eager(other, data), outputs[None])
    assert keras_svdtune.adapter_names(other) == []
    keras_svdtune.set_adapter(model, "a")
    keras_svdtune.merge_adapter(model)
    assert not adapted(model)
    assert_close(eager(model, data), moved, 1e-5)


def test_without_a_name_it_is_the_default_one(tmp_path):
    model = small_model()
    keras_svdtune.enable_svf(model)
    assert keras_svdtune.adapter_names(model) == ["default"]
    assert keras_svdtune.adapter_summary(model).adapters == {"default": 1.0}
    perturb(model)
    learned = eager(model, X)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path)
    keras_svdtune.enable_svf(model, name="b")
    perturb(model, 2)
    with pytest.raises(ValueError, match="'default', 'b'. Say by `name`"):
        keras_svdtune.load_adapter(model, path)
    keras_svdtune.set_adapter(model, "default")
    assert_same(eager(model, X), learned)
    # A name that there is gets the values of a file, set or not.
    keras_svdtune.load_adapter(model, path, name="b")
    assert_same(eager(model, X), learned)
    assert keras_svdtune.adapter_names(model) == ["default", "b"]
    perturb(model, 2)
    keras_svdtune.load_adapter(model, path, name="b")
    assert_same(eager(model, X), learned)
    perturb(model, 2)
    b = eager(model, X)
    assert_differ(b, learned)
    keras_svdtune.delete_adapter(model, "default")
    assert_same(eager(model, X), b)
    # The only one, and set: as ever.
    keras_svdtune.load_adapter(model, path)
    assert_same(eager(model, X), learned)
    keras_svdtune.set_adapter(model, None)
    with pytest.raises(ValueError, match="none of them is set: 'b'"):
        keras_svdtune.load_adapter(model, path)


def test_an_adapter_costs_its_own_weights_only():
    model, _ = two(SVF(), hosts_model(names=FEW))
    count = model.count_params()
    for name in ("c", "d"):
        keras_svdtune.enable_svf(model, name=name)
    assert model.count_params() == count
    record = record_of(model)
    assert record.names["d"] is None
    sizes = [
        sum(x.size for w in stored.weights.values() for x in w.values())
        for stored in record.names.values()
        if stored is not None
    ]
    assert sizes == [keras_svdtune.adapter_summary(model).trainable] * 3
    shapes = [x.adapter.shape for x in adapted(model).values()]
    assert sizes[0] == sum(min(shape) for shape in shapes)


def test_they_are_methods_of_backbones_and_tasks():
    bert = tiny_bert(num_layers=1)
    data = tokens(segments=True)
    bert.enable_svf(["query", "value"], name="a")
    perturb(bert, size=0.5)
    a = eager(bert, data)
    bert.enable_adapter(SVF(), ["query", "value"], name="b")
    assert bert.adapter_names() == ["a", "b"]
    bert.set_adapter("a")
    assert_same(eager(bert, data), a)
    bert.delete_adapter("b")
    task = keras_hub.models.BertTextClassifier(
        bert, num_classes=2, preprocessor=None
    )
    assert task.adapter_names() == ["a"]


def test_the_summary_shows_them(capsys):
    model, _ = two(SVF())
    keras_svdtune.set_adapter(model, {"a": 0.25, "b": 0.0})
    cost = keras_svdtune.adapter_summary(model)
    assert cost.adapters == {"a": 0.25, "b": 0.0}
    assert "Adapters: a (set, 0.25), b" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.skipif(not compiles(), reason="torch compiles nothing")
def test_setting_compiles_nothing(tmp_path):
    x = keras.Input((6,))
    counter = Counter()
    y = keras.layers.Dense(5)(keras.layers.Dense(4, "tanh")(counter(x)))
    model = keras.Model(x, y)
    randomise(model)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    keras_svdtune.enable_svf(model, name="a")
    model.fit(X, Y, verbose=0)
    a = predict(model, X)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path)
    before = counter.calls
    optimizer = model.optimizer
    keras_svdtune.enable_svf(model, name="b")
    model.fit(X, Y, verbose=0)
    b = predict(model, X)
    keras_svdtune.set_adapter(model, "a")
    assert_same(predict(model, X), a)
    keras_svdtune.set_adapter(model, {"a": 0.5, "b": 2.0})
    assert_differ(predict(model, X), a)
    keras_svdtune.set_adapter(model, None)
    keras_svdtune.load_adapter(model, path, name="c")
    assert_same(predict(model, X), a)
    keras_svdtune.delete_adapter(model, "c")
    keras_svdtune.set_adapter(model, "b")
    assert_same(predict(model, X), b)
    assert counter.calls == before
    assert model.optimizer is optimizer


def test_fit_trains_the_one_that_is_set():
    model, outputs = two(LoRA(rank=2), compiled=True)
    keras_svdtune.set_adapter(model, "a")
    before = trainables(model)
    losses = model.fit(X, Y, epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for path, value in trainables(model).items():
        assert not np.array_equal(value, before[path]), path
    learned = eager(model, X)
    keras_svdtune.set_adapter(model, "b")
    assert_same(eager(model, X), outputs["b"])
    keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), learned)


# Sums.


@pytest.mark.parametrize("method", LINEAR, ids=method_id)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (-0.25, 2), (0, 0.75)])
def test_a_sum_against_float64(method, weights):
    model, outputs = two(method, hosts_model(names=FEW))
    parts = []
    keras_svdtune.set_adapter(model, None)
    base = merged(model)
    for name in ("a", "b"):
        keras_svdtune.set_adapter(model, name)
        parts.append(merged(model))
    keras_svdtune.set_adapter(
        model, dict(zip(("a", "b"), weights, strict=True))
    )
    for path, found in merged(model).items():
        w = base[path].astype("float64")
        sum_ = w + sum(
            k * (x[path].astype("float64") - w)
            for k, x in zip(weights, parts, strict=True)
        )
        assert_close(found, sum_, 1e-5, path)
    keras_svdtune.set_adapter(model, "b")
    assert_same(eager(model, hosts_data(FEW)), outputs["b"])


def test_a_sum_of_svf_by_its_formula():
    model, _ = two(SVF())
    deltas = {}
    for name in ("a", "b"):
        keras_svdtune.set_adapter(model, name)
        deltas[name] = {
            path: numpy(x.adapter.delta) for path, x in adapted(model).items()
        }
    keras_svdtune.set_adapter(model, {"a": 0.7, "b": np.float32(-0.5)})
    for path, target in adapted_targets(model).items():
        delta = 0.7 * deltas["a"][path].astype("float64")
        delta = delta - 0.5 * deltas["b"][path]
        expected = scaled(numpy(target.matrix()).astype("float64"), delta)
        assert_close(merged(model)[path], expected, 1e-5)


def test_a_sum_equals_that_of_the_files(tmp_path):
    model, _ = two(SVFT(off_diagonals=1))
    parts = {}
    for name, weight in (("a", 0.3), ("b", 0.6)):
        path = tmp_path / f"{name}.safetensors"
        keras_svdtune.save_adapter(model, path, name=name)
        parts[path] = weight
    keras_svdtune.set_adapter(model, {"a": 0.3, "b": 0.6})
    mixed = eager(model, X)
    keras_svdtune.load_adapter(model, keras_svdtune.compose(parts), name="both")
    assert_close(eager(model, X), mixed, 1e-6)
    # As an adapter it can be trained, and scaled.
    perturb(model)
    keras_svdtune.set_adapter(model, {"both": 0.5})


def test_a_scaled_one_alone():
    model, outputs = two(LoRAXS(rank=3))
    keras_svdtune.set_adapter(model, {"a": 0.5})
    keras_svdtune.set_adapter(model, {"a": 1})
    assert_same(eager(model, X), outputs["a"])
    keras_svdtune.set_adapter(model, {"a": 0.0})
    assert_same(eager(model, X), outputs[None])


@pytest.mark.parametrize(
    "method",
    [x for x in default_methods() if not x.linear],
    ids=method_id,
)
def test_what_is_not_linear_is_not_summed(method):
    model, outputs = two(method)
    for choice in ({"a": 0.5, "b": 0.5}, {"a": 0.5}):
        with pytest.raises(ValueError, match="not linear in what it trains"):
            keras_svdtune.set_adapter(model, choice)
    assert_same(eager(model, X), outputs["b"])
    keras_svdtune.set_adapter(model, {"a": 1.0})
    assert_same(eager(model, X), outputs["a"])


@pytest.mark.parametrize("choice", [None, {"a": 0.5, "b": 0.5}])
def test_what_is_trained_without_a_name_is_not_lost(choice, tmp_path):
    model, outputs = two(SVF())
    keras_svdtune.set_adapter(model, choice)
    perturb(model, 5)
    learned = eager(model, X)
    path = tmp_path / "c.safetensors"
    other = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, other, name="a")
    for call in (
        lambda: keras_svdtune.set_adapter(model, "a"),
        lambda: keras_svdtune.load_adapter(model, other, name="c"),
        lambda: keras_svdtune.enable_svf(model, name="c"),
    ):
        with pytest.raises(ValueError, match="would be lost"):
            call()
        assert_same(eager(model, X), learned)
    keras_svdtune.save_adapter(model, path)
    keras_svdtune.load_adapter(model, path, name="c")
    assert_same(eager(model, X), learned)
    keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), outputs["a"])
    keras_svdtune.set_adapter(model, "c")
    assert_same(eager(model, X), learned)


# What else belongs to an adapter.

WORDS = tokens(segments=True, batch=4)


def classifier():
    keras.utils.set_random_seed(0)
    task = keras_hub.models.BertTextClassifier(
        backbone=tiny_bert(num_layers=1), num_classes=2, preprocessor=None
    )
    task.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return task


def test_the_head_of_a_task_changes_with_the_adapter(tmp_path):
    """The programs before and after an enable round otherwise."""
    task = classifier()
    outputs = {None: predict(task, WORDS)}
    for name, labels in (("a", [0, 1, 0, 1]), ("b", [1, 0, 0, 1])):
        task.enable_svf(name=name)
        assert_close(predict(task, WORDS), outputs[None], 1e-6)
        task.fit(WORDS, np.array(labels), epochs=2, verbose=0)
        outputs[name] = predict(task, WORDS)
    heads = {}
    for name in ("a", None, "b", "a"):
        task.set_adapter(name)
        assert_close(predict(task, WORDS), outputs[name], 1e-6, str(name))
        heads[name] = numpy(task.output_dense.kernel)
    assert_differ(heads["a"], heads["b"])
    assert_differ(outputs["a"], outputs["b"])
    with pytest.raises(ValueError, match="'logits/kernel' besides"):
        task.set_adapter({"a": 0.5, "b": 0.5})
    # Without the task too.
    task.backbone.set_adapter("b")
    assert_close(predict(task, WORDS), outputs["b"], 1e-6)
    for name in ("a", "b"):
        task.save_adapter(tmp_path / f"{name}.safetensors", name=name)
    other = classifier()
    for name in ("a", "b"):
        other.load_adapter(tmp_path / f"{name}.safetensors", name=name)
        assert_close(predict(other, WORDS), outputs[name], 1e-6, name)
    other.set_adapter("a")
    assert_close(predict(other, WORDS), outputs["a"], 1e-6)
    other.remove_adapter()
    assert_close(predict(other, WORDS), outputs[None], 1e-6)


def test_without_the_head_they_add_up():
    task = classifier()
    for name in ("a", "b"):
        task.backbone.enable_svf(name=name)
        perturb(task)
    task.set_adapter({"a": 0.5, "b": 0.5})
    assert task.adapter_names() == ["a", "b"]


# What is refused, before anything changes.


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m, f: keras_svdtune.set_adapter(m, "pirat"),
            "no adapter 'pirat'. Did you mean 'pirate'",
        ),
        (lambda m, f: keras_svdtune.set_adapter(m, {}), "must be a name"),
        (lambda m, f: keras_svdtune.set_adapter(m, 3), "must be a name"),
        (
            lambda m, f: keras_svdtune.set_adapter(m, {"b": float("nan")}),
            "finite number. Received: nan for 'b'",
        ),
        (
            lambda m, f: keras_svdtune.enable_svf(m, name="b"),
            "has an adapter 'b' already",
        ),
        (lambda m, f: keras_svdtune.enable_svf(m), "already has an adapter"),
        (
            lambda m, f: keras_svdtune.enable_svf(m, name=""),
            "must be a string, not empty",
        ),
        (
            lambda m, f: keras_svdtune.enable_svft(m, name="c"),
            "one method with the same settings",
        ),
        (
            lambda m, f: keras_svdtune.enable_svf(m, ["first"], name="c"),
            "on the same layers.*differ in: 'small/second'",
        ),
        (lambda m, f: keras_svdtune.delete_adapter(m, "c"), "no adapter 'c'"),
        (
            lambda m, f: keras_svdtune.save_adapter(m, f, name="c"),
            "no adapter 'c'",
        ),
        (lambda m, f: keras_svdtune.to_lora(m, 2), "Only one can be replaced"),
        (
            lambda m, f: keras_svdtune.load_adapter(
                m, f.with_name("lora.safetensors"), name="c"
            ),
            "holds LoRA.* this model has SVF",
        ),
        (
            lambda m, f: keras_svdtune.load_adapter(
                m, f.with_name("first.safetensors"), name="c"
            ),
            "on 1 layers; this model has SVF.* on 2",
        ),
    ],
)
def test_what_is_refused(call, message, tmp_path):
    for name, method, layers in (
        ("lora", LoRA(rank=2), None),
        ("first", SVF(), ["first"]),
    ):
        other = small_model()
        keras_svdtune.enable_adapter(other, method, layers)
        keras_svdtune.save_adapter(other, tmp_path / f"{name}.safetensors")
    model, outputs = two(SVF())
    keras_svdtune.load_adapter(model, _saved(model, tmp_path), name="pirate")
    before = names_of(model)
    with pytest.raises(ValueError, match=message):
        call(model, tmp_path / "new.safetensors")
    assert_same(names_of(model), before)
    keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), outputs["a"])


def _saved(model, folder):
    keras_svdtune.save_adapter(model, folder / "saved.safetensors", name="a")
    return folder / "saved.safetensors"


def names_of(model):
    """All that there is of a model's adapters, stored or in variables."""
    record = record_of(model)
    stored = {
        name: {} if x is None else {**x.weights, "beside": x.beside}
        for name, x in record.names.items()
    }
    return {
        "names": list(record.names),
        "chosen": str(record.chosen),
        "stored": stored,
        "weights": [value for _, value in values(model)],
    }


def test_the_last_one_is_not_deleted():
    model, outputs = two(SVF())
    keras_svdtune.delete_adapter(model, "b")
    assert_same(eager(model, X), outputs[None])
    with pytest.raises(ValueError, match="the last adapter"):
        keras_svdtune.delete_adapter(model, "a")
    keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), outputs["a"])
    keras_svdtune.to_lora(model, 4)
    assert keras_svdtune.adapter_names(model) == ["a"]
    assert_close(eager(model, X), outputs["a"], 1e-5)


def test_not_while_disabled():
    model, outputs = two(SVF())
    with keras_svdtune.adapter_disabled(model):
        assert_same(eager(model, X), outputs[None])
        with pytest.raises(ValueError, match="adapter_disabled.* first"):
            keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), outputs["b"])
    keras_svdtune.set_adapter(model, "a")
    with keras_svdtune.adapter_disabled(model):
        assert_same(eager(model, X), outputs[None])
    assert_same(eager(model, X), outputs["a"])
    with keras_svdtune.adapter_merged(model):
        assert_close(eager(model, X), outputs["a"], 1e-5)
        with pytest.raises(ValueError, match="adapter_merged.* first"):
            keras_svdtune.set_adapter(model, "b")
    assert_same(eager(model, X), outputs["a"])


def test_a_declared_layer_has_no_name():
    model = keras.Sequential([keras.Input((6,)), keras_svdtune.SVFDense(4)])
    assert keras_svdtune.adapter_names(model) == []
    with pytest.raises(ValueError, match="declared"):
        keras_svdtune.set_adapter(model, None)
    with pytest.raises(ValueError, match="declared"):
        keras_svdtune.enable_svf(model, name="b")


def test_on_a_part_and_on_the_whole():
    inner, outputs = two(SVF())
    x = keras.Input((6,))
    outer = keras.Model(x, inner(x))
    keras_svdtune.set_adapter(outer, "a")
    assert_same(eager(inner, X), outputs["a"])
    assert keras_svdtune.adapter_names(outer) == ["a", "b"]
    keras_svdtune.delete_adapter(outer, "a")
    assert keras_svdtune.adapter_names(inner) == ["b"]


def test_another_base_is_noticed(tmp_path):
    model, _ = two(SVF())
    other = small_model()
    randomise(other, seed=7)
    path = tmp_path / "other.weights.h5"
    other.save_weights(path)
    model.load_weights(path)
    assert_same(eager(model, X), eager(other, X))
    with pytest.raises(ValueError, match="Another kernel was loaded"):
        keras_svdtune.set_adapter(model, "a")
    keras_svdtune.delete_adapter(model, "a")
    keras_svdtune.set_adapter(model, None)


# Banks, embeddings, quantized layers, half precision.


def other_kinds(kind):
    """A model, its input and targets."""
    layers = keras.layers
    if kind == "bank":
        x = keras.Input((5, 5, 4))
        y = layers.Conv2D(6, 2, groups=2)(x)
        model, data = keras.Model(x, y), (4, 5, 5, 4)
    elif kind == "embedding":
        x = keras.Input((4,), dtype="int32")
        model = keras.Model(x, layers.Embedding(7, 5, name="e")(x))
        randomise(model)
        return model, np.arange(12).reshape(3, 4) % 7, ["e"]
    else:
        dtype = "bfloat16" if kind == "bfloat16" else None
        x = keras.Input((6,))
        y = layers.Dense(4, dtype=dtype)(x)
        y = layers.Dense(5, dtype=dtype)(y)
        model, data = keras.Model(x, y), (4, 6)
    randomise(model)
    if kind == "int8":
        model.quantize("int8")
    return model, np.random.RandomState(0).normal(size=data), None


@pytest.mark.parametrize("kind", ["bank", "embedding", "bfloat16"])
@pytest.mark.parametrize(
    "method", [SVF(), LoRA(rank=2), PiSSA(rank=2)], ids=method_id
)
def test_other_layers(kind, method):
    check_other_layers(kind, method)


@pytest.mark.parametrize(
    "method",
    # LoRA-GA refuses it: there is no gradient of a quantized kernel.
    [x for x in default_methods() if x.name != "lora_ga"],
    ids=method_id,
)
def test_a_quantized_base(method):
    check_other_layers("int8", method)


def check_other_layers(kind, method):
    model, data, targets = other_kinds(kind)
    outputs = {None: eager(model, data)}
    for name in ("a", "b"):
        keras_svdtune.enable_adapter(model, method, targets, name=name)
        assert_same(eager(model, data), outputs[None])
        perturb(model, seed=ord(name))
        outputs[name] = eager(model, data)
    for name in ("a", None, "b"):
        keras_svdtune.set_adapter(model, name)
        assert_same(eager(model, data), outputs[name])
    keras_svdtune.remove_adapter(model)
    assert_same(eager(model, data), outputs[None])


@pytest.mark.parametrize(
    "method",
    [SVF(replace_kernel=True), PiSSA(rank=2, quantize="int8")],
    ids=["replaced", "quantized"],
)
def test_on_a_base_that_was_made_for_them(method, tmp_path):
    model = small_model()
    keras_svdtune.enable_adapter(model, method, name="a")
    outputs = {None: eager(model, X)}
    perturb(model, 1)
    outputs["a"] = eager(model, X)
    keras_svdtune.enable_adapter(model, method, name="b")
    assert_same(eager(model, X), outputs[None])
    perturb(model, 2)
    outputs["b"] = eager(model, X)
    rows = ["a", "b", None, "b", "a", None, "a", "b"]
    with keras_svdtune.adapter_per_example(model, rows):
        assert_close(eager(model, X), rows_of(outputs, rows), 1e-5)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path, name="a")
    for name in ("a", None, "b"):
        keras_svdtune.set_adapter(model, name)
        assert_same(eager(model, X), outputs[name])
    keras_svdtune.load_adapter(model, path, name="c")
    assert_same(eager(model, X), outputs["a"])


# One for each example.

KINDS = (*FEW, "einsum_output", "einsum_ellipsis", "conv_tall", "conv_wide")


def rows_of(outputs, rows):
    """What a model computes if row i of a batch is that of `rows[i]`."""
    if isinstance(outputs[None], dict):
        return {
            key: np.stack([outputs[x][key][i] for i, x in enumerate(rows)])
            for key in outputs[None]
        }
    return np.stack([outputs[x][i] for i, x in enumerate(rows)])


@every_method
def test_each_row_equals_its_adapter_alone(method):
    kinds = KINDS if method in default_methods() else FEW
    model, data = hosts_model(names=kinds), hosts_data(kinds)
    outputs = {None: predict(model, data)}
    for seed, name in enumerate("ab"):
        keras_svdtune.enable_adapter(model, method, name=name)
        perturb(model, seed + 1)
        outputs[name] = predict(model, data)
    everything = values(model), structure(model)
    rows = ["a", None, "b", "a"]
    with keras_svdtune.adapter_per_example(model, rows):
        expected = rows_of(outputs, rows)
        assert_close(eager(model, data), expected, 2e-6)
        assert_close(predict(model, data), expected, 2e-6)
    assert_same((values(model), structure(model)), everything)
    assert_same(predict(model, data), outputs["b"])
    rows = ["b", "b", "a", None]
    with keras_svdtune.adapter_per_example(model, rows):
        assert_close(predict(model, data), rows_of(outputs, rows), 2e-6)


def structure(model):
    """What `adapter_per_example` must give back."""
    layers = flat(model)
    return {
        "weights": [v.path for v in model.weights],
        "attributes": [" ".join(sorted(vars(x))) for x in layers],
        "within": str(open_blocks(model)),
    }


def test_sums_for_each_row():
    model, outputs = two(SVF())
    choices = [{"a": 0.5, "b": 0.5}, "a", {"b": -1.0}]
    alone = []
    for choice in choices:
        keras_svdtune.set_adapter(model, choice)
        alone.append(eager(model, X[:3]))
    perturb(model, 9)  # of no name; it stays
    learned = eager(model, X)
    with keras_svdtune.adapter_per_example(model, choices):
        expected = np.stack([x[i] for i, x in enumerate(alone)])
        assert_close(eager(model, X[:3]), expected, 2e-6)
    assert_same(eager(model, X), learned)


def test_frozen_weights_of_their_own():
    """PiSSA's files hold A₀ and B₀, which may be another machine's."""
    model, outputs = two(PiSSA(rank=2))
    for layer in adapted(model).values():
        layer.adapter.a0.assign(1.5 * numpy(layer.adapter.a0))
    outputs["b"] = eager(model, X)
    assert_differ(outputs["a"], outputs["b"])
    rows = ["a", "b", None, "b", "a", None, "a", "b"]
    with keras_svdtune.adapter_per_example(model, rows):
        assert_close(eager(model, X), rows_of(outputs, rows), 2e-6)
    keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), outputs["a"])


@pytest.mark.parametrize("kind", ["embedding", "int8", "bfloat16"])
@pytest.mark.parametrize(
    "method", [SVF(), LoRA(rank=2), PiSSA(rank=2)], ids=method_id
)
def test_each_row_in_other_layers(kind, method):
    model, data, targets = other_kinds(kind)
    outputs = {None: eager(model, data)}
    for name in ("a", "b"):
        keras_svdtune.enable_adapter(model, method, targets, name=name)
        perturb(model, seed=ord(name))
        outputs[name] = eager(model, data)
    rows = ["b", None, "a", "b"][: len(data)]
    # bfloat16 may round another sum to another neighbour.
    tolerance = 2e-2 if kind == "bfloat16" else 1e-5
    with keras_svdtune.adapter_per_example(model, rows):
        found = eager(model, data)
        assert_close(found, rows_of(outputs, rows), tolerance)
        if kind != "bfloat16":
            assert_differ(found, outputs["b"])


def causal_lm():
    lm = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(), preprocessor=None
    )
    lm.compile(sampler="greedy")
    return lm


@pytest.mark.parametrize("method", [SVF(), LoRA(rank=2)], ids=method_id)
def test_generate(method):
    """With the tied embedding too, whose head multiplies by Wᵀ."""
    lm, prompts = causal_lm(), tokens(batch=4, length=8)
    prompts["padding_mask"][:, 3:] = 0

    def answers():
        inputs = {k: v.copy() for k, v in prompts.items()}
        return lm.generate(inputs, stop_token_ids=None)["token_ids"]

    outputs = {None: answers()}
    for seed, name in enumerate("ab"):
        lm.backbone.enable_adapter(
            method, [".*(query|ffw_gating|token_embedding).*"], name=name
        )
        perturb(lm, seed, 1.0)
        outputs[name] = answers()
        assert not np.array_equal(outputs[name], outputs[None])
    rows = ["a", None, "b", "a"]
    with lm.adapter_per_example(rows):
        assert np.array_equal(answers(), rows_of(outputs, rows))
    assert np.array_equal(answers(), outputs["b"])


@pytest.mark.skipif(not compiles(), reason="torch compiles nothing")
def test_other_rows_compile_nothing_and_what_was_compiled_is_back():
    x = keras.Input((6,))
    counter = Counter()
    y = keras.layers.Dense(5)(keras.layers.Dense(4, "tanh")(counter(x)))
    model = keras.Model(x, y)
    randomise(model)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    for name in ("a", "b", "c"):
        keras_svdtune.enable_svf(model, name=name)
        perturb(model, ord(name))
    model.fit(X, Y, batch_size=8, verbose=0)
    outputs = {}
    for name in ("a", "b", "c", None):
        keras_svdtune.set_adapter(model, name)
        outputs[name] = predict(model, X)
    # TensorFlow's functions hold the variables that they were compiled for.
    again = 0 if keras.backend.backend() == "jax" else 1
    expected = None
    for seed in range(3):
        rows = random.Random(seed).choices(["a", "b", "c", None], k=8)
        before = counter.calls
        with keras_svdtune.adapter_per_example(model, rows):
            assert_close(predict(model, X), rows_of(outputs, rows), 2e-6)
            assert_close(predict(model, X), rows_of(outputs, rows), 2e-6)
        if expected is not None:
            assert counter.calls - before == again * expected
        expected = counter.calls - before if seed == 0 else expected
        assert expected > 0
        before = counter.calls
        assert_same(predict(model, X), outputs[None])
        keras_svdtune.set_adapter(model, "c")
        model.fit(X, Y, batch_size=8, verbose=0)
        outputs["c"] = predict(model, X)
        keras_svdtune.set_adapter(model, None)
        assert counter.calls == before


def test_a_batch_of_another_size_leaves_the_model_whole():
    model, outputs = two(SVF(), compiled=True)
    rows = ["a", "b", None, "a"]
    before = values(model)
    with keras_svdtune.adapter_per_example(model, rows):
        for call in (
            lambda: model.predict(X, verbose=0),  # 8 rows
            lambda: model.predict(X[:6], batch_size=4, verbose=0),
            lambda: model.evaluate(X, Y, verbose=0),
            lambda: model(X[:1]),
        ):
            with pytest.raises(Exception) as error:
                call()
            if keras.backend.backend() != "tensorflow":
                assert "was given 4 adapters" in str(error.value)
            assert_same([x for _, x in before], list_values(model))
        found = model.predict(X, batch_size=4, verbose=0)
        assert_close(found, rows_of(outputs, rows + rows), 2e-6)
        assert np.isfinite(model.evaluate(X, Y, batch_size=4, verbose=0))
    assert_same(values(model), before)
    model.fit(X, Y, verbose=0)


def list_values(model):
    ours = [v for v in model.weights if "of_each" not in v.path]
    return [numpy(v) for v in ours]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.fit(X, Y, verbose=0), "cannot be trained"),
        (lambda m: m.train_on_batch(X, Y), "cannot be trained"),
        (lambda m: keras_svdtune.set_adapter(m, "a"), "Leave the `with"),
        (lambda m: keras_svdtune.delete_adapter(m, "a"), "Leave the `with"),
        (lambda m: keras_svdtune.enable_svf(m, name="c"), "Leave the `with"),
        (lambda m: keras_svdtune.merge_adapter(m), "Leave the `with"),
        (lambda m: keras_svdtune.remove_adapter(m), "Leave the `with"),
        (lambda m: keras_svdtune.to_lora(m, 2), "Leave the `with"),
        (
            lambda m: keras_svdtune.adapter_disabled(m).__enter__(),
            "Leave the `with",
        ),
        (
            lambda m: keras_svdtune.adapter_merged(m).__enter__(),
            "Leave the `with",
        ),
        (
            lambda m: keras_svdtune.adapter_per_example(m, "ab").__enter__(),
            "Leave the `with",
        ),
        (lambda m: m.get_layer("first").kernel, "one for each example"),
    ],
)
def test_what_is_refused_within(call, message):
    model, outputs = two(SVF(), compiled=True)
    rows = ["a", None] * 4
    before = values(model)
    with keras_svdtune.adapter_per_example(model, rows):
        with pytest.raises(ValueError, match=message):
            call(model)
        assert_close(eager(model, X), rows_of(outputs, rows), 2e-6)
        assert keras_svdtune.adapter_names(model) == ["a", "b"]
    assert_same(values(model), before)
    assert_same(eager(model, X), outputs["b"])
    model.fit(X, Y, verbose=0)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("ab", "must be a list"),
        ([], "must be a list"),
        (["a", "c"], "no adapter 'c'"),
        (["a", 3], "must be a name"),
        (["a", {"a": 0.5}], "not linear"),
    ],
)
def test_rows_that_are_none(rows, message):
    model, outputs = two(LoRA(rank=2))
    before = structure(model)
    with (
        pytest.raises(ValueError, match=message),
        keras_svdtune.adapter_per_example(model, rows),
    ):
        pass
    assert_same(structure(model), before)
    assert_same(eager(model, X), outputs["b"])


def test_layers_that_know_no_examples():
    bank, data, _ = other_kinds("bank")
    keras_svdtune.enable_svf(bank, name="a")
    x = keras.Input((5, 6))
    time_first = keras.layers.EinsumDense("ibh,hnd->ibnd", (None, 2, 3, 2))
    for model in (bank, keras.Model(x, time_first(x))):
        if model is not bank:
            keras_svdtune.enable_svf(model, name="a")
        with (
            pytest.raises(ValueError, match="one merged kernel|first axis"),
            keras_svdtune.adapter_per_example(model, ["a"] * 4),
        ):
            pass


def test_a_head_is_not_one_for_each_row():
    task = classifier()
    for name, labels in (("a", [0, 1, 0, 1]), ("b", [1, 0, 0, 1])):
        task.enable_svf(name=name)
        task.fit(WORDS, np.array(labels), verbose=0)
    alone = predict(task, WORDS)
    with task.adapter_per_example(["b"] * 4):
        assert_close(predict(task, WORDS), alone, 2e-6)
    with (
        pytest.raises(ValueError, match="also trained 'logits/kernel'"),
        task.adapter_per_example(["b", "a", "b", "b"]),
    ):
        pass
    assert_same(predict(task, WORDS), alone)


def test_nothing_is_loaded_within(tmp_path):
    model = small_model()
    keras_svdtune.enable_svf(model)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path)
    perturb(model)
    before = values(model)
    for name in (None, "b"):
        with (
            pytest.raises(ValueError, match="Leave the `with"),
            keras_svdtune.adapter_per_example(model, ["default"]),
        ):
            keras_svdtune.load_adapter(model, path, name=name)
    assert_same(values(model), before)


def test_files_do_not_see_it(tmp_path):
    model, _ = two(SVF())
    for name in ("out", "in"):
        rows = ["a"] * 8 if name == "in" else None
        within = (
            keras_svdtune.adapter_per_example(model, rows)
            if rows
            else contextlib.nullcontext()
        )
        with within:
            keras_svdtune.save_adapter(model, tmp_path / f"{name}.safetensors")
            model.save_weights(tmp_path / f"{name}.weights.h5")
    for one, other in (
        (
            read_adapter(tmp_path / "out.safetensors").arrays,
            read_adapter(tmp_path / "in.safetensors").arrays,
        ),
        *(
            (x, y)
            for x, y in [
                [h5_values(tmp_path / f"{n}.weights.h5") for n in ("out", "in")]
            ]
        ),
    ):
        assert_same(other, one)


def h5_values(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, x: (
                found.setdefault(name, x[()])
                if isinstance(x, h5py.Dataset)
                else None
            )
        )
    assert found
    return found


@pytest.mark.parametrize("start", range(4))
def test_an_interrupt_leaves_no_trace(start):
    model, outputs = two(SVF())
    before = values(model), structure(model)
    rows = ["a", "b", None, "a", "b", None, "a", "b"]

    def run():
        with keras_svdtune.adapter_per_example(model, rows):
            pass

    with Raises(None) as counted:
        run()
    stopped = 0
    for number in range(1 + start * 3, len(counted.lines) + 1, 12):
        with contextlib.suppress(KeyboardInterrupt), Raises(number):
            run()
            stopped -= 1
        stopped += 1
        assert_same((values(model), structure(model)), before)
    assert stopped > 3
    assert_same(eager(model, X), outputs["b"])
    with keras_svdtune.adapter_per_example(model, rows):
        assert_close(eager(model, X), rows_of(outputs, rows), 2e-6)


# Interrupts.

CHANGES = {
    "set": lambda m, f: keras_svdtune.set_adapter(m, "a"),
    "sum": lambda m, f: keras_svdtune.set_adapter(m, {"a": 0.5, "b": 0.5}),
    "none": lambda m, f: keras_svdtune.set_adapter(m, None),
    "delete": lambda m, f: keras_svdtune.delete_adapter(m, "b"),
    "enable": lambda m, f: keras_svdtune.enable_svf(m, name="c"),
    "load": lambda m, f: keras_svdtune.load_adapter(m, f, name="c"),
    "save": lambda m, f: keras_svdtune.save_adapter(m, f, name="a"),
}


@pytest.mark.parametrize("verb", CHANGES)
def test_an_interrupt_at_any_line(verb, tmp_path):
    change = CHANGES[verb]
    path = tmp_path / "a.safetensors"
    model, _ = two(SVF())
    keras_svdtune.save_adapter(model, path, name="a")
    with Raises(None) as counted:
        change(two(SVF())[0], path)
    kept = 0
    model, _ = two(SVF())
    before = names_of(model)
    for number in range(1, len(counted.lines) + 1, 11):
        try:
            with Raises(number):
                change(model, path)
        except KeyboardInterrupt:
            pass
        try:
            assert_same(names_of(model), before)
            kept += 1
        except AssertionError:
            # It was over already; then all of it is done.
            again, _ = two(SVF())
            change(again, path)
            assert_same(names_of(model), names_of(again))
            model, _ = two(SVF())
    assert kept > 3, "hardly anything was interrupted"


# Programs.


class Program:
    """Random calls on a model, beside a record in NumPy of what they do."""

    def __init__(self, method, seed, folder):
        self.random = random.Random(seed)
        self.numbers = np.random.RandomState(seed)
        self.method, self.folder = method, folder
        self.model = small_model()
        self.base = {}
        self.names, self.files = {}, {}
        self.chosen, self.live, self.trained = {}, {}, False
        self.add()

    def add(self):
        name = f"n{len(self.names)}{self.random.randrange(9)}"
        if name in self.names or (self.trained and not self.single):
            return
        keras_svdtune.enable_adapter(self.model, self.method, name=name)
        self.keep(name, self.values())
        for target in adapted_targets(self.model).values():
            self.base[target.path] = numpy(target.matrix()).astype("f8")

    def values(self):
        return {
            path: {
                k.partition("_")[2]: numpy(v)
                for k, v in target.adapted.variables_by_name(True).items()
            }
            for path, target in adapted_targets(self.model).items()
        }

    def keep(self, name, found):
        self.names[name] = found
        self.chosen, self.live, self.trained = {name: 1.0}, found, False

    @property
    def single(self):
        return list(self.chosen.values()) == [1.0]

    def choose(self):
        kind = self.random.choice(["one", "none", "sum"])
        names = list(self.names)
        if kind == "sum" and self.method.linear:
            some = self.random.sample(names, min(len(names), 2))
            choice = {x: self.random.choice([0.5, -1.0, 0.25]) for x in some}
        elif kind == "none":
            choice = None
        else:
            choice = self.random.choice(names)
        if self.trained and not self.single:
            with pytest.raises(ValueError, match="would be lost"):
                keras_svdtune.set_adapter(self.model, choice)
            path = self.folder / "x.safetensors"
            keras_svdtune.save_adapter(self.model, path)
        keras_svdtune.set_adapter(self.model, choice)
        chosen = {choice: 1.0} if isinstance(choice, str) else choice or {}
        self.chosen, self.trained = chosen, False
        if self.single:
            self.live = self.names[choice]
            return
        self.live = {
            path: {
                name: sum(
                    (k * self.names[x][path][name] for x, k in chosen.items()),
                    np.zeros_like(value),
                )
                for name, value in weights.items()
            }
            for path, weights in self.live.items()
        }

    def train(self):
        for path, target in adapted_targets(self.model).items():
            weights = target.adapted.weights_by_name(trainable=True)
            self.live = dict(self.live)
            self.live[path] = {}
            for name, variable in weights.items():
                step = 0.3 * self.numbers.normal(size=variable.shape)
                variable.assign(numpy(variable) + step)
                self.live[path][name.partition("_")[2]] = numpy(variable)
        self.trained = True
        if self.single:
            self.names[next(iter(self.chosen))] = self.live

    def delete(self):
        name = self.random.choice(list(self.names))
        if len(self.names) == 1 or (self.trained and not self.single):
            return
        keras_svdtune.delete_adapter(self.model, name)
        del self.names[name]
        if name in self.chosen:
            self.chosen, self.trained = {}, False
            self.live = {
                path: {k: 0.0 * v for k, v in weights.items()}
                for path, weights in self.live.items()
            }

    def save(self):
        name = self.random.choice(list(self.names))
        path = self.folder / f"{len(self.files)}.safetensors"
        keras_svdtune.save_adapter(self.model, path, name=name)
        self.files[path] = self.names[name]

    def load(self):
        if not self.files or (self.trained and not self.single):
            return
        path = self.random.choice(list(self.files))
        name = self.random.choice([*self.names, f"f{len(self.files)}"])
        keras_svdtune.load_adapter(self.model, path, name=name)
        self.keep(name, self.files[path])

    def check(self):
        assert keras_svdtune.adapter_names(self.model) == list(self.names)
        for path, found in merged(self.model).items():
            w, weights = self.base[path], self.live[path]
            if self.method == SVF():
                expected = scaled(w, weights["delta"].astype("f8"))
            else:
                expected = w + weights["a"].astype("f8") @ weights["b"]
            assert_close(found, expected, 1e-5)

    def run(self, steps):
        self.check()
        calls = [self.add, self.choose, self.choose, self.train]
        calls += [self.delete, self.save, self.load]
        for _ in range(steps):
            self.random.choice(calls)()
            self.check()


@pytest.mark.parametrize("method", [SVF(), LoRA(rank=2)], ids=method_id)
def test_random_programs(method, tmp_path):
    for seed in range(100):
        Program(method, seed, tmp_path).run(12)
