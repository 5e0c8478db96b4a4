"""QPiSSA: against the algorithm written once more in NumPy, and every promise
of an adapter whose base is quantized with it."""

import keras
import keras_hub
import numpy as np
import pytest
import threadpoolctl
from helpers import (
    adapted,
    assert_close,
    assert_differ,
    assert_same,
    eager,
    error,
    must_stay,
    numpy,
    perturb,
    randomise,
    tiny_gemma,
    tokens,
)
from keras import layers, ops
from test_hosts import experts, normal, same_function, trains_alone

import keras_svdtune
from keras_svdtune import DoRA, LoRA, PiSSA, PiSSADense
from keras_svdtune.adapter import plan
from keras_svdtune.hosts import attach, replace_base
from keras_svdtune.matrix.decompose import decompose
from keras_svdtune.model.targets import find_targets

MODES = ("int8", "int4")
FEW_NAMES = ["query", "ffw_linear"]
NAMES = ("dense", "query", "output")
# More than the 128 rows that share a scale in int4.
ROWS, HEADS, HEAD_DIM, COLUMNS = 150, 2, 10, 24
X = np.random.default_rng(5).standard_normal((3, 2, ROWS)).astype("float32")
Y = np.random.default_rng(6).standard_normal((3, 2, COLUMNS)).astype("float32")


# How far one more rounding of three kernels may move an output, relative.
ROUNDING = {"int8": 0.02, "int4": 0.3}


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """For small matrices, and other tests beside these, the fastest."""
    with threadpoolctl.threadpool_limits(1, "blas"):
        yield


def float_model(dtype="float32", seed=0):
    """Kernels of every layout, with a few large components."""
    x = keras.Input((2, ROWS))
    y = layers.Dense(ROWS, activation="tanh", name="dense", dtype=dtype)(x)
    y = layers.EinsumDense(
        "btd,ndh->btnh",
        (None, HEADS, HEAD_DIM),
        bias_axes="nh",
        name="query",
        dtype=dtype,
    )(y)
    y = layers.EinsumDense(
        "btnh,nhd->btd", (None, COLUMNS), name="output", dtype=dtype
    )(y)
    y = layers.Identity(dtype="float32")(ops.cast(y, "float32"))
    model = keras.Model(x, y, name="qpissa")
    randomise(model, seed)
    rng = np.random.default_rng(seed + 1)
    for name in NAMES:
        kernel = model.get_layer(name)._kernel
        rows, columns = matrix(model, name).shape
        u = rng.standard_normal((rows, 2)) / np.sqrt(rows)
        v = rng.standard_normal((2, columns))
        w = numpy(kernel) * 0.3 + to_kernel(name, u @ v)
        kernel.assign(w.astype("float32"))
    return model


def matrix(model, name):
    """W, or what stands in its place."""
    return numpy(find_targets(model, adapted=True)[name].matrix())


def qpissa(mode="int4", rank=4, **settings):
    return PiSSA(rank, quantize=mode, **settings)


def enabled(mode="int4", dtype="float32", **settings):
    model = float_model(dtype)
    keras_svdtune.enable_adapter(model, qpissa(mode, **settings))
    return model


# The algorithm once more, in NumPy and float64.


def to_matrix(name, kernel):
    if name == "query":
        return kernel.transpose(1, 0, 2).reshape(ROWS, HEADS * HEAD_DIM)
    return kernel.reshape(-1, kernel.shape[-1])


def to_kernel(name, matrix):
    if name == "query":
        parts = matrix.reshape(ROWS, HEADS, HEAD_DIM)
        return parts.transpose(1, 0, 2)
    if name == "output":
        return matrix.reshape(HEADS, HEAD_DIM, COLUMNS)
    return matrix


def quantized(name, matrix, mode):
    """dequant(quant(W)): int8 with a scale for each output, int4 with a scale
    and a zero for each 128 rows and column of the kernel, as it is stored."""
    if mode == "int8":
        scale = 127 / (np.abs(matrix).max(axis=0) + 1e-7)
        return np.clip(np.round(matrix * scale), -127, 127) / scale
    kernel = to_kernel(name, matrix)
    flat = kernel.reshape(matrix.shape)
    found = []
    for start in range(0, len(flat), 128):
        rows = flat[start : start + 128]
        low, high = rows.min(axis=0), rows.max(axis=0)
        if len(rows) < 128:  # Keras fills up with zeros
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low + 1e-7) / 15
        zero = np.clip(np.round(-low / scale) - 8, -8, 7)
        code = np.clip(np.round(rows / scale) + zero, -8, 7)
        found.append((code - zero) * scale)
    return to_matrix(name, np.concatenate(found).reshape(kernel.shape))


