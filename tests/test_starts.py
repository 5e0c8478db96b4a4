"""Starts from data: EVA, CorDA and LoRA-GA against NumPy in float64, the forms
of data, padding, groups of layers, and what is refused."""

import gc
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    HOSTS,
    adapted,
    assert_close,
    assert_differ,
    assert_same,
    eager,
    hosts_data,
    hosts_model,
    must_stay,
    numpy,
    perturb,
    small_data,
    small_model,
    tiny_gemma,
    tokens,
)
from keras import ops

import keras_svdtune
from keras_svdtune import EVA, CorDA, LoRAGA
from keras_svdtune.methods.data_method import Inputs
from keras_svdtune.model import batches, capture
from keras_svdtune.model.targets import find_targets

X, Y = small_data(rows=20)


def start_of(model, *names):
    """The frozen and trained weights of the layers of a model, by layer."""
    return {
        layer.name: {
            k: numpy(v).astype("float64")
            for k, v in layer.adapter.weights_by_name().items()
        }
        for layer in adapted(model).values()
        if not names or layer.name in names
    }


def enabled(method, model=None, **options):
    model = small_model(compiled=True) if model is None else model
    keras_svdtune.enable_adapter(model, method, **options)
    return start_of(model)


def inputs_of_small_model(x):
    """What comes into its two layers, and their kernels, in float64."""
    model = small_model()
    kernels = [numpy(x._kernel).astype("float64") for x in model.layers]
    bias = numpy(model.layers[0].bias).astype("float64")
    hidden = np.maximum(x.astype("float64") @ kernels[0] + bias, 0.0)
    return {
        "first": (x.astype("float64"), kernels[0]),
        "second": (hidden, kernels[1]),
    }


def projection(a):
    """Onto the columns of a: what is the same whatever their signs."""
    q = np.linalg.qr(a)[0]
    return q @ q.T


# The equations.


def test_eva_starts_from_principal_components():
    found = enabled(EVA(rank=2, data=X))
    for name, (x, _) in inputs_of_small_model(X).items():
        a, b = found[name]["eva_a"], found[name]["eva_b"]
        u, s, vt = np.linalg.svd(x - x.mean(axis=0))
        assert s[1] > 1.1 * s[2]
        signs = np.sign(np.sum(vt[:2].T * a, axis=0))
        assert_close(a, vt[:2].T * signs, 1e-5, name)
        assert np.all(a[np.abs(a).argmax(axis=0), [0, 1]] > 0)
        assert not b.any()
        # About zero they would be others.
        assert np.abs(projection(a) - projection(vt_of(x))).max() > 1e-3


def vt_of(x):
    return np.linalg.svd(x)[2][:2].T


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("goal", ["learn", "keep"])
def test_corda_starts_from_components_of_cw(goal, alpha):
    found = enabled(CorDA(rank=2, alpha=alpha, goal=goal, data=X))
    k = 1.0 if alpha is None else alpha / 2
    for name, (x, w) in inputs_of_small_model(X).items():
        a0, b0 = found[name]["corda_a0"], found[name]["corda_b0"]
        c = x.T @ x
        c = c / np.mean(np.diag(c)) + 0.01 * np.eye(len(c))
        u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
        part = slice(0, 2) if goal == "learn" else slice(-2, None)
        expected = np.linalg.inv(c) @ (u[:, part] * s[part]) @ vt[part]
        assert_close(k * a0 @ b0, expected, 1e-5, name)
        # The singular values are shared evenly, as √s on either side.
        norms = np.linalg.norm(b0, axis=1)
        assert_close(norms, np.sqrt(s[part] / k), 1e-5, name)
        assert not found[name]["corda_delta_a"].any()


def test_corda_does_not_depend_on_the_size_of_the_inputs():
    found = [
        enabled(CorDA(rank=2, data=data), target_layer_names=["first"])
        for data in (X, 1000.0 * X)
    ]
    assert_close(found[1], found[0], 1e-4)


