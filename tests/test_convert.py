"""Any adapter as a LoRA: exact where it can be, the best there is elsewhere,
and measured. An error or an interrupt leaves the model as it was."""

import keras
import numpy as np
import pytest
from helpers import (
    LINEAR,
    adapted,
    all_methods,
    assert_close,
    assert_same,
    eager,
    hosts_data,
    hosts_model,
    method_id,
    must_stay,
    numpy,
    perturb,
    predict,
    small_data,
    small_model,
    tiny_gemma,
    tokens,
    trainables,
)

import keras_svdtune
from keras_svdtune import SVF, SVFT, AdaLoRA, DoRA, LoRA, MiLoRA, PiSSA
from keras_svdtune.convert import low_rank_change
from keras_svdtune.hosts import attach
from keras_svdtune.model import enable

X, Y = small_data()
DATA = hosts_data(LINEAR)
# Methods without an exact form; the others have one without a rank.
NEED_A_RANK = ("svf", "svft", "dora")
METHODS = all_methods()
EXACT = [m for m in METHODS if m.name not in NEED_A_RANK]
every_method = pytest.mark.parametrize("method", METHODS, ids=method_id)


def adapted_hosts(method):
    """A model with every kind of layer, adapted and trained a little."""
    model = hosts_model(names=LINEAR)
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    return model


def changes(model):
    """dW = W' - W of every layer in float64, from the kernels."""
    found = {}
    for path, layer in adapted(model).items():
        view = layer.adapter.view
        w = numpy(view.to_matrix(layer._kernel.value)).astype("float64")
        found[path] = numpy(view.to_matrix(layer.merged_kernel())) - w
    return found


def singular_values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def ranks(model):
    return {p: x.adapter.method.rank for p, x in adapted(model).items()}


# What comes out.


@every_method
def test_exact(method):
    """Every method, at a rank that is enough: 6 is min(in, out) everywhere."""
    model = adapted_hosts(method)
    expected, before = eager(model, DATA), changes(model)
    exact = method.name not in NEED_A_RANK
    report = keras_svdtune.to_lora(model, None if exact else 6)
    assert report.method == method
    assert report.error < 1e-5
    assert all(x.error < 1e-5 for x in report.layers)
    assert all(type(x.adapter.method) is LoRA for x in adapted(model).values())
    assert_close(eager(model, DATA), expected, 1e-5)
    assert_close(changes(model), before, 1e-5)


@pytest.mark.parametrize("rank", [1, 3])
@every_method
def test_best_approximation(method, rank):
    """The report and the model, against NumPy's SVD in float64."""
    model = adapted_hosts(method)
    before = changes(model)
    report = keras_svdtune.to_lora(model, rank)
    assert set(ranks(model).values()) == {rank}
    missed, total = 0.0, 0.0
    for layer in report.layers:
        dw, path = before[layer.path], layer.path
        s = singular_values(dw)
        best = np.sqrt(np.sum(s[rank:] ** 2))
        assert layer.matrix == dw.shape and layer.rank == rank
        assert abs(layer.change - np.linalg.norm(dw)) < 1e-5 * layer.change
        assert abs(layer.error - best / np.linalg.norm(dw)) < 1e-5, path
        found = np.linalg.norm(dw - changes(model)[path]) / np.linalg.norm(dw)
        assert abs(layer.error - found) < 1e-5, path
        missed += best**2
        total += np.sum(s**2)
    assert abs(report.error - np.sqrt(missed / total)) < 1e-5


@pytest.mark.parametrize("cls, rank", [(PiSSA, 2), (MiLoRA, 3), (PiSSA, 5)])
def test_twice_the_rank(cls, rank):
    """And never more than a matrix can have."""
    model = adapted_hosts(cls(rank=rank))
    report = keras_svdtune.to_lora(model)
    assert set(ranks(model).values()) == {min(2 * rank, 6)}
    assert report.error < 1e-5


