"""Dropout of what a branch sees of x: where it is, and where it is not.

The oracle is float64 NumPy with the mask that Keras draws of the same seed.
"""

import contextlib

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_differ,
    assert_same,
    compiles,
    eager,
    flat,
    gradients,
    hosts_data,
    hosts_model,
    method_id,
    must_stay,
    numpy,
    perturb,
    predict,
    program,
    small_data,
    small_model,
    tiny_gemma,
    tokens,
    trainables,
    values,
)
from keras import ops
from test_methods_oracle import (
    ORACLES,
    central_differences,
    inner,
    matrix_of,
    output_of,
    weights_of,
)

import keras_svdtune
from keras_svdtune import SVF, AdaLoRA, DoRA, LoRA, MiCA, MiLoRA, PiSSA
from keras_svdtune.methods.dropout import DropsInput

RATE = 0.4
WITH = [
    cls for cls in keras_svdtune.METHODS.values() if issubclass(cls, DropsInput)
]
METHODS = [
    *(cls(3, dropout=RATE) for cls in WITH),
    *(cls(3, alpha=6.0, dropout=RATE) for cls in (DoRA, MiLoRA)),
]
NAMES = ("dense_wide", "einsum_query")
X, Y = small_data()
every_method = pytest.mark.parametrize("method", METHODS, ids=method_id)
one_of_each = pytest.mark.parametrize(
    "method", METHODS[: len(WITH)], ids=method_id
)


def without(method):
    settings = {k: v for k, v in method.settings().items() if k != "dropout"}
    return type(method)(**settings)


