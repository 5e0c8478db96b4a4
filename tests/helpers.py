"""What several test files share: tiny models, gradients, comparisons."""

import contextlib
import dataclasses

import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_svdtune
from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.adapter.stepped import Stepped, variable_of
from keras_svdtune.hosts.host import AdapterHost
from keras_svdtune.methods.data_method import DataMethod
from keras_svdtune.model import batches, capture

POLICIES = ("float32", "bfloat16", "mixed_bfloat16")

# For what is long and depends little on the backend: always on JAX.
slow_elsewhere = (
    (lambda test: test)
    if keras.backend.backend() == "jax"
    else pytest.mark.slow
)

# Settings to test for a method beside, or instead of, its defaults.
VARIANTS = {
    "svf": [{}, {"rank": 3}, {"rank": 0.5}],
    "svft": [
        {"pattern": "banded"},
        {"pattern": "plain"},
        {"pattern": "random", "off_diagonals": 1},
        {"pattern": "top_k", "off_diagonals": 1},
    ],
    "pissa": [
        {"rank": 4},
        {"rank": 4, "alpha": 8.0, "n_iter": 4},
        {"rank": 0.5},
    ],
    "milora": [{"rank": 4, "alpha": 2.0}],
    "lora_xs": [{"rank": 4}, {"rank": 3, "alpha": 6.0, "n_iter": 4}],
    "lora": [{"rank": 4, "alpha": 8.0}, {"rank": 3, "dropout": 0.25}],
    "dora": [{"rank": 4, "alpha": 8.0}],
    "mica": [{"rank": 4}, {"rank": 3, "alpha": 6.0, "part": "top"}],
    "psoft": [{"rank": 4}, {"rank": 1}],
    "oplora": [{"rank": 4}, {"rank": 3, "keep": 2, "alpha": 6.0}],
    "eva": [{"rank": 4}, {"rank": 3, "alpha": 6.0}],
    "corda": [{"rank": 4}, {"rank": 3, "alpha": 6.0, "goal": "keep"}],
    "lora_ga": [{"rank": 4}, {"rank": 2, "alpha": 4.0, "gamma": 4.0}],
}


def default_method(name):
    """The method with its defaults, and rank 4 where it wants a rank."""
    cls = keras_svdtune.METHODS[name]
    wanted = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    assert set(wanted) <= {"rank"}, f"{name} has no default for {wanted}"
    return of_settings(cls, dict.fromkeys(wanted, 4))


def of_settings(cls, settings):
    """The method with these settings, and with data if it starts from that."""
    data = {"data": AnyData()} if issubclass(cls, DataMethod) else {}
    return cls(**settings, **data)


def default_methods():
    """One config for every method there is."""
    return [default_method(name) for name in keras_svdtune.METHODS]


def all_methods():
    """Configs for every method there is, several for some."""
    return [
        of_settings(keras_svdtune.METHODS[name], settings)
        for name in keras_svdtune.METHODS
        for settings in VARIANTS.get(name, [default_method(name).settings()])
    ]


def of_rank(method, rank):
    """The method with another rank; as it is if it has none."""
    if getattr(method, "rank", None) is None:
        return method
    return dataclasses.replace(method, rank=rank)


class AnyData:
    """Data for whatever model it meets, and a loss: so the tests of all methods
    run on those too that start from data, on models of every kind."""

    def batches(self, model):
        rng = np.random.default_rng(4)
        inputs = getattr(model, "input", None)
        if inputs is None:  # a Sequential that was built, and never called
            inputs = model.inputs
        return [
            batches.Batch(
                keras.tree.map_structure_up_to(
                    inputs,
                    lambda x, name: self._array(x, name, rng),
                    inputs,
                    _names(inputs),
                ),
                None,
                None,
            )
        ]

    def _array(self, like, name, rng):
        first, *others = like.shape
        shape = (first or 4, *(5 if n is None else n for n in others))
        if "int" not in like.dtype and like.dtype != "bool":
            return rng.standard_normal(shape).astype("float32")
        if "mask" in name:
            return np.ones(shape, "int32")
        return rng.integers(0, 2 if "segment" in name else 4, shape, "int32")

    def loss(self, x, y, y_pred, sample_weight):
        outputs = keras.tree.flatten(y_pred)
        return sum(
            ops.sum(ops.sin(ops.cast(y, "float32") + 1)) for y in outputs
        )


