"""AdaLoRA through `fit`: ranks move, the budget is exact, the penalty counts.

That ranks never change and that the penalty is skipped in silence is what
users of other implementations complain of.
"""

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_same,
    numpy,
    predict,
    randomise,
    small_data,
    small_model,
    trainables,
)

import keras_svdtune
from keras_svdtune import SVF, AdaLoRA, RankAllocator

RANK, FIRST_RANK, WIDTH = 2, 3, 6


def two_paths():
    """y = x·A + 0.01·x·B: what A learns matters, what B learns hardly."""
    x = keras.Input((WIDTH,))
    matters = keras.layers.Dense(WIDTH, name="matters")(x)
    hardly = keras.layers.Dense(WIDTH, name="hardly")(x)
    hardly = keras.layers.Rescaling(0.01)(hardly)
    model = keras.Model(x, keras.layers.Add()([matters, hardly]))
    randomise(model)
    return model


def data(rows=64):
    """A target that takes a change of full rank."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, WIDTH)).astype("float32")
    return x, (x @ rng.standard_normal((WIDTH, WIDTH))).astype("float32")


def train(model, callback, epochs=10, batch_size=8, **settings):
    """`fit` with a callback; 8 steps an epoch."""
    model.compile(keras.optimizers.Adam(0.02), "mse", **settings)
    x, y = data()
    return model.fit(
        x, y, batch_size, epochs, verbose=0, callbacks=[callback]
    ).history


def masks(model):
    return {
        x.name: numpy(x.adapter.mask).astype(int)
        for x in adapted(model).values()
    }


class Watch(keras.callbacks.Callback):
    """How many triplets have a part in the output after each step."""

    def __init__(self):
        super().__init__()
        self.alive = []

    def on_train_batch_end(self, batch, logs=None):
        self.alive.append(
            sum(
                np.count_nonzero(
                    numpy(x.adapter.singular_values) * numpy(x.adapter.mask)
                )
                for x in adapted(self.model).values()
            )
        )


def test_ranks_move_to_where_they_matter_and_stay(capsys, tmp_path):
    """Within the budget exactly, and in the file too."""
    model = two_paths()
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK))
    start = {n: m.sum() for n, m in masks(model).items()}
    assert start == {"matters": FIRST_RANK, "hardly": FIRST_RANK}
    history = train(model, RankAllocator(interval=1))
    fixed = masks(model)
    ranks = {n: m.sum() for n, m in fixed.items()}
    assert sum(ranks.values()) == 2 * RANK
    assert ranks["matters"] == FIRST_RANK > ranks["hardly"]
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    keras_svdtune.adapter_summary(model)
    shown = capsys.readouterr().out
    for name, rank in ranks.items():
        (line,) = [x for x in shown.splitlines() if name in x]
        assert line.split("│")[4].split() == [str(rank)], line

    train(model, keras.callbacks.Callback(), epochs=2)
    assert_same(masks(model), fixed)
    x, _ = data()
    before = predict(model, x)
    keras_svdtune.save_adapter(model, tmp_path / "a.safetensors")
    again = two_paths()
    keras_svdtune.load_adapter(again, tmp_path / "a.safetensors")
    assert_same(masks(again), fixed)
    assert_same(predict(again, x), before)
    # What is masked has no part in the output, whatever λ says.
    for layer in adapted(model).values():
        values = numpy(layer.adapter.singular_values)
        layer.adapter.singular_values.assign(
            np.where(fixed[layer.name], values, 7.0)
        )
    assert_same(predict(model, x), before)


def test_the_budget_falls_by_the_cubic_schedule():
    model = two_paths()
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK))
    watch = Watch()
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x, y = data()
    allocator = RankAllocator(warmup=0.25, settle=0.25, interval=1)
    history = model.fit(
        x, y, 8, 5, verbose=0, callbacks=[allocator, watch]
    ).history  # 40 steps
    step = np.arange(1, 41)
    progress = np.clip((step - 10) / (30 - 10), 0.0, 1.0)
    start, end = 2 * FIRST_RANK, 2 * RANK
    # Cut to an integer, as by the authors and PEFT.
    expected = np.trunc(end + (start - end) * (1 - progress) ** 3)
    np.testing.assert_array_equal(watch.alive, expected)
    means = history["mean_rank"]
    assert means == sorted(means, reverse=True)
    np.testing.assert_allclose(means, expected[7::8] / 2)


def test_a_fit_that_stops_early_ends_within_its_budget():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    model = two_paths()
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x, y = data()
    model.fit(x, y, 8, 5, verbose=0, callbacks=[RankAllocator(), Stop()])
    assert sum(m.sum() for m in masks(model).values()) == 2 * RANK


def penalty_by_numpy(model, regularization):
    terms = []
    for layer in adapted(model).values():
        p = numpy(layer.adapter.p).astype("float64")
        q = numpy(layer.adapter.q).astype("float64")
        identity = np.eye(p.shape[1])
        terms += [
            np.linalg.norm(p.T @ p - identity),
            np.linalg.norm(q @ q.T - identity),
        ]
    return regularization * np.mean(terms)


def test_the_penalty_is_in_the_loss_and_makes_p_and_q_orthonormal():
    far = []
    for regularization in (0.0, 1.0):
        model = two_paths()
        method = AdaLoRA(RANK, regularization=regularization)
        keras_svdtune.enable_adapter(model, method)
        history = train(model, RankAllocator(), epochs=20)
        x, y = data()
        expected = penalty_by_numpy(model, regularization)
        error = np.mean((predict(model, x).astype("float64") - y) ** 2)
        loss = model.evaluate(x, y, batch_size=len(x), verbose=0)
        assert_close(np.array(loss), error + expected, 1e-5)
        assert_close(np.array(history["orthogonality"][-1]), expected, 1e-5)
        far.append(penalty_by_numpy(model, 1.0))
    assert far[1] < 0.1 * far[0]


def test_the_penalty_of_what_is_orthonormal_has_no_gradient():
    """There the norm is 0, and its root has none."""
    model = two_paths()
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK))
    for layer in adapted(model).values():
        layer.adapter.p.assign(np.eye(WIDTH, FIRST_RANK))
        layer.adapter.q.assign(np.eye(FIRST_RANK, WIDTH))
        assert all(float(numpy(x)) == 0.0 for x in layer.adapter.losses)
    train(model, RankAllocator(), epochs=1)
    for layer in adapted(model).values():
        for name in ("p", "singular_values", "q"):
            assert np.isfinite(numpy(getattr(layer.adapter, name))).all()


def test_small_layers_count_with_what_they_have():
    """The budget is that of the ranks that fit, at first and at the end."""
    x = keras.Input((WIDTH,))
    hidden = keras.layers.Dense(WIDTH, name="hidden")(x)
    model = keras.Model(x, keras.layers.Dense(2, name="head")(hidden))
    randomise(model)
    keras_svdtune.enable_adapter(model, AdaLoRA(4))
    assert {n: m.sum() for n, m in masks(model).items()} == {
        "hidden": 6,
        "head": 2,
    }
    allocator, watch = RankAllocator(interval=1), Watch()
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x, y = data()
    model.fit(x, y[:, :2], 8, 5, verbose=0, callbacks=[allocator, watch])
    assert watch.alive[0] == 6 + 2
    assert sum(m.sum() for m in masks(model).values()) == 4 + 2


def test_optimizers_that_would_spoil_the_importance():
    """The error comes before the first step; it says what to do."""
    on_tensorflow = keras.backend.backend() == "tensorflow"
    refused = [
        ({"gradient_accumulation_steps": 4}, "larger batch.*steps=4"),
        (
            {"use_ema": True, "ema_overwrite_frequency": 3},
            "on TensorFlow" if on_tensorflow else "frequency=3",
        ),
    ]
    for settings, message in refused:
        optimizer = keras.optimizers.SGD(0.1, **settings)
        wrapped = keras.optimizers.LossScaleOptimizer(optimizer)
        for each in (optimizer, wrapped):
            model = two_paths()
            keras_svdtune.enable_adapter(model, AdaLoRA(RANK))
            before = {k: x.copy() for k, x in trainables(model).items()}
            model.compile(each, "mse")
            with pytest.raises(ValueError, match=message):
                model.fit(*data(), 8, verbose=0, callbacks=[RankAllocator()])
            after = {k: x.copy() for k, x in trainables(model).items()}
            assert_same(after, before)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="Keras cannot do it there"
)
def test_averaged_weights_keep_to_the_budget():
    found = []
    for use_ema in (False, True):
        keras.utils.set_random_seed(0)
        model = two_paths()
        keras_svdtune.enable_adapter(model, AdaLoRA(RANK))
        model.compile(keras.optimizers.Adam(0.02, use_ema=use_ema), "mse")
        x, y = data()
        callbacks = [RankAllocator(interval=1)]
        model.fit(x, y, 8, 5, False, callbacks=callbacks, shuffle=False)
        found.append(masks(model))
    assert_same(found[1], found[0])
    assert sum(m.sum() for m in found[1].values()) == 2 * RANK


def test_importance_is_the_published_recursion():
    """With SGD the gradient of each step is the step itself."""
    rate, beta = 2e-4, 0.85
    model = small_model()
    method = AdaLoRA(RANK, regularization=0.0, smoothing=beta)
    keras_svdtune.enable_adapter(model, method)
    for layer in adapted(model).values():  # or P and Q have no gradient
        layer.adapter.singular_values.assign(np.ones(FIRST_RANK))
    model.compile(keras.optimizers.SGD(rate), "mse")
    names = ("p", "singular_values", "q")
    # A variable is a part of its weight, which so moves step² times as far.
    steps = {w.name: w.step for w in method.weights((WIDTH, WIDTH))}
    mean = {}
    spread = {}
    x, y = small_data()
    for _ in range(4):
        before = read(model, names)
        model.fit(x, y, batch_size=len(x), verbose=0)
        after = read(model, names)
        for key, w in before.items():
            step = steps[key[1]]
            now = np.abs(w * (w - after[key]) / (rate * step**2))
            mean[key] = beta * mean.get(key, 0.0) + (1 - beta) * now
            spread[key] = beta * spread.get(key, 0.0) + (1 - beta) * np.abs(
                now - mean[key]
            )
    for path, layer in adapted(model).items():
        score = {n: mean[path, n] * spread[path, n] for n in names}
        expected = (
            score["p"].mean(axis=0)
            + score["singular_values"]
            + score["q"].mean(axis=1)
        )
        assert np.all(expected > 0)
        found = method.importance(layer.adapter)
        assert_close(found, expected, 1e-3, path)


def read(model, names):
    return {
        (path, n): numpy(getattr(layer.adapter, n)).astype("float64")
        for path, layer in adapted(model).items()
        for n in names
    }


def test_clear_errors():
    with pytest.raises(ValueError, match=r"Received: 0\.5 and 0\.5"):
        RankAllocator(warmup=0.5, settle=0.5)
    for name, wrong in (
        ("warmup", (-0.1, 1.0, float("nan"), True, "0.1", None)),
        ("settle", (-0.1, 1.0, float("nan"), True, "0.1", None)),
        ("interval", (0, 2.5, True, None, float("nan"))),
        ("total_steps", (0, 2.5, True, "8")),
    ):
        for value in wrong:
            with pytest.raises(ValueError, match=f"`{name}` must be"):
                RankAllocator(**{name: value})
    model = two_paths()
    with pytest.raises(ValueError, match="has no adapter"):
        train(model, RankAllocator())
    keras_svdtune.enable_adapter(model, SVF())
    with pytest.raises(ValueError, match=r"for AdaLoRA.*SVF\(\)"):
        train(model, RankAllocator())
    keras_svdtune.remove_adapter(model)
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK))

    def endless():
        x, y = data()
        while True:
            yield x[:8], y[:8]

    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="total_steps"):
        model.fit(endless(), verbose=0, callbacks=[RankAllocator()])


def test_a_layer_called_twice_in_a_step():
    """Its averages converge to the sum of both calls, as those of one do."""
    layer = keras.layers.Dense(WIDTH, name="twice")
    x = keras.Input((WIDTH,))
    model = keras.Model(x, layer(x) + layer(keras.ops.tanh(x)))
    randomise(model)
    method = AdaLoRA(RANK, initial_rank=FIRST_RANK)
    keras_svdtune.enable_adapter(model, method)
    adapter = layer.adapter
    adapter.singular_values.assign(np.full(FIRST_RANK, 0.5))
    model.compile(keras.optimizers.SGD(0.0), "mse")  # the same every step
    x, y = data(8)

    def averages(steps):
        model.fit(x, y, 8, steps, verbose=0)
        return [
            numpy(getattr(adapter, f"{name}_sensitivity"))
            for name in ("p", "singular_values", "q")
        ]

    first, later = averages(1), averages(39)
    grown = (1 - method.smoothing**40) / (1 - method.smoothing)
    for a, b in zip(first, later, strict=True):
        assert np.all(a > 0)
        assert_close(b, grown * a, 1e-4)
    assert_same(numpy(adapter.calls), np.full(1, 2.0, "float32"))


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras has no steps_per_execution there",
)
@pytest.mark.parametrize("together", [1, 4])
def test_several_steps_in_one_call(together):
    model = two_paths()
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK, FIRST_RANK))
    allocator = RankAllocator(interval=1)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(
            (allocator._step, allocator._budget)
        )
    )
    model.compile("sgd", "mse", steps_per_execution=together)
    x, y = data()
    model.fit(x, y, 2, 1, verbose=0, callbacks=[allocator, look])
    assert [step for step, _ in seen] == list(range(together, 33, together))
    # Before the last third it is what it will be, so training can settle.
    assert seen[-8 // together][1] == RANK * 2 == allocator._budget


def test_data_of_unknown_length():
    model = two_paths()
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK, FIRST_RANK))
    model.compile("sgd", "mse")
    x, y = data(16)

    def batches():
        for i in range(0, 16, 4):
            yield x[i : i + 4], y[i : i + 4]

    allocator = RankAllocator(interval=1, total_steps=4)
    model.fit(batches(), verbose=0, callbacks=[allocator])
    assert allocator._step == 4 and allocator._fixed
    assert sum(m.sum() for m in masks(model).values()) == RANK * 2


def test_restored_weights_of_an_earlier_epoch_keep_to_the_budget():
    model = two_paths()
    keras_svdtune.enable_adapter(model, AdaLoRA(RANK, FIRST_RANK))
    first = keras.callbacks.EarlyStopping(
        monitor="step", mode="min", patience=99, restore_best_weights=True
    )
    count = iter(range(100))
    step = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(step=float(next(count)))
    )
    model.compile(keras.optimizers.Adam(0.02), "mse")
    callbacks = [step, first, RankAllocator(interval=1)]
    model.fit(*data(), 8, 5, verbose=0, callbacks=callbacks)
    assert first.best_epoch == 0
    assert sum(m.sum() for m in masks(model).values()) == RANK * 2