def gradients_of_small_model(x, y):
    """∂ mse / ∂W of its two layers, by hand."""
    seen = inputs_of_small_model(x)
    hidden, w = seen["second"]
    bias = numpy(small_model().layers[1].bias)
    d_out = 2 * (hidden @ w + bias - y) / y.size
    d_hidden = (d_out @ w.T) * (hidden > 0)
    return {
        "first": x.T.astype("float64") @ d_hidden,
        "second": hidden.T @ d_out,
    }


@pytest.mark.parametrize("settings", [{}, {"alpha": 6.0, "gamma": 4.0}])
def test_lora_ga_starts_from_the_gradient(settings):
    found = enabled(LoRAGA(rank=2, data=(X[:16], Y_OF_16), **settings))
    # The average over two batches of 8 is the gradient over both.
    for name, g in gradients_of_small_model(X[:16], Y_OF_16).items():
        a0, b0 = found[name]["lora_ga_a0"], found[name]["lora_ga_b0"]
        u, s, vt = np.linalg.svd(g, full_matrices=False)
        assert len(s) >= 4
        c = g.shape[1] ** 0.25 / np.sqrt(settings.get("gamma", 16.0))
        signs = np.sign(np.sum(u[:, :2] * a0, axis=0))
        assert_close(a0, c * u[:, :2] * signs, 1e-4, name)
        signs = np.sign(np.sum(vt[2:4] * b0, axis=1, keepdims=True))
        assert_close(b0, c * vt[2:4] * signs, 1e-4, name)


Y_OF_16 = Y[:16]


def test_lora_ga_of_fewer_than_2r_components():
    found = enabled(LoRAGA(rank=3, data=(X[:8], Y[:8])))
    for name, g in gradients_of_small_model(X[:8], Y[:8]).items():
        b0 = found[name]["lora_ga_b0"]
        _, _, vt = np.linalg.svd(g, full_matrices=False)
        assert_close(projection(b0.T), projection(vt[-3:].T), 1e-4, name)


def test_a_frozen_kernel_has_a_gradient_too():
    expected = enabled(LoRAGA(rank=2, data=(X, Y)))
    model = small_model(compiled=True)
    model.trainable = False
    model.get_layer("first").kernel.trainable = False
    assert_close(enabled(LoRAGA(rank=2, data=(X, Y)), model), expected, 1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e4])
def test_a_gradient_of_float16_neither_vanishes_nor_overflows(policy, size):
    expected = enabled(LoRAGA(rank=1, data=(X, Y)))
    model = small_model(policy, compiled=True)
    weights = np.full(len(X), size, "float32")
    found = enabled(LoRAGA(rank=1, data=(X, Y, weights)), model)
    for name, values in expected.items():
        a, b = values["lora_ga_a0"], found[name]["lora_ga_a0"]
        assert_close(projection(b), projection(a), 1e-2, name)


def test_a_gradient_too_small_for_float16():
    model = small_model("mixed_float16", compiled=True)
    data = (X, Y, np.full(len(X), 1e-20, "float32"))
    with pytest.raises(ValueError, match="small for float16: small/first"):
        keras_svdtune.enable_lora_ga(model, 1, data=data)


# What comes into a layer.