def _names(inputs):
    if isinstance(inputs, dict):
        return {k: k for k in inputs}
    return keras.tree.map_structure(lambda x: x.name, inputs)


def _meet_any_data():
    read, loss = capture.read_batches, capture.loss_of

    def read_batches(model, data, examples):
        if isinstance(data, AnyData):
            return data.batches(model)
        return read(model, data, examples)

    def loss_of(model, method):
        if isinstance(method.data, AnyData):
            return method.data.loss
        return loss(model, method)

    capture.read_batches, capture.loss_of = read_batches, loss_of


_meet_any_data()


def method_id(method):
    """A short name for a config in pytest's output."""
    cls = type(method)
    changed = [
        f"{f.name}={getattr(method, f.name)}"
        for f in dataclasses.fields(cls)
        if f.compare and getattr(method, f.name) != f.default
    ]
    return "-".join([method.name, *changed])


class Counter(keras.layers.Layer):
    """Counts how often Python runs its `call`, that is, how often a model
    that holds it is traced (or run eagerly)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x


# Layers of every kind that a method can live in: name -> (input shape without
# batch, function that makes the layer).
# Every weight gets a random value afterwards; zeros compile faster.
HOSTS = {
    "dense_tall": (
        (5, 8),
        lambda **k: keras.layers.Dense(6, activation="tanh", **k),
    ),
    "dense_wide": ((6,), lambda **k: keras.layers.Dense(9, **k)),
    "dense_square": (
        (3, 2, 6),
        lambda **k: keras.layers.Dense(6, use_bias=False, **k),
    ),
    "einsum_query": (
        (5, 8),
        lambda **k: keras.layers.EinsumDense(
            "btd,ndh->btnh", (None, 2, 3), bias_axes="nh", **k
        ),
    ),
    "einsum_output": (
        (5, 2, 3),
        lambda **k: keras.layers.EinsumDense(
            "btnh,nhd->btd", (None, 8), bias_axes="d", **k
        ),
    ),
    "einsum_ffw": (
        (5, 6),
        lambda **k: keras.layers.EinsumDense(
            "btd,df->btf", (None, 10), activation="gelu", **k
        ),
    ),
    "einsum_ellipsis": (
        (2, 3, 7),
        lambda **k: keras.layers.EinsumDense(
            "...x,xy->...y", 6, bias_axes="y", **k
        ),
    ),
    "conv_tall": (
        (5, 5, 2),
        lambda **k: keras.layers.Conv2D(
            6, 3, strides=2, padding="same", activation="tanh", **k
        ),
    ),
    "conv_wide": (
        (5, 6),
        lambda **k: keras.layers.Conv1D(16, 2, padding="causal", **k),
    ),
}

# Those that transformers' adapters know too.
LINEAR = tuple(name for name in HOSTS if not name.startswith("conv"))


def hosts_model(dtype="float32", names=tuple(HOSTS)):
    """A model with a branch for every kind of host, and a Counter.

    Each branch has a LayerNormalization too, which no adapter adapts.
    """
    inputs, outputs = {}, {}
    for name in names:
        shape, make = HOSTS[name]
        x = keras.Input(shape, name=f"{name}_input")
        y = Counter(name=f"{name}_counter", dtype=dtype)(x)
        y = keras.layers.LayerNormalization(name=f"{name}_norm", dtype=dtype)(y)
        y = make(name=name, dtype=dtype, kernel_initializer="zeros")(y)
        # Keras casts no output; numpy knows no bfloat16.
        y = keras.layers.Identity(name=f"{name}_output", dtype="float32")(
            ops.cast(y, "float32")
        )
        inputs[name], outputs[name] = x, y
    model = keras.Model(list(inputs.values()), outputs, name="hosts")
    randomise(model)
    return model


def hosts_data(names=tuple(HOSTS), batch=4, seed=0):
    """Inputs for `hosts_model`, a list."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((batch, *HOSTS[name][0])).astype("float32")
        for name in names
    ]


