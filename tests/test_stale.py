"""What was compiled before an adapter came or went must not run after.

On TensorFlow an old `fit` would train detached weights in silence; on JAX it
would lose them all.
"""

import gc
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_differ,
    assert_same,
    numpy,
    perturb,
    predict,
    small_data,
    small_model,
    tiny_bert,
    tiny_gemma,
    tokens,
    trainables,
    values,
)

import keras_svdtune

X, Y = small_data()


def fit(model, x=X, y=Y, epochs=4):
    history = model.fit(x, y, epochs=epochs, batch_size=8, verbose=0)
    losses = history.history["loss"]
    assert np.all(np.isfinite(losses))
    return losses


def assert_alive(model):
    """No variable is lost: each still has a value, and finite."""
    for path, value in values(model):
        assert np.all(np.isfinite(value)), path


def test_all_runs_anew_after_an_enable():
    model = small_model()
    optimizer = keras.optimizers.Adam(0.01, clipnorm=1.0)
    model.compile(optimizer, "mse", metrics=["mae"])
    fit(model)
    base, settings = values(model), model.optimizer.get_config()
    outputs, measured = predict(model, X), model.evaluate(X, Y, verbose=0)
    keras_svdtune.enable_svf(model)
    assert model.optimizer.get_config() == settings
    assert_same(predict(model, X), outputs)
    assert model.evaluate(X, Y, verbose=0) == measured
    before = trainables(model)
    losses = fit(model)
    assert losses[-1] < losses[0]
    assert_alive(model)
    for path, value in trainables(model).items():
        assert not np.array_equal(value, before[path]), path
    now = dict(values(model))
    for path, value in base:
        assert_same(now[path], value, path)
    # What was trained is what is computed.
    (loss, _) = model.evaluate(X, Y, verbose=0)
    assert loss < losses[0]
    perturb(model)
    assert_differ(predict(model, X), outputs)
    assert abs(model.evaluate(X, Y, verbose=0)[0] - loss) > 1e-3


@pytest.mark.parametrize("end", ["merge_adapter", "remove_adapter"])
def test_fit_after_the_adapter_is_gone(end):
    model = small_model()
    model.compile(keras.optimizers.SGD(2e-3, momentum=0.9), "mse")
    base = predict(model, X)
    keras_svdtune.enable_svf(model)
    fit(model)
    learned = predict(model, X)
    getattr(keras_svdtune, end)(model)
    start, outputs = values(model), predict(model, X)
    if end == "merge_adapter":
        np.testing.assert_allclose(outputs, learned, atol=1e-5)
    else:
        assert_same(outputs, base)
    losses = fit(model)
    assert losses[-1] < losses[0]
    assert_alive(model)
    now = dict(values(model))
    for path, value in start:  # all of it trains again
        assert not np.array_equal(now[path], value), path
    # And another method after the first.
    outputs = predict(model, X)
    keras_svdtune.enable_pissa(model, 2)
    assert_same(predict(model, X), outputs)
    assert len(model.trainable_weights) == 4
    losses = fit(model)
    assert losses[-1] < losses[0]


def test_a_model_around_the_adapted_one():
    """The outer model does not know that a part of it was adapted."""
    inner = small_model()
    x = keras.Input((6,))
    outer = keras.Model(x, keras.layers.Dense(5, name="head")(inner(x)))
    outer.compile(keras.optimizers.Adam(0.01), "mse")
    fit(outer)
    base = predict(outer, X)
    keras_svdtune.enable_svf(inner)
    assert_same(predict(outer, X), base)
    head = numpy(outer.get_layer("head").kernel)
    before = trainables(inner)
    losses = fit(outer)
    assert losses[-1] < losses[0]
    assert_alive(outer)
    for path, value in trainables(inner).items():
        assert not np.array_equal(value, before[path]), path
    # The head is not part of what was enabled, and trains on.
    assert not np.array_equal(numpy(outer.get_layer("head").kernel), head)