def rng_of_torch():
    """What torch draws within is drawn again after: it has one seed for all."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.random.fork_rng()


def next_mask(layer, shape):
    """The mask, over 1 - dropout, that the layer draws next."""
    seeds = keras.random.SeedGenerator()
    seeds.state.assign(layer.adapter.seeds.state.value)
    with rng_of_torch():
        drawn = keras.random.dropout(ops.ones(shape), RATE, seed=seeds)
    return numpy(drawn).astype("float64")


def in_training(layer, x):
    """A function that computes what the layer does in training, with the same
    mask each time."""

    def forward():
        state = layer.adapter.seeds.state
        before = ops.copy(state.value)
        with rng_of_torch():
            y = layer(x, training=True)
        state.assign(before)
        return y

    return forward


def seeds_of(model):
    return [v for v in model.variables if "seed" in v.path]


def test_which_methods_have_it():
    assert {LoRA, DoRA, MiLoRA, AdaLoRA, MiCA} == set(WITH)


# What a layer computes.


@pytest.fixture(scope="module")
def hosts():
    keras.backend.clear_session(free_memory=False)
    return hosts_model(names=NAMES)


@every_method
def test_equation(method, hosts):
    """Outputs and gradients in training, with the mask that was drawn."""
    keras_svdtune.enable_adapter(hosts, method)
    try:
        starts = {x.name: weights_of(x) for x in adapted(hosts).values()}
        perturb(hosts)
        for name, x in zip(NAMES, hosts_data(NAMES), strict=True):
            _compare(name, hosts.get_layer(name), starts[name], x)
    finally:
        keras_svdtune.remove_adapter(hosts)


def _compare(name, layer, start, x):
    method = layer.adapter.method
    kernel = numpy(layer._kernel).astype("float64")
    w = matrix_of(name, kernel)
    bias = numpy(layer.bias).astype("float64")
    zero = np.zeros_like(bias)
    oracle = ORACLES[method.name](w, method, start)
    mask = next_mask(layer, x.shape)
    np.testing.assert_allclose(np.unique(mask), [0.0, 1 / (1 - RATE)])
    whole, part = x.astype("float64"), x * mask
    trained = weights_of(layer, trainable=True)

    def expected(t):
        if method.name == "dora":
            # (x·W + k·x̃·A·B)·g, the norms held constant.
            merged, k = oracle(t, at=trained), method.scale
            directions = w + k * t["a"] @ t["b"]
            y = output_of(name, whole, w, zero)
            y = y + output_of(name, part, k * t["a"] @ t["b"], zero)
            g = (merged / directions)[0].reshape(bias.shape)
            return y * g + bias
        y = output_of(name, whole, w, bias)
        return y + output_of(name, part, oracle(t) - w, zero)

    forward = in_training(layer, x)
    variables = {k: getattr(layer.adapter, k) for k in trained}
    y = expected(trained)
    found = program(forward, layer.variables)()
    assert_close(found, y, 1e-5, name)
    assert_differ(eager_of(layer, x), y, name)
    cotangent = np.random.default_rng(5).standard_normal(y.shape)
    cotangent = cotangent.astype("float32")
    found = gradients(lambda: inner(forward(), cotangent), variables.values())
    gradient = central_differences(
        lambda t: np.sum(expected(t) * cotangent), trained
    )
    for key, ours in zip(variables, found, strict=True):
        assert_close(ours, gradient[key], 2e-5, f"{name} {key}")


def eager_of(layer, x):
    return numpy(layer(x, training=False))


@one_of_each
def test_none_at_inference_and_the_mean_is_that_without(method):
    """Also of a convolution, which Keras does not tell whether it trains."""
    names = ("dense_wide", "conv_wide")
    model, data = hosts_model(names=names), hosts_data(names)
    base = eager(model, data)
    keras_svdtune.enable_adapter(model, without(method))
    perturb(model)
    expected, compiled = eager(model, data), predict(model, data)
    assert not seeds_of(model)
    keras_svdtune.remove_adapter(model)
    keras_svdtune.enable_adapter(model, method)
    assert len(seeds_of(model)) == 2
    # At the start it is the base, in training too.
    assert_same(_training(model, data), base)
    perturb(model)
    assert_same(eager(model, data), expected)
    assert_same(predict(model, data), compiled)
    once, twice = _training(model, data), _training(model, data)
    for name in names:
        assert_differ(once[name], twice[name], name)
        assert_differ(once[name], expected[name], name)
    if method.name != "dora":
        return
    # Of 2,000 rows, each with a mask of its own.
    x = np.repeat(data[0][:1], 2000, axis=0)
    layer = model.get_layer("dense_wide")
    y = numpy(layer(x, training=True))
    off = np.abs(y.mean(axis=0) - eager_of(layer, x[:1])[0])
    spread = 5 * y.std(axis=0) / np.sqrt(len(y))
    assert spread.max() > 1e-2 and (off < spread).all()


def _training(model, data):
    return {k: numpy(v) for k, v in model(data, training=True).items()}


def test_a_quantized_base_has_it_too():
    model = small_model()
    model.quantize("int8")
    keras_svdtune.enable_adapter(model, LoRA(2, dropout=RATE))
    perturb(model)
    once, twice = (numpy(model(X, training=True)) for _ in range(2))
    assert_differ(once, twice)
    assert_same(eager(model, X), eager(model, X))


# Training.


def compiled_model(method):
    keras.utils.set_random_seed(0)
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    keras_svdtune.enable_adapter(model, method)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model


def losses(model, epochs=3):
    history = model.fit(X, Y, 8, epochs, shuffle=False, verbose=0)
    return history.history["loss"]


def test_each_step_draws_another_mask_and_seeds_repeat_it():
    model = compiled_model(LoRA(2, dropout=RATE))
    perturb(model)
    found = losses(model)
    assert len(set(found)) == 3  # nothing trains at a rate of 0
    assert len(set(found + losses(model))) == 6
    again = compiled_model(LoRA(2, dropout=RATE))
    perturb(again)
    assert losses(again) == found


def test_another_seed_is_another_mask():
    found = []
    for seed in (0, 1):
        model = compiled_model(LoRA(2))
        keras_svdtune.remove_adapter(model)
        keras.utils.set_random_seed(seed)
        keras_svdtune.enable_adapter(model, LoRA(2, dropout=RATE))
        perturb(model)
        found += losses(model, 1)
    assert len(set(found)) == 2


def test_gemma_learns_and_generates_as_ever():
    task = keras_hub.models.GemmaCausalLM(tiny_gemma(), None)
    task.enable_adapter(LoRA(4, dropout=0.1))
    task.compile(
        keras.optimizers.Adam(2e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=compiles(),
    )
    x, y = tokens(), np.ones((2, 6), "int32")
    before = trainables(task)
    found = task.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert found[-1] < 0.9 * found[0], found
    for path, value in trainables(task).items():
        assert not np.array_equal(value, before[path]), path
    assert all(int(numpy(v)[1]) == 8 for v in seeds_of(task)) or not compiles()
    prompt = {k: np.array(v) for k, v in x.items()}
    prompt["padding_mask"][:, 3:] = 0
    answers = [
        numpy(task.generate(prompt, stop_token_ids=None)["token_ids"])
        for _ in range(2)
    ]
    assert_same(*answers)


@pytest.mark.parametrize("outer", [False, True])
def test_under_remat(outer):
    if keras.backend.backend() == "tensorflow":
        pytest.skip("plain models of Keras 3.15 fail under it as well")
    size = {} if outer else {"output_size_threshold": 1}
    scope = keras.RematScope("full" if outer else "larger_than", **size)
    keras.utils.set_random_seed(0)
    keras.backend.clear_session(free_memory=False)
    with scope:
        model = small_model()
    keras_svdtune.enable_adapter(model, LoRA(2, dropout=RATE))
    perturb(model)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    expected = eager(model, X)
    assert_close(predict(model, X), expected, 1e-6)
    found = losses(model, 12)
    assert len(set(found)) == 12
    assert np.mean(found[-3:]) < np.mean(found[:3])


def test_interrupted_runs_go_on_with_the_masks_of_one_that_was_not(tmp_path):
    if keras.backend.backend() == "torch":
        pytest.skip("torch draws all masks from one seed of its own")
    path = tmp_path / "epoch.weights.h5"
    model = compiled_model(LoRA(2, dropout=RATE))
    model.optimizer.learning_rate = 0.05
    losses(model, 2)
    model.save_weights(path)
    expected = losses(model, 2)
    again = compiled_model(LoRA(2, dropout=RATE))
    again.optimizer.learning_rate = 0.05
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    assert losses(again, 2) == expected
    assert_same(trainables(again), trainables(model))


# Files and verbs.


@one_of_each
def test_files(method, tmp_path):
    path, old = tmp_path / "a.safetensors", tmp_path / "old.safetensors"
    model = small_model()
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    expected = eager(model, X)
    keras_svdtune.save_adapter(model, path)
    saved = keras_svdtune.compose({path: 1.0})
    assert saved.about["settings"]["dropout"] == RATE
    assert not any("seed" in key or "dropout" in key for key in saved.arrays)

    def loaded(file, into=None):
        keras.backend.clear_session(free_memory=False)
        other = small_model()
        if into is not None:
            keras_svdtune.enable_adapter(other, into)
        keras_svdtune.load_adapter(other, file)
        assert_same(eager(other, X), expected)
        return other

    other = loaded(path)
    assert len(seeds_of(other)) == 2
    assert {x.adapter.method.dropout for x in adapted(other).values()} == {RATE}
    # A model that has the adapter keeps its own, and its file says that.
    other = loaded(path, without(method))
    assert not seeds_of(other)
    keras_svdtune.save_adapter(other, old)
    saved = keras_svdtune.compose({old: 1.0})
    assert "dropout" not in saved.about["settings"]
    assert not seeds_of(loaded(old))
    assert len(seeds_of(loaded(old, method))) == 2
    # They add up: both files hold weights of one meaning.
    if method.name != "dora":
        keras_svdtune.compose({path: 0.5, old: 0.5})


@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
def test_full_saves(kind, tmp_path):
    path = tmp_path / f"model.{kind}"
    model = compiled_model(LoRA(2, dropout=RATE))
    perturb(model)
    expected = eager(model, X)
    losses(model, 1)
    model.save(path) if kind == "keras" else model.save_weights(path)
    keras.backend.clear_session(free_memory=False)
    if kind == "keras":
        plain = keras.saving.load_model(path)
        assert type(plain.get_layer("first")) is keras.layers.Dense
    else:
        plain = small_model()
        plain.load_weights(path)
        for method in (LoRA(2), LoRA(2, dropout=RATE)):
            keras.backend.clear_session(free_memory=False)
            other = small_model()
            keras_svdtune.enable_adapter(other, method)
            other.load_weights(path)
            assert_same(eager(other, X), expected)
    assert_close(eager(plain, X), expected, 1e-5)
    assert not seeds_of(plain)


def test_declared_layers(tmp_path):
    inputs = keras.Input((6,))
    layer = keras_svdtune.LoRADense(4, rank=2, dropout=RATE, name="declared")
    model = keras.Model(inputs, layer(inputs))
    assert layer.get_config()["dropout"] == RATE
    perturb(model)
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.saving.load_model(path)
    assert_same(eager(again, X), eager(model, X))
    for x in (model, again):
        assert_differ(numpy(x(X, training=True)), numpy(x(X, training=True)))
    again.compile("sgd", "mse")
    again.fit(X, Y[:, :4], verbose=0)
    if keras.backend.backend() == "tensorflow":
        return  # there `fit` builds no declared layer, with dropout or without
    # One that `fit` builds, where variables have no values at first.
    model = keras.Sequential(
        [keras_svdtune.LoRADense(4, rank=2, dropout=RATE, name="declared")]
    )
    model.compile("sgd", "mse")
    model.fit(X, Y[:, :4], verbose=0)
    assert len(seeds_of(model)) == 1


def test_merge_remove_and_disable():
    model = small_model()
    base, before = eager(model, X), values(model)
    count = len(model.variables)
    keras_svdtune.enable_adapter(model, LoRA(2, dropout=RATE))
    perturb(model)
    learned = eager(model, X)
    with keras_svdtune.adapter_disabled(model):
        assert_same(eager(model, X), base)
        assert_same(numpy(model(X, training=True)), base)
    with keras_svdtune.adapter_merged(model):
        assert_close(eager(model, X), learned, 1e-5)
        assert_same(numpy(model(X, training=True)), eager(model, X))
    assert_differ(numpy(model(X, training=True)), learned)
    assert_same(eager(model, X), learned)
    keras_svdtune.remove_adapter(model)
    assert_same(values(model), before)
    assert len(model.variables) == count
    keras_svdtune.enable_adapter(model, LoRA(2, dropout=RATE))
    perturb(model)
    keras_svdtune.to_lora(model, rank=1)
    assert len(seeds_of(model)) == 2  # it trains on with the same dropout
    assert_differ(numpy(model(X, training=True)), eager(model, X))
    keras_svdtune.merge_adapter(model)
    assert not seeds_of(model)


def test_named_adapters(tmp_path):
    path = tmp_path / "c.safetensors"
    model = small_model()
    keras_svdtune.enable_adapter(model, LoRA(2))
    perturb(model, seed=3)
    keras_svdtune.save_adapter(model, path)
    third = eager(model, X)
    keras_svdtune.remove_adapter(model)
    base = eager(model, X)
    method = LoRA(2, dropout=RATE)
    keras_svdtune.enable_adapter(model, method, name="a")
    perturb(model)
    first = eager(model, X)
    with must_stay(model, X), pytest.raises(ValueError, match="same dropout"):
        keras_svdtune.enable_adapter(model, LoRA(2), name="b")
    keras_svdtune.enable_adapter(model, method, name="b")
    keras_svdtune.load_adapter(model, path, name="c")
    assert_same(eager(model, X), third)
    assert_differ(numpy(model(X, training=True)), third)
    keras_svdtune.set_adapter(model, "a")
    assert_same(eager(model, X), first)
    with keras_svdtune.adapter_per_example(model, ["a", None, "c", "b"]):
        found = eager(model, X[:4])
    assert_close(found[0], first[0], 1e-5)
    assert_close(found[1], base[1], 1e-5)
    assert_close(found[2], third[2], 1e-5)


def test_what_it_costs_is_as_ever():
    model = small_model()
    found = [
        keras_svdtune.estimate(model, LoRA(2, dropout=x)).layers
        for x in (0.0, RATE)
    ]
    assert found[0] == found[1]


# Where there is nothing to drop.


def grouped():
    x = keras.Input((6, 6, 4))
    y = keras.layers.Conv2D(4, 3, groups=2, name="grouped")(x)
    y = keras.layers.Conv2DTranspose(3, 2, name="transposed")(y)
    y = keras.layers.Dense(3, name="dense")(y)
    return keras.Model(x, y)


def test_merged_kernels_are_refused_by_name():
    model = grouped()
    data = np.ones((1, 6, 6, 4), "float32")
    with must_stay(model, data), pytest.raises(ValueError) as error:
        keras_svdtune.enable_adapter(model, LoRA(2, dropout=RATE))
    message = str(error.value)
    assert "2 layers have no branch" in message
    assert "exclude=['grouped', 'kernel']" in message
    keras_svdtune.enable_adapter(
        model, LoRA(2, dropout=RATE), exclude=["grouped", "kernel"]
    )
    assert [x.name for x in adapted(model).values()] == ["dense"]
    with pytest.raises(ValueError, match="compute with a merged kernel"):
        keras_svdtune.LoRAConv2D(4, 3, groups=2, rank=2, dropout=RATE).build(
            (None, 6, 6, 4)
        )


class ReadsItsKernel(keras.layers.Layer):
    """Reads the kernel of a layer in place of calling it, as Gemma 4 does."""

    def build(self, shape):
        self.dense = keras.layers.Dense(3, name="read")
        self.dense.build(shape)

    def call(self, x):
        return ops.matmul(x, self.dense.kernel)


def test_a_kernel_that_is_read_is_refused_in_training():
    x = keras.Input((6,))
    model = keras.Model(x, ReadsItsKernel()(x))
    base = eager(model, X)
    keras_svdtune.enable_adapter(model, LoRA(2, dropout=RATE))
    assert_close(eager(model, X), base, 1e-6)
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"or with `exclude=\['read'\]`"):
        model.fit(X, Y[:, :3], verbose=0)
    # Keras on JAX has taken the values out of the variables by then.
    assert_close(eager(model, X), base, 1e-6)
    keras_svdtune.remove_adapter(model)
    assert_same(eager(model, X), base)
    model.fit(X, Y[:, :3], verbose=0)


def test_embeddings_have_none():
    model = tiny_gemma()
    model.enable_adapter(LoRA(2, dropout=RATE), ["token_embedding"])
    perturb(model)
    assert not seeds_of(model)
    assert_same(numpy(model(tokens(), training=True)), eager(model, tokens()))


def test_models_without_it_are_as_before():
    model = small_model()
    count = len(model.variables)
    keras_svdtune.enable_adapter(model, LoRA(2, dropout=0))
    assert len(model.variables) == count + 4
    assert not any(getattr(x, "seeds", None) for x in flat(model))
    assert repr(LoRA(2)) == str(LoRA(2)) == "LoRA(rank=2, alpha=None, seed=0)"
    assert str(LoRA(2, dropout=0.1)).endswith("seed=0, dropout=0.1)")
    assert LoRA(2).settings() == {"rank": 2, "alpha": None, "seed": 0}


def test_trains_like():
    assert LoRA(2).trains_like(LoRA(2, dropout=0.1))
    assert LoRA(2, dropout=0.1).trains_like(LoRA(2))
    assert LoRA(2) != LoRA(2, dropout=0.1)
    assert not LoRA(2).trains_like(LoRA(3, dropout=0.1))
    assert not LoRA(2, dropout=0.1).trains_like(PiSSA(2))


@pytest.mark.parametrize("value", [1.0, 1, -0.1, True, "0.1", None, np.nan])
def test_what_is_no_probability(value):
    with pytest.raises(ValueError, match="`dropout` must be .*Received: drop"):
        LoRA(2, dropout=value)


@pytest.mark.parametrize("cls", [SVF, PiSSA])
def test_others_have_no_such_setting(cls):
    with pytest.raises(TypeError, match="dropout"):
        cls(dropout=0.1)
