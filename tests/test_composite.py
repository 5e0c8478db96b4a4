"""Layers inside a layer that calls them, under every dtype policy.

There Keras casts variables otherwise than in a layer that a model calls: in an
embedding inside a layer of a mixed policy it does not cast them at all.
"""

import keras
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_differ,
    assert_same,
    default_methods,
    eager,
    method_id,
    numpy,
    perturb,
    predict,
    randomise,
)
from keras import layers, ops

import keras_svdtune
from keras_svdtune import SVF, LoRA

EVERYTHING = ["tall", "wide", "einsum", "table", "narrow", "tied", "image"]
DATA = np.array([[0, 1, 2, 3], [6, 5, 3, 3]], "int32")


class Composite(layers.Layer):
    """Holds a layer of every kind, and calls them in turn."""

    def __init__(self, reverse_dtype=None, **kwargs):
        super().__init__(**kwargs)
        own = {"dtype": self.dtype_policy}
        self.table = layers.Embedding(7, 6, name="table", **own)
        self.narrow = layers.Embedding(7, 9, name="narrow", **own)
        self.tied = layers.ReversibleEmbedding(
            7, 6, name="tied", reverse_dtype=reverse_dtype, **own
        )
        # Without a bias, which TensorFlow's graphs add with another rounding.
        own["use_bias"] = False
        self.tall = layers.Dense(6, activation="tanh", name="tall", **own)
        self.wide = layers.Dense(9, name="wide", **own)
        self.einsum = layers.EinsumDense(
            "btd,dhk->bthk", (None, 2, 3), name="einsum", dtype=own["dtype"]
        )
        self.image = layers.Conv2D(8, 2, name="image", **own)

    def build(self, shape):
        for table in (self.table, self.narrow, self.tied):
            table.build(shape)
        self.tall.build((*shape, 9))
        self.wide.build((*shape, 6))
        self.einsum.build((*shape, 6))
        self.image.build((*shape, 2, 3))

    def call(self, ids):
        x = self.tall(self.wide(self.table(ids)) + self.narrow(ids))
        logits = self.tied(x + self.tied(ids), reverse=True)
        return logits, self.image(self.einsum(x))


def composite(policy="float32", whole=False, **settings):
    """A model that holds one; `whole`: of the same policy itself, as KerasHub
    makes its backbones."""
    x = keras.Input((4,), dtype="int32")
    outputs = Composite(dtype=policy, name="composite", **settings)(x)
    outputs = [ops.cast(y, "float32") for y in outputs]
    model = keras.Model(x, outputs)
    if whole:
        model.dtype_policy = policy
    randomise(model)
    return model


def check(model, method, names, tolerance, compiled=True):
    """Equal at first, it trains the adapter alone, and merges."""
    base = eager(model, DATA)
    first = predict(model, DATA) if compiled else base
    count = len(model.weights)
    keras_svdtune.enable_adapter(model, method, names)
    assert_same(eager(model, DATA), base, "first call")
    if compiled:
        # XLA leaves out some roundings to bfloat16 between fused products.
        fused = keras.backend.backend() == "jax" and tolerance > 1e-5
        for found, expected in zip(predict(model, DATA), first, strict=True):
            assert_close(found, expected, fused * 5e-3, "first step")
    frozen = [numpy(v) for v in model.non_trainable_variables]
    before = [numpy(v) for v in model.trainable_variables]
    model.compile(
        keras.optimizers.Adam(2e-2),
        "mse",
        run_eagerly=not compiled and keras.backend.backend() != "jax",
    )
    model.fit(DATA, [1.5 * y for y in first], epochs=2, verbose=0)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        assert not np.array_equal(numpy(variable), value), variable.path
    assert_same([numpy(v) for v in model.non_trainable_variables], frozen)
    perturb(model)
    moved = eager(model, DATA)
    for found, expected in zip(moved, base, strict=True):
        assert_differ(found, expected)
    keras_svdtune.merge_adapter(model)
    for found, expected in zip(eager(model, DATA), moved, strict=True):
        assert_close(found, expected, tolerance, "merged")
    assert len(model.weights) == count


def tolerance(method, policy):
    """As in test_conformance.py, for a chain of four products."""
    if policy == "float32":
        return 1e-5
    return 0.2 if method.name == "svft" else 0.06


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_every_method(method, policy):
    names = EVERYTHING if method.embeddings else EVERYTHING[:3]
    check(composite(policy), method, names, tolerance(method, policy), False)


@pytest.mark.parametrize(
    "policy, settings",
    [
        ("float32", {}),
        ("float16", {}),
        ("mixed_float16", {"whole": True}),
        ("mixed_bfloat16", {"whole": True}),
        ("mixed_bfloat16", {"reverse_dtype": "float32"}),
        ("mixed_bfloat16", {"reverse_dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("method", [SVF(), LoRA(2)], ids=method_id)
def test_every_policy(method, policy, settings):
    model = composite(policy, **settings)
    compiled = isinstance(method, SVF)
    check(model, method, EVERYTHING, tolerance(method, policy), compiled)


def test_a_quantized_table():
    model = composite("mixed_bfloat16")
    model.get_layer("composite").table.quantize("int8")
    check(model, SVF(), ["table", "narrow"], 0.1)