def causal_lm():
    task = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(num_layers=1), preprocessor=None
    )
    task.compile(
        optimizer=keras.optimizers.SGD(0.5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    return task


def test_a_model_whose_constructor_raised_does_no_harm():
    half_made = []

    class Fails(keras.Model):
        def __init__(self):
            half_made.append(self)
            raise RuntimeError("before Layer's constructor")

    with pytest.raises(RuntimeError, match="before Layer's"):
        Fails()
    model = small_model()
    keras_svdtune.enable_adapter(model, keras_svdtune.SVF())
    assert half_made and adapted(model)


def test_task_fit_enable_fit_generate():
    task = causal_lm()
    x = tokens(batch=4)
    y = np.roll(x["token_ids"], -1, axis=1)
    prompt = tokens(batch=1, length=8)
    # Half of it prompt, half of it padding to generate into.
    prompt["padding_mask"][:, 4:] = 0

    def generate():
        found = task.generate(
            {k: v.copy() for k, v in prompt.items()}, stop_token_ids=None
        )
        return np.array(found["token_ids"])

    def fit_task(epochs):
        history = task.fit(x, y, epochs=epochs, batch_size=4, verbose=0)
        return history.history["loss"]

    fit_task(1)
    base, base_text = values(task.backbone), generate()
    base_outputs = predict(task, x)
    task.backbone.enable_svf()
    assert_same(generate(), base_text)
    assert_same(predict(task, x), base_outputs)
    before = trainables(task)
    losses = fit_task(8)
    assert losses[-1] < losses[0]
    assert_alive(task)
    assert len(adapted(task)) == 7
    for path, value in trainables(task).items():
        assert not np.array_equal(value, before[path]), path
    now = dict(values(task.backbone))
    for path, value in base:
        assert_same(now[path], value, path)

    # `generate` runs with the adapter, not a program from before it.
    perturb(task, size=2.0)
    changed = generate()
    assert not np.array_equal(changed, base_text)
    with task.adapter_disabled():
        assert_same(generate(), base_text)
    assert_same(generate(), changed)
    task.remove_adapter()
    assert_same(generate(), base_text)
    assert_same(values(task.backbone), base)


def test_classifier():
    task = keras_hub.models.BertTextClassifier(
        backbone=tiny_bert(num_layers=1), num_classes=2, preprocessor=None
    )
    task.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = tokens(segments=True, batch=4), np.array([0, 1, 0, 1])
    task.fit(x, y, batch_size=4, verbose=0)
    task.backbone.enable_svf()
    before = trainables(task)
    head = task.get_layer("logits")
    kernel = numpy(head.kernel)
    task.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert_alive(task)
    assert any(
        not np.array_equal(v, before[k]) for k, v in trainables(task).items()
    )
    # A new head must learn with the adapter: it belongs to the Task.
    assert not np.array_equal(numpy(head.kernel), kernel)


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A user's own, without a config, as many are."""

    def __call__(self, step):
        return 0.01


class Warm(keras.optimizers.Adam):
    """A user's own, with a setting and a variable that no config has."""

    def __init__(self, rate, warmup):
        super().__init__(rate)
        self.warmup = warmup
        self.seen = self.add_variable((), "ones", name="seen")


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_optimizer_stays_the_same_object(wrapped):
    model = small_model()
    own = optimizer = Warm(0.01, warmup=500)
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(own)
    model.compile(optimizer, "mse")
    ends = (keras_svdtune.merge_adapter, keras_svdtune.remove_adapter)
    for end in ends:
        fit(model)
        keras_svdtune.enable_svf(model)
        assert model.optimizer is optimizer
        assert int(own.iterations) == 0
        # Rate, counter, `seen`: its moments of the base are gone.
        assert len(own.variables) == 3
        fit(model)
        assert len(own.variables) == 3 + 2 * len(model.trainable_variables)
        assert_alive(model)
        end(model)
        fit(model)
        assert len(own.variables) == 3 + 2 * len(model.trainable_variables)
    assert own.warmup == 500
    assert float(own.seen) == 1.0
    own.learning_rate = 0.5
    assert float(model.optimizer.learning_rate if not wrapped else 0.5) == 0.5


def test_a_schedule_without_a_config_is_kept():
    model = small_model()
    schedule = Schedule()
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, "mse")
    for change in (keras_svdtune.enable_svf, keras_svdtune.merge_adapter):
        fit(model)
        change(model)
        assert model.optimizer is optimizer
        assert optimizer._learning_rate is schedule
        assert optimizer._exclude_from_weight_decay_pattern.pattern == "bias"
        fit(model)
        assert_alive(model)


def test_an_adapted_model_is_freed_with_its_last_reference():
    model = small_model()
    keras_svdtune.enable_svf(model)
    model(X)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