def randomise(model, seed=0):
    """Random values for every weight, biases and scales too."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" not in variable.dtype or "seed" in variable.name:
            continue
        shape = tuple(variable.shape)
        value = rng.standard_normal(shape) / np.sqrt(max(shape[:1] + (1,)))
        if variable.name in ("gamma", "scale"):
            value = 1.0 + 0.1 * value
        variable.assign(value.astype("float32"))


def adapted(model):
    """The adapted layers of a model, by path."""
    return {
        layer.path: layer
        for layer in flat(model)
        if isinstance(layer, AdapterHost)
    }


def flat(model):
    """Every layer inside a model."""
    return list(model._flatten_layers(include_self=False))


def trainables(model):
    """Name -> value of every trainable of every adapter."""
    return {
        v.path: numpy(v)
        for layer in adapted(model).values()
        for v in layer.adapter.variables_by_name(trainable=True).values()
    }


def perturb(model, seed=1, size=0.3):
    """Moves every trainable of every adapter away from where it starts."""
    rng = np.random.default_rng(seed)
    adapters = [x for x in flat(model) if isinstance(x, Adapter)]
    assert adapters
    for adapter in adapters:
        for v in adapter.weights_by_name(trainable=True).values():
            step = size * rng.standard_normal(tuple(v.shape))
            v.assign(numpy(v) + step.astype("float32"))


def numpy(x):
    """A NumPy array of a tensor or variable, float32 if it was bfloat16."""
    if isinstance(x, np.ndarray):
        return x
    x = getattr(x, "value", x)
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = ops.cast(x, "float32")
    return ops.convert_to_numpy(x).copy()


def scaled(w, delta):
    """W' of SVF in float64: singular vectors of W rounded to bfloat16."""
    rounded = w.astype("float32").astype(ml_dtypes.bfloat16).astype("float64")
    u, _, vt = np.linalg.svd(rounded, full_matrices=False)
    if w.shape[1] <= w.shape[0]:
        return w + (w @ vt.T * delta) @ vt
    return w + (u * delta) @ (u.T @ w)


def values(model):
    """Path -> value of all weights, in order."""
    return [(v.path, numpy(v)) for v in model.weights]


def assert_same(found, expected, what=""):
    """Bit-identical arrays, nested lists or dicts of them."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), what
        for key in expected:
            assert_same(found[key], expected[key], f"{what} {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{what} {i}")
    elif isinstance(expected, str):
        assert found == expected, what
    else:
        a, b = numpy(found), numpy(expected)
        assert a.dtype == b.dtype and a.shape == b.shape, what
        assert np.array_equal(a, b, equal_nan=True), (
            f"{what}: {np.mean(a != b):.1%} differ, by at most "
            f"{np.max(np.abs(a.astype('float64') - b))}"
        )


def assert_differ(found, expected, what=""):
    """Every array is somewhere clearly different."""
    if isinstance(expected, dict):
        for key in expected:
            assert_differ(found[key], expected[key], f"{what} {key}")
    else:
        assert error(found, expected) > 1e-3, what


def error(found, expected):
    """The largest difference, relative to the largest value expected."""
    a, b = numpy(found).astype("float64"), numpy(expected).astype("float64")
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))


def assert_close(found, expected, tolerance, what=""):
    """Equal within `tolerance`, relative to the largest value expected."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), what
        for key in expected:
            assert_close(found[key], expected[key], tolerance, f"{what} {key}")
    else:
        assert np.all(np.isfinite(numpy(found))), what
        off = error(found, expected)
        assert off <= tolerance, f"{what}: off by {off:.2e} > {tolerance:.0e}"


def program(function, variables):
    """A function that computes `function()` for the values that the variables
    have at the time; JAX compiles it once."""
    return _program(function, variables) if _on("jax") else function


def _program(function, variables, transform=lambda f: f):
    import jax

    variables = list(variables)

    def of(values):
        pairs = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=pairs):
            return function()

    compiled = jax.jit(transform(of))
    return lambda: compiled([v.value for v in variables])


def _on(backend):
    return keras.backend.backend() == backend


def gradients(loss, variables):
    """d loss() / d variables as NumPy arrays, on any backend."""
    return gradient_function(loss, variables)()