def test_pissa_is_the_concatenation():
    """[A A₀]·[B; -B₀], the same columns and rows in another order."""
    model = adapted_hosts(PiSSA(rank=2, alpha=4.0))
    path, layer = next(iter(adapted(model).items()))
    w = {
        name: numpy(getattr(layer.adapter, name))
        for name in ("a0", "b0", "delta_a", "delta_b")
    }
    a, b = w["a0"] + w["delta_a"], w["b0"] + w["delta_b"]
    thin = np.concatenate([a, w["a0"]], 1), np.concatenate([b, -w["b0"]], 0)
    keras_svdtune.to_lora(model)
    assert_close(changes(model)[path], 2.0 * thin[0] @ thin[1], 1e-5)


def test_a_rank_for_each_layer():
    model = adapted_hosts(PiSSA(rank=0.5))
    before = ranks(model)
    keras_svdtune.to_lora(model)
    assert ranks(model) == {p: 2 * r for p, r in before.items()}
    assert len(set(before.values())) > 1
    cost = keras_svdtune.adapter_summary(model)
    assert cost.method == LoRA(rank=2 * max(before.values()))


def test_the_current_rank_of_adalora():
    model = adapted_hosts(AdaLoRA(rank=3, initial_rank=4))
    kept = [np.array(x, "float32") for x in ([1, 0, 1, 1], [0] * 4)]
    layers = list(adapted(model).values())
    for layer, mask in zip(layers, kept, strict=False):
        layer.adapter.mask.assign(mask)
    expected = eager(model, DATA)
    keras_svdtune.to_lora(model)
    # A layer that has lost all of its ranks keeps one, which adds nothing.
    assert list(ranks(model).values()) == [3, 1, 4, 4, 4, 4, 4]
    assert_close(eager(model, DATA), expected, 1e-5)


@pytest.mark.parametrize("rank", [None, 4])
def test_lora_is_left_alone(rank):
    model = small_model(compiled=True)
    keras_svdtune.enable_adapter(model, LoRA(rank=4, alpha=8.0))
    model.fit(X, Y, verbose=0)
    adapters = [x.adapter for x in adapted(model).values()]
    optimizer = model.optimizer
    with must_stay(model, X):
        report = keras_svdtune.to_lora(model, rank)
    assert report.error < 1e-5
    assert [x.adapter for x in adapted(model).values()] == adapters
    assert model.optimizer is optimizer


