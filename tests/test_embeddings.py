"""Embeddings as hosts: looked up, and called in reverse as a tied head."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    all_methods,
    assert_close,
    assert_differ,
    assert_same,
    default_methods,
    dot,
    eager,
    gradient_function,
    method_id,
    numpy,
    perturb,
    scaled,
    tiny_gemma,
    trainables,
)
from keras import layers, ops
from keras.src.backend import get_keras_mask
from test_hosts import looked_up, tables

import keras_svdtune
from keras_svdtune import AdaLoRA, PiSSA

DIM = 8
# AdaLoRA leaves embeddings out: a test below.
every_method = pytest.mark.parametrize(
    "method", [m for m in all_methods() if m.embeddings], ids=method_id
)


@every_method
def test_gradients_equal_dense_autodiff(method):
    """Of every trainable and of what goes into the reverse product."""
    names = ("wide", "hub")
    model = tables(names)
    keras_svdtune.enable_adapter(model, method, list(names))
    rng = np.random.default_rng(3)
    ids = looked_up(names)
    cases, variables = [], {}
    for name, indices in zip(names, ids, strict=True):
        layer = model.get_layer(name)
        x = keras.Variable(rng.standard_normal((6, 3, DIM)).astype("float32"))
        up = rng.standard_normal((6, 3, DIM)).astype("float32")
        down = rng.standard_normal((6, 3, layer.input_dim)).astype("float32")
        cases.append((layer, indices, x, up, down))
        for key, v in layer.adapter.variables_by_name(trainable=True).items():
            variables[f"{name} {key}"] = v
        variables[f"{name} input"] = x

    def loss(output):
        return lambda: sum(
            dot(found, cotangent)
            for layer, indices, x, *cotangents in cases
            for found, cotangent in zip(
                output(layer, indices, x.value), cotangents, strict=True
            )
        )

    ours = gradient_function(loss(_output), variables.values())
    dense = gradient_function(loss(_dense_output), variables.values())
    for moved in (False, True):
        if moved:
            perturb(model)
        for name, a, b in zip(variables, ours(), dense(), strict=True):
            assert_close(a, b, 1e-4, f"{name} moved={moved}")
            if "input" in name:
                assert np.abs(numpy(a)).max() > 1e-3


def _output(layer, indices, x):
    return layer(indices), layer(x, reverse=True)


def _dense_output(layer, indices, x):
    """By the merged table, written out once more."""
    table = layer.adapter.merged(layer._embeddings.value)
    one_hot = ops.one_hot(indices, layer.input_dim)
    logits = ops.matmul(x, ops.transpose(table))
    if layer.logit_soft_cap:
        cap = layer.logit_soft_cap
        logits = cap * ops.tanh(logits / cap)
    return ops.matmul(one_hot, table), logits


def test_masks_are_those_of_the_plain_layers():
    model = tables(("embedding", "wide"))
    ids = np.array([[0, 3, 0], [1, 0, 2]], "int32")

    def masks():
        return {
            name: numpy(get_keras_mask(model.get_layer(name)(ids)))
            for name in ("embedding", "wide")
        }

    before = masks()
    keras_svdtune.enable_svf(model, ["embedding", "wide"])
    assert_same(masks(), before)
    assert_same(before["wide"], ids != 0)


def test_what_reads_the_table_reads_the_merged_one():
    model = tables(("hub",))
    layer = model.get_layer("hub")
    keras_svdtune.enable_svf(model, ["hub"])
    perturb(model)
    assert_same(layer.embeddings, layer.merged_kernel())
    assert_differ(numpy(layer.embeddings), numpy(layer._embeddings))


def test_only_where_a_target_names_them():
    gemma = tiny_gemma(num_layers=1)
    keras_svdtune.enable_svf(gemma)
    assert not hasattr(gemma.token_embedding, "adapter")
    keras_svdtune.remove_adapter(gemma)
    keras_svdtune.enable_svf(gemma, ["token_embedding", "query"])
    assert gemma.token_embedding.adapter.shape == (32, 8)
    only = keras.Sequential([keras.Input((3,)), layers.Embedding(5, 4)])
    with pytest.raises(ValueError, match="embeddings are where they are named"):
        keras_svdtune.enable_svf(only)


def test_a_tied_language_model_trains_generates_and_merges():
    """A Task: the same layer looks tokens up and makes the logits."""
    task = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(num_layers=1, hidden_dim=16), preprocessor=None
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 32, (4, 6)).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    base = numpy(task(x))
    keras_svdtune.enable_svf(task, ["token_embedding"])
    assert_same(numpy(task(x)), base)
    task.compile(
        keras.optimizers.Adam(0.04),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    y = np.roll(ids, -1, 1)
    losses = task.fit(x, y, epochs=30, batch_size=4, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    prompt = {k: v.copy() for k, v in x.items()}
    prompt["padding_mask"][:, 3:] = 0
    tuned, answers = numpy(task(x)), task.generate(prompt, stop_token_ids=None)
    assert_differ(tuned, base)
    task.backbone.merge_adapter()
    assert_close(numpy(task(x)), tuned, 1e-5)
    merged = task.generate(prompt, stop_token_ids=None)
    assert_same(merged["token_ids"], answers["token_ids"])


def test_an_untied_head_is_left_out_and_that_is_said():
    x = keras.Input((3,), dtype="int32")
    layer = layers.ReversibleEmbedding(12, 6, tie_weights=False, name="table")
    model = keras.Model(x, layer(layer(x), reverse=True))
    ids = np.array([[1, 2, 3]])
    base = eager(model, ids)
    with pytest.warns(UserWarning, match="'table' is a matrix of its own"):
        keras_svdtune.enable_svf(model, ["table"])
    assert_same(eager(model, ids), base)
    head = numpy(layer.reverse_embeddings)
    perturb(model)
    y = numpy(layer(ids))
    assert_close(eager(model, ids), y @ head, 1e-5)
    assert_differ(eager(model, ids), base)


@pytest.mark.parametrize("mode, levels", [("int8", 127), ("int4", 5.8)])
def test_a_quantized_table(mode, levels):
    """Against the table that its lookups give, adapted."""
    model, (x,) = tables(("embedding",)), looked_up(("embedding",))
    model.quantize(mode)
    keras_svdtune.enable_svf(model, ["embedding"])
    perturb(model)
    table = numpy(model.get_layer("embedding").merged_kernel())
    assert_close(eager(model, [x])["embedding"], table[x], 1e-5)
    keras_svdtune.merge_adapter(model)
    error = np.abs(eager(model, [x])["embedding"] - table[x]).max()
    assert 0 < error <= 0.51 * np.abs(table).max() / levels


def test_what_cannot_be_adapted_says_why():
    model = tables(("square",))
    with pytest.raises(ValueError, match="'square' is an embedding, which Ada"):
        keras_svdtune.enable_adapter(model, AdaLoRA(rank=2), ["square"])
    model.quantize("int8")
    with pytest.raises(ValueError, match="'square' is a quantized Reversible"):
        keras_svdtune.enable_svf(model, ["square"])
    bound = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Embedding(5, 4, embeddings_constraint="unit_norm", name="t"),
        ]
    )
    with pytest.raises(ValueError, match="t' has a constraint on its kernel"):
        keras_svdtune.enable_svf(bound, ["t"])


@pytest.mark.parametrize(
    "cls",
    [layers.Embedding, layers.ReversibleEmbedding],
    ids=["Embedding", "ReversibleEmbedding"],
)
@pytest.mark.parametrize(
    "method", [m for m in default_methods() if m.embeddings], ids=method_id
)
def test_declared_layers(method, cls, tmp_path):
    declared = getattr(
        keras_svdtune, method.title.replace("-", "") + cls.__name__
    )
    plain = cls(12, 6)
    plain.build()
    ids = np.array([[0, 5, 11]])
    layer = declared.from_layer(plain, **method.settings())
    assert_same(layer(ids), numpy(plain(ids)))
    x = keras.Input((3,), dtype="int32")
    model = keras.Model(x, layer(x))
    assert len(model.trainable_weights) == len(trainables(model)) > 0
    perturb(model)
    expected = eager(model, ids)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(eager(loaded, ids), expected)


def test_svf_trains_what_the_lookup_of_every_token_shares():
    """δ scales the singular values of the whole table, in NumPy."""
    model = tables(("hub",))
    layer = model.get_layer("hub")
    table = numpy(layer._embeddings).astype("float64")
    keras_svdtune.enable_svf(model, ["hub"])
    delta = np.linspace(-0.5, 0.5, DIM)
    layer.adapter.delta.assign(delta)
    expected = scaled(table, delta)
    ids = np.arange(24)
    assert_close(numpy(layer(ids)), expected, 1e-5)
    x = np.random.default_rng(0).standard_normal((3, DIM)).astype("float32")
    logits = 2.0 * np.tanh(x @ expected.T / 2.0)
    assert_close(numpy(layer(x, reverse=True)), logits, 1e-5)


def test_estimate_knows_them():
    gemma = tiny_gemma(num_layers=1)
    found = keras_svdtune.estimate(gemma, PiSSA(rank=2), ["token_embedding"])
    assert found.trainable == 2 * (32 + 8)