def seen_by(model, data, examples=256, names=None):
    targets = find_targets(model, names)
    read = batches.read_batches(model, data, examples)
    sums = capture.input_sums(model, targets, read, "reading")
    return {
        path: capture.as_inputs([numpy(x).astype("float64") for x in arrays])
        for path, arrays in sums.items()
    }


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_the_inputs_of_every_host(policy):
    """For any W: what comes out, (XW)ᵀ(XW), is Wᵀ(XᵀX)W."""
    model, data = hosts_model(policy), hosts_data()
    found = seen_by(model, data)
    assert {path.split("/")[-1] for path in found} == set(HOSTS)
    for path, target in find_targets(model).items():
        layer, seen = target.owner, found[path]
        norm = keras.Model(model.inputs, layer.input)
        x = norm(data, training=False)
        kernel = ops.cast(layer._kernel.value, layer.compute_dtype)
        options = dict(bias=None, activation=None, _kernel=kernel)
        plain = target.plain_layer(**options)
        y = numpy(
            target.view.flatten_outputs(
                plain.call(ops.cast(x, layer.compute_dtype))
            )
        )
        y = y.astype("float64")
        w = numpy(target.view.to_matrix(layer._kernel.value)).astype("float64")
        tolerance = 1e-5 if policy == "float32" else 3e-2
        assert_close(w.T @ seen.gram @ w, y.T @ y, tolerance, path)
        assert_close(seen.total @ w, y.sum(axis=0), tolerance, path)
        assert seen.count == len(y)


def test_padding_does_not_count():
    data = tokens(batch=3, length=6)
    data["padding_mask"][:, 4:] = 0
    other = {k: x.copy() for k, x in data.items()}
    other["token_ids"][:, 4:] = 7
    short = {k: x[:, :4] for k, x in data.items()}
    model = tiny_gemma()
    expected = seen_by(model, short)
    for padded in (data, other):
        for path, seen in seen_by(model, padded).items():
            assert seen.count == expected[path].count == 12
            assert_close(seen.gram, expected[path].gram, 1e-5, path)
    data["padding_mask"][:] = 1
    for path, seen in seen_by(model, data).items():
        assert seen.count == 18
        assert_differ(seen.gram, expected[path].gram, path)


def test_a_mask_of_keras_counts():
    x = keras.Input((5,), dtype="int32")
    y = keras.layers.Embedding(9, 4, mask_zero=True)(x)
    y = keras.layers.Dense(3, name="dense")(y)
    y = keras.layers.GlobalAveragePooling1D()(y)
    model = keras.Model(x, keras.layers.Dense(2, name="head")(y))
    ids = np.array([[3, 4, 0, 0, 0], [5, 6, 7, 8, 0]], "int32")
    found = seen_by(model, ids)
    assert {k: x.count for k, x in found.items()} == {"dense": 6, "head": 2}


def test_two_masks_of_one_shape_are_refused():
    model = keras_hub.models.BartBackbone(
        vocabulary_size=16,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=8,
    )

    def data(length):
        return {
            f"{side}_{key}": np.ones((2, n), "int32")
            for side, n in (("encoder", 6), ("decoder", length))
            for key in ("token_ids", "padding_mask")
        }

    model.enable_eva(2, data=data(4))
    model.remove_adapter()
    with pytest.raises(ValueError, match="Either of .* different lengths"):
        model.enable_eva(2, data=data(6))


def test_a_layer_that_is_called_twice():
    dense = keras.layers.Dense(6, name="twice")
    x = keras.Input((6,))
    model = keras.Model(x, dense(dense(x)))
    hidden = numpy(dense(X)).astype("float64")
    (seen,) = seen_by(model, X).values()
    assert seen.count == 40
    assert_close(seen.gram, X.T @ X + hidden.T @ hidden, 1e-5)


def test_layers_with_one_input_share_what_is_held():
    model, data = tiny_gemma(num_layers=1), tokens()
    targets = find_targets(model)
    read = batches.read_batches(model, data, 8)
    sums = capture.input_sums(model, targets, read, "reading")
    grams = {path.split("/")[-1]: id(x[-1]) for path, x in sums.items()}
    assert grams["query"] == grams["key"] == grams["value"]
    assert grams["ffw_gating"] == grams["ffw_gating_2"]
    assert len(set(grams.values())) == 4