def test_twice():
    model = adapted_hosts(SVF())
    keras_svdtune.to_lora(model, 5)
    expected = eager(model, DATA)
    report = keras_svdtune.to_lora(model, 5)
    assert report.method == LoRA(rank=5) and report.error < 1e-5
    assert_same(eager(model, DATA), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("method", EXACT[:1] + EXACT[-2:], ids=method_id)
def test_lower_precision(dtype, method):
    """dW is as exact as in float32, whatever the model computes in."""
    model = hosts_model(dtype, LINEAR)
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    report = keras_svdtune.to_lora(model)
    assert report.error < 1e-5
    for layer in adapted(model).values():
        assert layer.adapter.a.dtype == "float32"
        assert layer._kernel.dtype == layer.variable_dtype


def test_what_adds_nothing():
    """dW = 0: no error, and a LoRA that trains."""
    model = small_model(compiled=True)
    keras_svdtune.enable_svf(model)
    expected = predict(model, X)
    report = keras_svdtune.to_lora(model, 2)
    assert report.error == 0.0 and {x.error for x in report.layers} == {0.0}
    assert_same(predict(model, X), expected)
    losses = model.fit(X, Y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# The model afterwards.


@pytest.mark.parametrize("method", [SVF(), PiSSA(rank=2), DoRA(rank=2)])
def test_it_trains_and_is_given_back(method):
    model = small_model(compiled=True)
    model.get_layer("first").bias.trainable = False
    plain = [numpy(v) for v in model.weights]
    flags = [v.trainable for v in model.weights]
    base = predict(model, X)
    keras_svdtune.enable_adapter(model, method)
    model.fit(X, Y, epochs=3, verbose=0)  # compiles, and has an optimizer
    keras_svdtune.to_lora(model, 3)
    before = predict(model, X)

    names = {v.name for v in model.trainable_variables}
    assert names == {"lora_a", "lora_b"}
    assert len(model.trainable_variables) == 4
    start = trainables(model)
    losses = model.fit(X, Y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(
        not np.array_equal(v, start[p]) for p, v in trainables(model).items()
    )
    with keras_svdtune.adapter_disabled(model):
        assert_close(predict(model, X), base, 1e-6)
    assert np.abs(predict(model, X) - before).max() > 1e-4

    keras_svdtune.remove_adapter(model)
    assert_same([numpy(v) for v in model.weights], plain)
    assert [v.trainable for v in model.weights] == flags
    assert_same(predict(model, X), base)


def test_merge():
    model = adapted_hosts(SVFT())
    keras_svdtune.to_lora(model, 6)
    expected = eager(model, DATA)
    keras_svdtune.merge_adapter(model)
    assert not adapted(model)
    assert_close(eager(model, DATA), expected, 1e-5)


@pytest.mark.parametrize(
    "method, rank", [(PiSSA(rank=0.5), None), (SVF(), 3)], ids=["pissa", "svf"]
)
def test_save_and_load(method, rank, tmp_path):
    path = tmp_path / "lora.safetensors"
    model = adapted_hosts(method)
    keras_svdtune.to_lora(model, rank)
    expected = eager(model, DATA)
    keras_svdtune.save_adapter(model, path)
    fresh = hosts_model(names=LINEAR)
    keras_svdtune.load_adapter(fresh, path)
    assert ranks(fresh) == ranks(model)
    assert_same(eager(fresh, DATA), expected)
    keras_svdtune.load_adapter(model, path)  # onto what it was saved from
    assert_same(eager(model, DATA), expected)


def test_a_full_save_holds_the_merged_kernel(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = small_model()
    keras_svdtune.enable_svf(model)
    perturb(model)
    keras_svdtune.to_lora(model, 4)
    model.save_weights(path)
    plain = small_model()
    plain.load_weights(path)
    assert_close(predict(plain, X), predict(model, X), 1e-5)
    expected = predict(model, X)
    perturb(model)
    model.load_weights(path)
    assert_same(predict(model, X), expected)


def test_as_a_method_of_keras_hub():
    gemma = tiny_gemma()
    gemma.enable_svf()
    perturb(gemma)
    expected = eager(gemma, tokens())
    gemma.to_lora(rank=4)
    assert len(adapted(gemma)) == 14
    assert np.isfinite(eager(gemma, tokens())).all()
    assert not np.array_equal(eager(gemma, tokens()), expected)


def test_a_part_of_the_layers():
    gemma = tiny_gemma()
    gemma.enable_svf(target_layer_names=["query"])
    perturb(gemma)
    expected = eager(gemma, tokens())
    report = gemma.to_lora(rank=8)
    assert {x.path.rsplit("/")[-1] for x in report.layers} == {"query"}
    assert_close(eager(gemma, tokens()), expected, 1e-5)


def test_declared_layers():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras_svdtune.SVFDense(4, name="first"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.layers[0].adapter.delta.assign([0.1, -0.2, 0.3, 0.4])
    expected = predict(model, X)
    keras_svdtune.to_lora(model, 4)
    assert_close(predict(model, X), expected, 1e-5)
    assert [v.name for v in model.trainable_variables] == [
        "lora_a",
        "lora_b",
        "kernel",
        "bias",
    ]


def test_the_table():
    model = adapted_hosts(SVF())
    table = keras_svdtune.to_lora(model, 3).table()
    assert len(table.rows) == 7
    assert "SVF" in table.title


# Refused, and interrupted.


@pytest.mark.parametrize("method", [SVF(), SVFT(), DoRA(rank=2)], ids=method_id)
def test_a_rank_is_needed(method):
    model = small_model()
    keras_svdtune.enable_adapter(model, method)
    with must_stay(model, X), pytest.raises(ValueError) as caught:
        keras_svdtune.to_lora(model)
    assert "rank=16" in str(caught.value)
    assert "Received: rank=None" in str(caught.value)


@pytest.mark.parametrize("rank", [0, -1, 5, 2.5, 0.5, True, "8"])
def test_a_rank_that_does_not_fit(rank):
    model = small_model()
    keras_svdtune.enable_svf(model)
    with must_stay(model, X), pytest.raises(ValueError) as caught:
        keras_svdtune.to_lora(model, rank)
    assert f"rank={rank!r}" in str(caught.value)


def test_no_adapter():
    model = small_model()
    with must_stay(model, X), pytest.raises(ValueError, match="no adapter"):
        keras_svdtune.to_lora(model, 2)


def test_not_finite():
    model = small_model()
    keras_svdtune.enable_svf(model)
    layer = model.get_layer("second")
    layer.adapter.delta.assign([1.0, np.nan, 0.0, 0.0])
    with (
        must_stay(model, X),
        pytest.raises(ValueError, match="second' holds NaN"),
    ):
        keras_svdtune.to_lora(model, 2)


def test_the_model_that_it_was_enabled_on():
    inner = small_model()
    x = keras.Input((6,))
    outer = keras.Model(x, keras.layers.Dense(2)(inner(x)), name="outer")
    keras_svdtune.enable_svf(outer)
    with must_stay(outer, X), pytest.raises(ValueError, match="on 'outer'"):
        keras_svdtune.to_lora(inner, 2)
    keras_svdtune.to_lora(outer, 2)
    keras_svdtune.remove_adapter(outer)
    assert not adapted(inner)


def test_two_adapters_in_one_model():
    """Each was enabled on a part; each part is given back."""
    one = small_model()
    two = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5)], name="two"
    )
    x = keras.Input((6,))
    outer = keras.Model(x, [one(x), two(x)])
    keras_svdtune.enable_svf(one)
    keras_svdtune.enable_pissa(two, rank=1)
    perturb(outer)
    expected = predict(outer, X)
    keras_svdtune.to_lora(outer, 4)
    assert_close(predict(outer, X)[0], expected[0], 1e-5)
    assert_close(predict(outer, X)[1], expected[1], 1e-5)
    keras_svdtune.remove_adapter(two)
    assert len(adapted(one)) == 2 and not adapted(two)
    assert all(v.trainable for v in two.weights)
    assert keras_svdtune.adapter_summary(one).method == LoRA(rank=4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "module, name, nth",
    [
        (low_rank_change, "thin_product", 2),
        (attach, "detach", 2),
        (attach, "Adapter", 1),
        (attach, "Adapter", 2),
        (attach, "attach_plan", 2),
        (enable, "prepare_reset", 1),
        (keras_svdtune.adapter.adapter.Adapter, "add_weight", 2),
        (keras_svdtune.adapter.adapter.Adapter, "add_weight", 4),
    ],
)
def test_interrupt_leaves_the_model_as_it_was(
    module, name, nth, error, monkeypatch
):
    model, calls = small_model(compiled=True), []
    model.get_layer("first").bias.trainable = False
    keras_svdtune.enable_svf(model)
    model.fit(X, Y, verbose=0)
    adapters = [x.adapter for x in adapted(model).values()]
    original = getattr(module, name)

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return original(*args, **kwargs)

    with must_stay(model, X):
        monkeypatch.setattr(module, name, interrupted)
        with pytest.raises(error):
            keras_svdtune.to_lora(model, 2)
        assert len(calls) >= nth
        monkeypatch.undo()
    assert [x.adapter for x in adapted(model).values()] == adapters
    assert keras_svdtune.adapter_summary(model).method == SVF()
    model.fit(X, Y, verbose=0)
    keras_svdtune.to_lora(model, 2)  # and nothing hinders the next try
    keras_svdtune.remove_adapter(model)
    assert not model.get_layer("first").bias.trainable
    assert model.get_layer("first").kernel.trainable
