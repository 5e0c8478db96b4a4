"""Embeddings as hosts: looked up, and called in reverse as a tied head."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    POLICIES,
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
    picture,
    predict,
    trainables,
    values,
)
from keras import layers, ops
from keras.src.backend import get_keras_mask

import keras_svdtune
from keras_svdtune import AdaLoRA, PiSSA

VOCABULARY, DIM = 24, 8
# AdaLoRA leaves embeddings out: a test below.
METHODS = [m for m in all_methods() if m.embeddings]
ONE_OF_EACH = [m for m in default_methods() if m.embeddings]
every_method = pytest.mark.parametrize("method", METHODS, ids=method_id)
one_of_each = pytest.mark.parametrize("method", ONE_OF_EACH, ids=method_id)

# Every kind: the class, its settings, and the shape of its table.
KINDS = {
    "embedding": (layers.Embedding, {"mask_zero": True}, (24, 8)),
    "wide": (layers.ReversibleEmbedding, {"mask_zero": True}, (5, 8)),
    "square": (layers.ReversibleEmbedding, {}, (8, 8)),
    "hub": (
        keras_hub.layers.ReversibleEmbedding,
        {"logit_soft_cap": 2.0, "reverse_dtype": "float32"},
        (24, 8),
    ),
}


def make(dtype="float32", names=tuple(KINDS)):
    """A model with a branch for every kind: looked up, and in reverse."""
    inputs, outputs = {}, {}
    for name in names:
        cls, settings, shape = KINDS[name]
        layer = cls(*shape, name=name, dtype=dtype, **settings)
        x = keras.Input((3,), name=f"{name}_input", dtype="int32")
        y = layer(x)
        outputs[name] = ops.cast(y, "float32")
        if cls is not layers.Embedding:
            z = layers.LayerNormalization(name=f"{name}_norm", dtype=dtype)(y)
            z = layer(z, reverse=True)
            outputs[f"{name}_reverse"] = ops.cast(z, "float32")
        inputs[name] = x
    model = keras.Model(list(inputs.values()), outputs, name="tables")
    rng = np.random.default_rng(0)
    for name in names:
        table = model.get_layer(name).weights[0]
        table.assign(rng.standard_normal(tuple(table.shape)) / 2)
    return model


def data(names=tuple(KINDS), batch=6):
    rng = np.random.default_rng(1)
    return [
        rng.integers(0, KINDS[name][2][0], (batch, 3)).astype("int32")
        for name in names
    ]


def enable(model, method):
    keras_svdtune.enable_adapter(model, method, list(KINDS))


@pytest.mark.parametrize(
    "method, policy",
    [
        pytest.param(method, policy, id=f"{method_id(method)}-{policy}")
        for policy in POLICIES
        for method in (METHODS if policy == "float32" else ONE_OF_EACH)
    ],
)
def test_first_step_is_bit_identical_and_merged_equals_unmerged(method, policy):
    names = tuple(KINDS) if policy == "float32" else ("wide", "hub")
    model, x = make(policy, names), data(names)
    base = predict(model, x)
    keras_svdtune.enable_adapter(model, method, names)
    assert_same(predict(model, x), base, "first predict")
    perturb(model)
    moved = predict(model, x)
    assert_differ(moved, base)
    keras_svdtune.merge_adapter(model)
    tolerance = 1e-5 if policy == "float32" else 2e-2
    if method.name == "svft" and policy != "float32":
        tolerance = 8e-2  # it divides by s
    assert_close(predict(model, x), moved, tolerance, "merged")
    assert type(model.get_layer("hub")) is KINDS["hub"][0]


@every_method
def test_gradients_equal_dense_autodiff(method):
    """Of every trainable and of what goes into the reverse product."""
    names = ("wide", "hub")
    model = make(names=names)
    keras_svdtune.enable_adapter(model, method, list(names))
    rng = np.random.default_rng(3)
    ids = data(names)
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


@one_of_each
def test_fit_trains_the_adapter_alone(method):
    model, x = make(), data()
    # Within reach of scaled singular values, and of thin changes in part.
    targets = {k: 1.5 * v for k, v in eager(model, x).items()}
    base = values(model)
    enable(model, method)
    before = trainables(model)
    model.compile(keras.optimizers.Adam(2e-2), "mse")
    losses = model.fit(x, targets, epochs=10, batch_size=6, verbose=0)
    losses = losses.history["loss"]
    assert losses[-1] < 0.98 * losses[0], losses
    for path, value in trainables(model).items():
        assert not np.array_equal(value, before[path]), path
    now = dict(values(model))
    for path, value in base:
        assert_same(now[path], value, path)


@one_of_each
def test_remove_files_and_full_saves(method, tmp_path):
    model, x = make(), data()
    before = picture(model, x, compiled=False)
    enable(model, method)
    perturb(model)
    expected = eager(model, x)
    keras_svdtune.save_adapter(model, tmp_path / "a.safetensors")
    model.save_weights(tmp_path / "full.weights.h5")
    keras_svdtune.remove_adapter(model)
    assert_same(picture(model, x, compiled=False), before)
    keras_svdtune.load_adapter(model, tmp_path / "a.safetensors")
    assert_same(eager(model, x), expected)
    # A plain model reads the merged tables, an adapted one base and adapter.
    plain = make()
    plain.load_weights(tmp_path / "full.weights.h5")
    assert_close(eager(plain, x), expected, 1e-5)
    perturb(model, seed=8)
    model.load_weights(tmp_path / "full.weights.h5")
    assert_same(eager(model, x), expected)


def test_masks_are_those_of_the_plain_layers():
    model = make(names=("embedding", "wide"))
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
    model = make(names=("hub",))
    layer = model.get_layer("hub")
    keras_svdtune.enable_svf(model, ["hub"])
    perturb(model)
    assert_same(layer.embeddings, layer.merged_kernel())
    assert_differ(numpy(layer.embeddings), numpy(layer._embeddings))


def test_only_where_a_target_names_them():
    gemma = tiny_gemma()
    keras_svdtune.enable_svf(gemma)
    assert not hasattr(gemma.token_embedding, "adapter")
    keras_svdtune.remove_adapter(gemma)
    keras_svdtune.enable_svf(gemma, ["token_embedding", "query"])
    assert gemma.token_embedding.adapter.shape == (32, 16)
    only = keras.Sequential([keras.Input((3,)), layers.Embedding(5, 4)])
    with pytest.raises(ValueError, match="embeddings are where they are named"):
        keras_svdtune.enable_svf(only)


def test_a_tied_language_model_trains_generates_and_merges():
    """A Task: the same layer looks tokens up and makes the logits."""
    task = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(), preprocessor=None
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 32, (4, 6)).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    base = numpy(task(x))
    keras_svdtune.enable_svf(task, ["token_embedding"])
    assert_same(numpy(task(x)), base)
    task.compile(
        keras.optimizers.Adam(0.3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    y = np.roll(ids, -1, 1)
    losses = task.fit(x, y, epochs=10, batch_size=4, verbose=0).history["loss"]
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


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_table(mode, tmp_path):
    model = make(names=("embedding",))
    (x,) = data(("embedding",))
    model.quantize(mode)
    base = eager(model, [x])
    keras_svdtune.enable_svf(model, ["embedding"])
    assert_same(eager(model, [x]), base)
    perturb(model)
    moved = eager(model, [x])
    assert_differ(moved, base)
    # Against the table that its lookups give, adapted.
    layer = model.get_layer("embedding")
    table = numpy(layer.merged_kernel())
    assert_close(moved["embedding"], table[x], 1e-5)
    keras_svdtune.save_adapter(model, tmp_path / "a.safetensors")
    keras_svdtune.merge_adapter(model)
    assert model.get_layer("embedding").quantization_mode == mode
    step = np.abs(table).max() / (127 if mode == "int8" else 7)
    error = np.abs(eager(model, [x])["embedding"] - table[x]).max()
    assert 0 < error <= 0.51 * step * (1 if mode == "int8" else 1.2)


def test_what_cannot_be_adapted_says_why():
    model = make(names=("square",))
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
@one_of_each
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
    model = make(names=("hub",))
    layer = model.get_layer("hub")
    table = numpy(layer._embeddings).astype("float64")
    keras_svdtune.enable_svf(model, ["hub"])
    delta = np.linspace(-0.5, 0.5, DIM)
    layer.adapter.delta.assign(delta)
    u, s, vt = np.linalg.svd(table, full_matrices=False)
    expected = (u * s * (1 + delta)) @ vt
    ids = np.arange(VOCABULARY)
    assert_close(numpy(layer(ids)), expected, 1e-5)
    x = np.random.default_rng(0).standard_normal((3, DIM)).astype("float32")
    logits = 2.0 * np.tanh(x @ expected.T / 2.0)
    assert_close(numpy(layer(x, reverse=True)), logits, 1e-5)


def test_estimate_knows_them():
    gemma = tiny_gemma()
    found = keras_svdtune.estimate(gemma, PiSSA(rank=2), ["token_embedding"])
    assert found.trainable == 2 * (32 + 16)


def tiny_gemma():
    return keras_hub.models.GemmaBackbone(
        vocabulary_size=32,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        hidden_dim=16,
        intermediate_dim=24,
    )