def test_groups_of_layers_and_batches(monkeypatch):
    expected = enabled(EVA(rank=2, data=X))
    gradients = enabled(LoRAGA(rank=2, data=(X, Y)))
    calls = []
    original = capture._over_batches

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(capture, "_over_batches", counted)
    monkeypatch.setattr(capture, "GROUP_BYTES", 1)
    assert_same(enabled(EVA(rank=2, data=X)), expected)
    assert len(calls) == 2
    assert_close(enabled(LoRAGA(rank=2, data=(X, Y))), gradients, 1e-5)
    assert len(calls) == 4


def test_inputs_have_a_covariance():
    x = X.astype("float64")
    found = Inputs(len(x), x.sum(axis=0), x.T @ x).covariance
    assert_close(found, np.cov(x.T, bias=True), 1e-12)


# The forms of data.


class Listed(keras.utils.PyDataset):
    """As `Pairs`, with a list for each batch."""

    def __init__(self, x, y):
        super().__init__()
        self.pairs = Pairs(x, y)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return list(self.pairs[i])


class Pairs(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return self.x[4 * i : 4 * i + 4], self.y[4 * i : 4 * i + 4]


def loader(x, y):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return torch.utils.data.DataLoader(data, batch_size=4)  # of lists


def batches_of_4(x, y):
    return ((x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4))


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: (ops.convert_to_tensor(x), ops.convert_to_tensor(y)),
        lambda x, y: (x.astype("float64"), y),
        lambda x, y: (x, y, np.ones(len(x), "float32")),
        Pairs,
        Listed,
        loader,
        batches_of_4,
        lambda x, y: list_of(batches_of_4(x, y)),
    ],
    ids=[
        "arrays",
        "tensors",
        "float64",
        "weights",
        "py",
        "py_of_lists",
        "loader",
        "generator",
        "iterable",
    ],
)
def test_forms_of_data(form):
    x, y = X[:16], Y[:16]
    method = LoRAGA(rank=2, data=form(X, Y), examples=16)
    expected = enabled(LoRAGA(rank=2, data=(x, y)))
    assert_close(enabled(method), expected, 1e-4)


class list_of:  # noqa: N801
    """An iterable that is no list, which may be read again."""

    def __init__(self, items):
        self.items = list(items)

    def __iter__(self):
        return iter(self.items)


def test_a_dataset_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    expected = enabled(LoRAGA(rank=2, data=(X, Y)))
    assert_close(enabled(LoRAGA(rank=2, data=data)), expected, 1e-5)


def test_no_more_than_the_examples_are_read():
    def endless():
        while True:
            read.append(1)
            yield X[:8]

    read = []
    model = small_model()
    keras_svdtune.enable_eva(model, 2, data=endless(), examples=20)
    assert len(read) == 3


@pytest.mark.parametrize("examples", [4, 8, 13])
def test_no_more_rows_of_an_array_are_read(examples):
    found = enabled(EVA(rank=2, data=X, examples=examples))
    assert_close(found, enabled(EVA(rank=2, data=X[:examples])), 1e-6)


class Words(keras_hub.models.Preprocessor):
    """Makes tokens of the lengths of words, with padding."""

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        ids = np.zeros((len(x), 9), "int32")
        for row, text in zip(ids, x, strict=True):
            lengths = [len(word) for word in text.split()]
            row[: len(lengths)] = lengths
        mask = ids > 0
        inputs = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
        return inputs, ids[:, 1:], mask[:, 1:].astype("float32")


TEXTS = [
    "where is the treasure of the captain",
    "a ship",
    "nobody knows who it was",
    "seven seas are far too many",
]