def gradient_function(loss, variables):
    """A function that returns them for the values at the time; JAX compiles
    it once. Of a weight whose variable holds a part of it, the weight's own."""
    weights = list(variables)
    variables = [variable_of(w) for w in weights]
    steps = [w.step if isinstance(w, Stepped) else 1.0 for w in weights]

    def by_tensorflow():
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch([v.value for v in variables])
            value = loss()
        return tape.gradient(value, [v.value for v in variables])

    def by_torch():
        import torch

        return torch.autograd.grad(loss(), [v.value for v in variables])

    if _on("jax"):
        import jax

        found = _program(loss, variables, jax.grad)
    else:
        found = by_tensorflow if _on("tensorflow") else by_torch
    return lambda: [
        numpy(ops.convert_to_tensor(g)) / step
        for g, step in zip(found(), steps, strict=True)
    ]


def dot(y, dy):
    """sum(y·dy), a loss whose gradient of y is dy."""
    return ops.sum(ops.multiply(y, ops.convert_to_tensor(dy)))


def compiles():
    """Whether this backend compiles the steps of a model."""
    return not _on("torch")


@contextlib.contextmanager
def must_stay(model, data, compiled=True):
    """Within it nothing about the model may change: not its classes, weights,
    what trains, nor what it computes."""
    before = picture(model, data, compiled)
    yield
    assert_same(picture(model, data, compiled), before, "the model")


def picture(model, data, compiled=True):
    """All that an enable which failed must leave as it was."""
    layers = flat(model)
    compiled = {"predict": predict(model, data)} if compiled else {}
    return compiled | {
        "classes": [type(x).__name__ + str(id(type(x))) for x in layers],
        "paths": [v.path for v in model.weights],
        "trainable": [v.path for v in model.trainable_weights],
        "flags": [str(x.trainable) for x in [model, *layers]],
        "weights": [numpy(v) for v in model.weights],
        "eager": eager(model, data),
    }


def predict(model, data):
    """The model's outputs through `predict`."""
    return model.predict(data, verbose=0)


def eager(model, data):
    """The model's outputs by a plain call."""
    found = model(data, training=False)
    return _map(numpy, found)


def _map(function, x):
    if isinstance(x, dict):
        return {k: _map(function, v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_map(function, v) for v in x]
    return function(x)


def tiny_gemma(dtype="float32", **settings):
    """A GemmaBackbone of two layers, with random weights."""
    sizes = dict(
        vocabulary_size=32,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        head_dim=4,
    )
    model = keras_hub.models.GemmaBackbone(dtype=dtype, **(sizes | settings))
    randomise(model)
    return model


def tiny_bert(dtype="float32", num_layers=2):
    """A BertBackbone, whose pooler sits in no list and attention does."""
    model = keras_hub.models.BertBackbone(
        vocabulary_size=32,
        num_layers=num_layers,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dtype=dtype,
    )
    randomise(model)
    return model


def tiny_gpt2():
    """A GPT2Backbone, whose layers have biases, and which PEFT knows."""
    model = keras_hub.models.GPT2Backbone(
        vocabulary_size=32,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=16,
    )
    randomise(model)
    return model


def tiny_albert(dtype="float32"):
    """An AlbertBackbone: one block, held in a list, called twice."""
    model = keras_hub.models.AlbertBackbone(
        vocabulary_size=32,
        num_layers=2,
        num_heads=2,
        embedding_dim=8,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dtype=dtype,
    )
    randomise(model)
    return model


def tokens(segments=False, batch=2, length=6, seed=0):
    """Inputs for the backbones above."""
    rng = np.random.default_rng(seed)
    data = {
        "token_ids": rng.integers(1, 32, (batch, length)).astype("int32"),
        "padding_mask": np.ones((batch, length), "int32"),
    }
    if segments:
        data["segment_ids"] = np.zeros((batch, length), "int32")
    return data


# Name -> (function that makes a backbone, its inputs).
BACKBONES = {
    "gemma": (tiny_gemma, tokens()),
    "bert": (tiny_bert, tokens(segments=True)),
    "albert": (tiny_albert, tokens(segments=True)),
}


def small_model(dtype="float32", compiled=False):
    """Two Dense layers, a tall and a wide one, with random weights."""
    model = keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(4, activation="relu", name="first", dtype=dtype),
            keras.layers.Dense(5, name="second", dtype=dtype),
        ],
        name="small",
    )
    randomise(model)
    if compiled:
        model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def small_data(rows=8, seed=0):
    """x and y for `small_model`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 6)).astype("float32")
    y = rng.standard_normal((rows, 5)).astype("float32")
    return x, y