def top(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def algorithm(name, w, mode, rank, iterations):
    """(A·B, Q) by the paper's algorithm."""
    product = top(w, rank)
    q = quantized(name, w - product, mode)
    for _ in range(2, iterations + 1):
        product = top(w - q, rank)
        q = quantized(name, w - product, mode)
    return product, q


def float_matrices():
    model = float_model()
    return {
        name: to_matrix(name, numpy(model.get_layer(name)._kernel))
        for name in NAMES
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [{"iterations": 1}, {}, {"iterations": 2, "alpha": 8.0}],
    ids=str,
)
def test_is_the_algorithm(mode, settings):
    model = enabled(mode, **settings)
    for name, w in float_matrices().items():
        layer = model.get_layer(name)
        w = w.astype("float64")
        product, q = algorithm(name, w, mode, 4, settings.get("iterations", 5))
        k = settings.get("alpha", 4.0) / 4
        a0, b0 = (numpy(getattr(layer.adapter, x)) for x in ("a0", "b0"))
        assert error(k * (a0 @ b0), product) < 1e-4, name
        assert error(matrix(model, name), q) < 1e-4, name
        # √s on both sides.
        norms = np.linalg.norm(a0, axis=0), np.linalg.norm(b0, axis=1)
        np.testing.assert_allclose(*norms, rtol=1e-4)
        errors = keras_svdtune.quantization_error(model).layers
        (row,) = (x for x in errors if x.path == name)
        plain = np.linalg.norm(w - quantized(name, w, mode))
        left = np.linalg.norm(w - product - q)
        np.testing.assert_allclose(row.norm, np.linalg.norm(w), rtol=1e-4)
        np.testing.assert_allclose(row.plain, plain, rtol=1e-3)
        np.testing.assert_allclose(row.error, left, rtol=1e-3)
        np.testing.assert_allclose(row.reduction, 1 - left / plain, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_error_falls(mode):
    found = [
        keras_svdtune.quantization_error(enabled(mode, iterations=n))
        for n in (1, 5)
    ]
    for once, often in zip(*(x.layers for x in found), strict=True):
        assert often.error < 0.98 * once.error < 0.98 * once.plain, once
    assert 0.05 < found[0].reduction < found[1].reduction < 1
    found[1].print()


def test_a_randomised_decomposition_and_a_rank_by_energy():
    exact = keras_svdtune.quantization_error(enabled())
    near = keras_svdtune.quantization_error(enabled(n_iter=8))
    np.testing.assert_allclose(near.reduction, exact.reduction, atol=0.02)
    model = enabled(rank=0.8)
    for name, w in float_matrices().items():
        s = np.linalg.svd(w.astype("float64"), compute_uv=False) ** 2
        rank = int(np.argmax(np.cumsum(s) >= 0.8 * s.sum())) + 1
        layer = model.get_layer(name)
        assert layer.adapter.a0.shape[1] == rank
        assert layer.adapter.method.quantize == "int4"
    assert keras_svdtune.quantization_error(model).reduction > 0.05


# Training.


def test_only_a_and_b_train():
    model = enabled("int8", "bfloat16")
    first, plain = eager(model, X), eager(float_model("bfloat16"), X)
    assert 0 < error(first, plain) < ROUNDING["int8"]
    assert len(model.trainable_variables) == 2 * len(NAMES)
    for name in NAMES:
        layer = model.get_layer(name)
        assert layer.quantization_mode == "int8"
        assert layer._kernel.dtype == "int8" and layer.dtype_policy.name
        values = layer.adapter.variables_by_name()
        assert {v.dtype for v in values.values()} == {"float32"}
    trains_alone(model, X, Y)


def test_gradients_are_those_of_the_whole_matrix():
    """int4 quantizes no input, so the layer is x·(Q + k·A·B)."""
    model = enabled(alpha=6.0)
    perturb(model)
    layer = model.get_layer("dense")
    adapter = layer.adapter
    x, q = ops.convert_to_tensor(X), matrix(model, "dense")

    def dense():
        now = adapter.current
        a, b = now.a0 + now.delta_a, now.b0 + now.delta_b
        w = ops.convert_to_tensor(q) + 1.5 * ops.matmul(a, b)
        return ops.tanh(ops.matmul(x, w) + layer.bias)

    trained = [adapter.delta_a, adapter.delta_b]
    same_function(lambda: layer(x), dense, trained)
    a, b = adapter.method.low_rank_factors(adapter.current)
    assert a.shape[1] == 4
    merged = numpy(adapter.merged(q))
    assert error(merged, numpy(q) + numpy(a) @ numpy(b)) < 1e-5


# Removed, merged, saved: what `test_hosts.py` leaves to say.


@pytest.mark.parametrize("mode", MODES)
def test_merged_is_quantized_once_more(mode):
    model = enabled(mode)
    perturb(model, size=0.05)
    moved = eager(model, X)
    merged = {x: numpy(model.get_layer(x).merged_kernel()) for x in NAMES}
    keras_svdtune.merge_adapter(model)
    for name, kernel in merged.items():
        assert model.get_layer(name).quantization_mode == mode
        expected = quantized(name, to_matrix(name, kernel), mode)
        assert error(matrix(model, name), expected) < 1e-4, name
    assert error(eager(model, X), moved) < ROUNDING[mode]
    assert [v.path for v in model.trainable_variables] == [
        "dense/bias",
        "query/bias",
    ]


@pytest.mark.parametrize("mode", MODES)
def test_removed_is_the_start_quantized_once_more(mode):
    model = enabled(mode)
    whole = {}
    for name in NAMES:
        adapter = model.get_layer(name).adapter
        start = numpy(adapter.a0) @ numpy(adapter.b0)
        whole[name] = matrix(model, name) + start
    perturb(model)
    keras_svdtune.remove_adapter(model)
    for name, w in whole.items():
        assert error(matrix(model, name), quantized(name, w, mode)) < 1e-4, name
    assert error(eager(model, X), eager(float_model(), X)) < ROUNDING[mode]
    # An adapter for a quantized base goes onto it.
    keras_svdtune.enable_adapter(model, LoRA(2))


def test_a_file_on_a_base_in_bfloat16(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = enabled("int8", "bfloat16", alpha=6.0, n_iter=2)
    perturb(model, size=0.05)
    weights = {v.path: numpy(v) for v in model.weights}
    keras_svdtune.save_adapter(model, path)
    fresh = float_model("bfloat16")
    keras_svdtune.load_adapter(fresh, path)
    # Equal weights; torch rounds by where in memory they lie.
    assert_close(eager(fresh, X), eager(model, X), 1e-2)
    assert_same({v.path: numpy(v) for v in fresh.weights}, weights, "weights")
    reported = keras_svdtune.quantization_error(fresh)
    assert reported == keras_svdtune.quantization_error(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of the adapter for a float32 base in int4."""
    path = tmp_path_factory.mktemp("saved") / "adapter.safetensors"
    keras_svdtune.save_adapter(enabled(), path)
    return path


def plain_quantized():
    model = float_model()
    model.quantize("int4")
    return model


def trained_further():
    model = float_model()
    kernel = model.get_layer("query")._kernel
    kernel.assign(numpy(kernel) + 1e-3)
    return model


def with_pissa():
    model = float_model()
    keras_svdtune.enable_adapter(model, PiSSA(4))
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (plain_quantized, "'dense' is quantized to int4 already"),
        (trained_further, "layer 'query' is not the one"),
        (lambda: float_model("bfloat16"), "in float32"),
        (lambda: float_model("float16"), "float16"),
        (lambda: enabled("int8"), "remove_adapter"),
        (lambda: enabled("int4", iterations=1), "remove_adapter"),
        (with_pissa, "remove_adapter"),
    ],
    ids=[
        *("quantized", "trained", "bfloat16", "float16", "int8"),
        *("iterations", "pissa"),
    ],
)
def test_a_file_on_another_base(make, message, saved):
    model = make()
    stays = must_stay(model, X, compiled=False)
    with stays, pytest.raises(ValueError, match=message):
        keras_svdtune.load_adapter(model, saved)


def test_a_file_with_another_start(tmp_path):
    """As from a device that decomposes otherwise: the base would not fit."""
    path = tmp_path / "adapter.safetensors"
    model = enabled()
    adapter = model.get_layer("query").adapter
    adapter.a0.assign(numpy(adapter.a0) * 1.0001)
    keras_svdtune.save_adapter(model, path)
    with pytest.raises(ValueError, match="another 'a0' for layer 'query'"):
        keras_svdtune.load_adapter(enabled(), path)


def test_a_quantizer_that_rounds_otherwise(monkeypatch, saved):
    """As from another release of Keras."""
    original = replace_base.quantized_copy
    config = keras.quantizers.Int4QuantizationConfig(block_size=16)
    monkeypatch.setattr(
        replace_base, "quantized_copy", lambda *x: original(*x, config)
    )
    model = float_model()
    stays = must_stay(model, X, compiled=False)
    with stays, pytest.raises(ValueError, match="is quantized otherwise here"):
        keras_svdtune.load_adapter(model, saved)


def test_a_full_save_on_another_base(tmp_path):
    path = tmp_path / "full.weights.h5"
    model = enabled()
    model.save_weights(path)
    # Not where the base was quantized otherwise.
    other = enabled(iterations=1)
    before = eager(other, X)
    with pytest.raises(ValueError, match="another base kernel"):
        other.load_weights(path)
    assert_same(eager(other, X), before, "as it was")
    # Nor is a plain model read into the rest of another.
    keras_svdtune.merge_adapter(model)
    model.save_weights(path)
    with pytest.raises(ValueError, match="made for its adapter"):
        other.load_weights(path)
    assert_same(eager(other, X), before, "as it was")


def test_a_saved_model(tmp_path):
    gemma = tiny_gemma(num_layers=1)
    gemma.enable_pissa(2, quantize="int4", target_layer_names=FEW_NAMES)
    perturb(gemma, size=0.05)
    gemma.save(tmp_path / "gemma.keras")
    gemma.merge_adapter()
    loaded = keras.saving.load_model(tmp_path / "gemma.keras")
    assert not adapted(loaded)
    assert_same(eager(loaded, tokens()), eager(gemma, tokens()))


# All or nothing.


@pytest.mark.parametrize("where", ["quantized_build", "quantize", "Adapter"])
def test_an_interrupt_leaves_the_float_model(where, monkeypatch):
    """While its second layer is quantized, or gets its adapter."""
    model = float_model()
    model.get_layer("query").trainable = False
    ours, calls = [model.get_layer(x) for x in NAMES], []

    def interrupt(owner):
        original = getattr(owner, where)

        def interrupted(*args, **kwargs):
            if where == "quantized_build" and args[0] not in ours:
                return original(*args, **kwargs)
            calls.append(args)
            result = original(*args, **kwargs)
            if len(calls) == 2:
                raise KeyboardInterrupt  # half done: no policy, no values yet
            return result

        monkeypatch.setattr(owner, where, interrupted)

    with must_stay(model, X, compiled=where == "quantized_build"):
        if where == "quantized_build":
            interrupt(layers.Dense)
            interrupt(layers.EinsumDense)
        else:
            interrupt(replace_base if where == "quantize" else attach)
        with pytest.raises(KeyboardInterrupt):
            keras_svdtune.enable_adapter(model, qpissa(iterations=1))
        assert len(calls) == 2
        monkeypatch.undo()
    for layer in ours:
        assert layer.quantization_mode is None
        assert not hasattr(layer, "kernel_scale")
    keras_svdtune.enable_adapter(model, qpissa(iterations=1))
    assert_same(
        eager(model, X), eager(enabled(iterations=1), X), "the next try"
    )


def test_it_trains_after_an_interrupt(monkeypatch):
    """The float kernel is the optimizer's again, under its own name."""
    model, twin = float_model(), float_model()
    monkeypatch.setattr(attach, "Adapter", None)
    with pytest.raises(TypeError):
        keras_svdtune.enable_adapter(model, qpissa(iterations=1))
    for each in (model, twin):
        each.compile(keras.optimizers.SGD(0.1), "mse")
        each.fit(X, Y, verbose=0)
    for ours, theirs in zip(model.weights, twin.weights, strict=True):
        # To torch's rounding, which differs from run to run.
        assert error(ours, theirs) < 1e-5, ours.path
    assert_differ(eager(model, X), eager(float_model(), X))


# What is refused.


def sequential(shape, layer):
    model = keras.Sequential([layers.Input(shape), layer, layers.Dense(4)])
    return model, np.ones((1, *shape), "float32")


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: sequential((8, 8, 3), layers.Conv2D(6, 3, name="conv")),
            "'.*conv' is a Conv2D",
        ),
        (
            lambda: sequential((6,), layers.Dense(4, dtype="float16")),
            "' computes in float16",
        ),
        (
            lambda: (experts(), normal(5, 6)),
            "'experts.* is a kernel that another layer reads",
        ),
        (
            lambda: (plain_quantized(), X),
            "'dense' is quantized to int4 already",
        ),
    ],
    ids=["convolution", "half", "bank", "integers"],
)
def test_layers_that_are_not_quantized(make, message):
    model, x = make()
    stays = must_stay(model, x, compiled=False)
    with stays, pytest.raises(ValueError, match=message):
        keras_svdtune.enable_adapter(model, qpissa(rank=2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantize": "nf4"}, "'int8' or 'int4'.*Received: quantize='nf4'"),
        ({"quantize": 4}, "quantize=4"),
        ({"quantize": "int4", "iterations": 0}, "iterations=0"),
        ({"iterations": 2.0}, "iterations=2.0"),
        ({"iterations": True}, "iterations=True"),
    ],
    ids=str,
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PiSSA(4, **settings)


def test_a_declared_layer():
    with pytest.raises(ValueError, match="declared layer keeps its kernel"):
        PiSSADense(4, rank=2, quantize="int4")


def test_what_needs_the_float_base(tmp_path):
    path = tmp_path / "adapter.safetensors"
    gemma = tiny_gemma(num_layers=1)
    gemma.enable_pissa(2, quantize="int4", target_layer_names=FEW_NAMES)
    with must_stay(gemma, tokens(), compiled=False):
        for rank in (None, 2):
            with pytest.raises(ValueError, match="made for its adapter"):
                gemma.to_lora(rank)
            with pytest.raises(ValueError, match="made for its adapter"):
                gemma.export_peft(tmp_path / "peft", rank=rank)
    gemma.save_adapter(path)
    with pytest.raises(ValueError, match="do not add up"):
        keras_svdtune.compose({path: 0.5})
    whole = keras_svdtune.compose({path: 1.0})
    expected = eager(gemma, tokens())
    keras.backend.clear_session(free_memory=False)
    fresh = tiny_gemma(num_layers=1)
    fresh.load_adapter(whole)
    assert_same(eager(fresh, tokens()), expected)


@pytest.mark.parametrize("method", [PiSSA(4), DoRA(4)])
def test_no_error_where_nothing_was_quantized(method):
    model = float_model()
    with pytest.raises(ValueError, match="has no adapter"):
        keras_svdtune.quantization_error(model)
    keras_svdtune.enable_adapter(model, method)
    with pytest.raises(ValueError, match="'dense' was not quantized"):
        keras_svdtune.quantization_error(model)


# Backbones and tasks.


def test_on_a_task():
    gemma = tiny_gemma()
    task = keras_hub.models.GemmaCausalLM(backbone=gemma, preprocessor=None)
    keras_svdtune.estimate(task, qpissa(rank=2))
    task.enable_pissa(2, quantize="int4", target_layer_names=["query"])
    assert {x.name for x in adapted(gemma).values()} == {"query"}
    assert len(task.quantization_error().layers) == 2
    assert task.adapter_summary().trainable == 2 * 2 * (8 + 8)
    others = [x for x in gemma._flatten_layers() if x.name == "value"]
    assert {x.quantization_mode for x in others} == {None}
    before = eager(gemma, tokens())
    task.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    y = tokens(seed=1)["token_ids"]
    task.fit(tokens(), y, verbose=0)
    assert_differ(eager(gemma, tokens()), before)


def test_the_decomposition_of_each_round_is_the_methods_own(monkeypatch):
    seen = []

    def spy(matrix, needs, name):
        seen.append(needs)
        return decompose(matrix, needs, name)

    monkeypatch.setattr(plan, "decompose", spy)
    enabled(iterations=3, n_iter=2, seed=9)
    assert len(seen) == 3 * len(NAMES)
    assert {(x.rank, x.n_iter, x.seed) for x in seen} == {(4, 2, 9)}