@pytest.mark.parametrize("cls", [EVA, CorDA, LoRAGA])
def test_texts_for_a_task(cls):
    task = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(), preprocessor=Words()
    )
    arrays = task.preprocessor.call(TEXTS)
    with must_stay(task.backbone, arrays[0], compiled=False):
        task.enable_adapter(cls(rank=2, data=TEXTS))
        found = start_of(task.backbone)
        task.remove_adapter()
    task.preprocessor = None
    task.enable_adapter(cls(rank=2, data=arrays))
    assert_same(start_of(task.backbone), found)
    task.remove_adapter()
    if cls is not LoRAGA:  # the backbone alone sees the same
        keras_svdtune.enable_adapter(task.backbone, cls(rank=2, data=arrays[0]))
        assert_close(start_of(task.backbone), found, 1e-5)
        task.remove_adapter()
        with pytest.raises(ValueError, match="takes no text. Call this on"):
            task.backbone.enable_adapter(cls(rank=2, data=TEXTS))
        return
    with pytest.raises(ValueError, match="has none. Of a Backbone take"):
        task.backbone.enable_adapter(cls(rank=2, data=arrays))


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 1]])
def test_texts_in_a_loader_of_torch(labels):
    torch = pytest.importorskip("torch")
    task = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(), preprocessor=Words()
    )
    task.enable_adapter(EVA(rank=2, data=TEXTS))
    expected = start_of(task.backbone)
    task.remove_adapter()
    texts = TEXTS if labels is None else list(zip(TEXTS, labels, strict=True))
    data = torch.utils.data.DataLoader(texts, batch_size=2)
    task.enable_adapter(EVA(rank=2, data=data))
    assert_close(start_of(task.backbone), expected, 1e-5)


# What follows from there being no data.


@pytest.mark.parametrize("cls", [EVA, CorDA, LoRAGA])
def test_a_file_needs_no_data_and_none_is_kept(cls, tmp_path):
    data = keras.utils.PyDataset.__new__(Pairs)
    Pairs.__init__(data, X, Y)
    alive = weakref.ref(data)
    model = small_model(compiled=True)
    keras_svdtune.enable_adapter(model, cls(rank=2, data=data))
    del data
    gc.collect()
    assert alive() is None
    method = keras_svdtune.adapter_summary(model).method
    assert method == cls(rank=2) and "data" not in repr(method)
    perturb(model)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path)
    fresh = small_model()
    keras_svdtune.load_adapter(fresh, path)
    assert_same(start_of(fresh), start_of(model))
    assert_same(eager(fresh, X), eager(model, X))
    # And over another start.
    other = small_model(compiled=True)
    keras_svdtune.enable_adapter(other, cls(rank=2, data=(X[:4], Y[:4])))
    keras_svdtune.load_adapter(other, path)
    assert_same(eager(other, X), eager(model, X))


@pytest.mark.parametrize("cls", [EVA, CorDA, LoRAGA])
def test_beside_another_each_has_its_own_start(cls, tmp_path):
    model = small_model(compiled=True)
    base = eager(model, X)
    one, two = (X[:8], Y[:8]), (X[8:], Y[8:])
    expected = [enabled(cls(rank=2, data=data)) for data in (one, two)]
    keras_svdtune.enable_adapter(model, cls(rank=2, data=one), name="one")
    perturb(model)
    learned = eager(model, X)
    keras_svdtune.enable_adapter(model, cls(rank=2, data=two), name="two")
    assert_close(start_of(model), expected[1], 1e-5)
    assert_same(eager(model, X), base)
    keras_svdtune.set_adapter(model, "one")
    assert_same(eager(model, X), learned)


def test_beside_another_each_layer_has_its_own_rank():
    model = small_model()
    first = enabled(EVA(rank=3, data=X), model, rank_pattern={"first": 2})
    keras_svdtune.remove_adapter(model)
    patterns = {"rank_pattern": {"first": 2}}
    keras_svdtune.enable_eva(model, 3, data=X, name="a", **patterns)
    perturb(model)
    keras_svdtune.enable_eva(model, 3, data=X, name="b")
    assert_close(start_of(model), first, 1e-5)
    keras_svdtune.enable_eva(model, 3, data=X, name="c", **patterns)
    assert_close(start_of(model), first, 1e-5)


@pytest.mark.parametrize(
    "method, options, message",
    [
        (EVA(rank=2, data=iter([])), {"name": "a"}, "an adapter 'a' already"),
        (CorDA(rank=2, data=iter([])), {"name": "b"}, "have one method"),
        (EVA(rank=3, data=iter([])), {"name": "b"}, "have one method"),
        (
            EVA(rank=2, data=iter([])),
            {"name": "b", "target_layer_names": ["first"]},
            "on the same layers",
        ),
        (
            EVA(rank=2, data=iter([])),
            {"name": "b", "rank_pattern": {"first": 1}},
            "same settings in each layer",
        ),
    ],
)
def test_what_does_not_fit_beside_another_reads_no_data(
    method, options, message
):
    model = small_model()
    keras_svdtune.enable_eva(model, 2, data=X, name="a")
    with pytest.raises(ValueError, match=message):
        keras_svdtune.enable_adapter(model, method, **options)


@pytest.mark.parametrize("cls", [EVA, CorDA, LoRAGA])
def test_weights_of_another_base_keep_the_start(cls, tmp_path):
    model = small_model(compiled=True)
    keras_svdtune.enable_adapter(model, cls(rank=2, data=(X, Y)))
    before = start_of(model)
    other = small_model()
    perturb_all(other)
    other.save_weights(tmp_path / "other.weights.h5")
    model.load_weights(tmp_path / "other.weights.h5")
    assert_same(start_of(model), before)
    assert_close(eager(model, X), eager(other, X), 1e-6)


def perturb_all(model):
    for v in model.weights:
        v.assign(numpy(v) + 0.5)


def test_declared_layers_start_without_data():
    w = np.random.default_rng(0).standard_normal((6, 5)).astype("float32")
    plain = keras.layers.Dense(5)
    plain.build((None, 6))
    plain.kernel.assign(w)
    eva = keras_svdtune.EVADense.from_layer(plain, rank=2)
    bound = np.abs(numpy(eva.adapter.a)).max()
    assert 0 < bound <= 1 / np.sqrt(6)
    u, s, vt = np.linalg.svd(w)
    for goal, part in (("learn", slice(0, 2)), ("keep", slice(-2, None))):
        layer = keras_svdtune.CorDADense.from_layer(plain, rank=2, goal=goal)
        a0, b0 = numpy(layer.adapter.a0), numpy(layer.adapter.b0)
        expected = (u[:, :5][:, part] * s[part]) @ vt[part]
        assert_close(a0 @ b0, expected, 1e-5)
    with pytest.raises(ValueError, match="sees no data when it is built"):
        keras_svdtune.EVADense(5, rank=2, data=X)


# What is refused.


@pytest.mark.parametrize("cls", [EVA, CorDA, LoRAGA])
def test_without_data(cls):
    model = small_model(compiled=True)
    with (
        must_stay(model, X, compiled=False),
        pytest.raises(ValueError, match="starts from data. Give it what `fit`"),
    ):
        keras_svdtune.enable_adapter(model, cls(rank=2))


@pytest.mark.parametrize(
    "data, message",
    [
        ("a text", "`data` must be what `fit` takes"),
        (7, "`data` must be what `fit` takes"),
        ([], "must hold an example"),
        ((X, Y[:3]), "as many rows"),
        (iter([np.float32(1.0)]), "a first axis for the examples"),
        (X * np.nan, "gets NaN or infinity"),
        (X * 0.0, "or nothing but zeros: small/first"),
    ],
)
def test_bad_data(data, message):
    model = small_model()
    with (
        must_stay(model, X, compiled=False),
        pytest.raises(ValueError, match=message),
    ):
        keras_svdtune.enable_eva(model, 2, data=data)


def test_layers_that_data_does_not_reach():
    x, z = keras.Input((6,), name="x"), keras.Input((6,), name="z")
    used, unused = (keras.layers.Dense(5, name=n) for n in ("used", "unused"))
    model = keras.Model([x, z], used(x) + unused(z))
    zeros = np.zeros_like(X)
    for method in (EVA(2, data=[X, zeros]), CorDA(2, data=[X, zeros])):
        with (
            must_stay(model, [X, X], compiled=False),
            pytest.raises(ValueError, match="but zeros: unused. .*`exclude`"),
        ):
            keras_svdtune.enable_adapter(model, method)
    keras_svdtune.enable_eva(model, 2, data=[X, zeros], exclude=["unused"])
    assert list(start_of(model)) == ["used"]
    keras_svdtune.remove_adapter(model)
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="does not depend on these layers: un"):
        data = ([X, zeros], np.zeros((20, 5)))
        keras_svdtune.enable_lora_ga(model, 2, data=data)


def test_a_gradient_needs_a_loss_and_targets():
    model = small_model()
    with pytest.raises(ValueError, match="`compile` any other model with"):
        keras_svdtune.enable_lora_ga(model, 2, data=(X, Y))
    model.compile(loss="mse")
    with (
        must_stay(model, X, compiled=False),
        pytest.raises(ValueError, match="what the loss compares with"),
    ):
        keras_svdtune.enable_lora_ga(model, 2, data=X)
    keras_svdtune.enable_lora_ga(model, 2, data=(X, Y))


def test_quantized_layers():
    model = small_model(compiled=True)
    expected = enabled(EVA(rank=2, data=X), small_model())
    model.quantize("int8")
    with pytest.raises(ValueError, match="has no gradient.*`exclude`"):
        keras_svdtune.enable_lora_ga(model, 2, data=(X, Y))
    keras_svdtune.enable_eva(model, 2, data=X)
    assert_close(start_of(model, "first"), {"first": expected["first"]}, 1e-5)


def test_direct_kernels():
    x = keras.Input((6, 3))
    y = keras.layers.SeparableConv1D(4, 2, name="separable")(x)
    model = keras.Model(x, keras.layers.Dense(2, name="dense")(y))
    model.compile(loss="mse")
    data = np.random.default_rng(0).standard_normal((4, 6, 3))
    with pytest.raises(ValueError, match="another layer reads.*`exclude`"):
        keras_svdtune.enable_eva(model, 2, data=data)
    keras_svdtune.enable_eva(model, 2, data=data, exclude=["pointwise_kernel"])
    keras_svdtune.remove_adapter(model)
    targets = np.ones((4, 5, 2), "float32")
    keras_svdtune.enable_lora_ga(model, 2, data=(data, targets))


def test_within_a_remat_scope():
    expected = enabled(EVA(rank=2, data=X), small_model())
    with keras.RematScope(mode="full"):
        model = small_model()
    modes = [x._remat_mode for x in model.layers]
    assert all(modes)
    assert_same(enabled(EVA(rank=2, data=X), model), expected)
    assert [x._remat_mode for x in model.layers] == modes


@pytest.mark.parametrize("settings", [{"examples": 0}, {"examples": 1.5}])
def test_numbers(settings):
    with pytest.raises(ValueError, match="`examples` must be an integer"):
        EVA(rank=2, **settings)
    with pytest.raises(ValueError, match="`goal` must be 'learn'"):
        CorDA(rank=2, goal="kpm")
    with pytest.raises(ValueError, match="`gamma` must be a number"):
        LoRAGA(rank=2, gamma=0)


def test_to_lora_makes_it_a_lora():
    model = small_model()
    keras_svdtune.enable_eva(model, 2, data=X)
    perturb(model)
    before = eager(model, X)
    keras_svdtune.to_lora(model)
    summary = keras_svdtune.adapter_summary(model)
    assert summary.method == keras_svdtune.LoRA(rank=2)
    assert_close(eager(model, X), before, 1e-6)
