"""Any adapter as a LoRA: exact where it can be, the best there is elsewhere,
and measured. An error or an interrupt leaves the model as it was."""

import itertools

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    all_methods,
    assert_close,
    assert_same,
    default_methods,
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
    trainables,
)

import keras_svdtune
from keras_svdtune import SVF, SVFT, AdaLoRA, DoRA, LoRA, MiLoRA, PiSSA
from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.convert import low_rank_change
from keras_svdtune.hosts import attach
from keras_svdtune.model import enable

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("convert")

X, Y = small_data()
# Tall, wide, and with heads; min(in, out) is 6 in all.
HOSTS = ("dense_tall", "dense_wide", "einsum_output")
DATA = hosts_data(HOSTS)
# Methods without an exact form; the others have one without a rank.
NEED_A_RANK = ("svf", "svft", "dora")
METHODS = all_methods()
# Of those with several settings, one is enough here, but for the rank.
USUAL = [*default_methods(), PiSSA(rank=0.5), LoRA(rank=4, alpha=8.0)]
every_method = pytest.mark.parametrize(
    "method",
    [
        m if m in USUAL else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
    ],
    ids=method_id,
)


def adapted_hosts(method):
    """A model with every kind of layer, adapted and trained a little."""
    model = hosts_model(names=HOSTS)
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
    """Every method, at a rank that is enough."""
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


@pytest.mark.parametrize(
    "method, rank",
    [
        *((m, 3) for m in USUAL if m.name in NEED_A_RANK),
        *((m, 1) for m in METHODS if m in default_methods()),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else method_id(x),
)
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


@pytest.mark.parametrize("method", [PiSSA(2), MiLoRA(3), PiSSA(5)], ids=str)
def test_twice_the_rank(method):
    """And never more than a matrix can have."""
    model = adapted_hosts(method)
    report = keras_svdtune.to_lora(model)
    assert set(ranks(model).values()) == {min(2 * method.rank, 6)}
    assert report.error < 1e-5


@pytest.mark.fast
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
    assert list(ranks(model).values()) == [3, 1, 4]
    assert_close(eager(model, DATA), expected, 1e-5)


def test_lora_is_left_alone():
    model = small_model(compiled=True)
    keras_svdtune.enable_adapter(model, LoRA(rank=4, alpha=8.0))
    model.fit(X, Y, verbose=0)
    adapters = [x.adapter for x in adapted(model).values()]
    optimizer = model.optimizer
    with must_stay(model, X):
        for rank in (None, 4):
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
@pytest.mark.parametrize("method", [PiSSA(2), AdaLoRA(2)], ids=method_id)
def test_lower_precision(dtype, method):
    """dW is as exact as in float32, whatever the model computes in."""
    model = hosts_model(dtype, HOSTS[:1])
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
    expected = eager(model, X)
    report = keras_svdtune.to_lora(model, 2)
    assert report.error == 0.0 and {x.error for x in report.layers} == {0.0}
    assert_same(eager(model, X), expected)
    losses = model.fit(X, Y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# The model afterwards.


def test_it_trains_and_is_given_back():
    model = small_model(compiled=True)
    model.get_layer("first").bias.trainable = False
    plain = [numpy(v) for v in model.weights]
    flags = [v.trainable for v in model.weights]
    base = predict(model, X)
    keras_svdtune.enable_svf(model)
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


@pytest.mark.parametrize(
    "method, rank", [(PiSSA(rank=0.5), None), (SVF(), 3)], ids=["pissa", "svf"]
)
def test_save_and_load(method, rank, tmp_path):
    path = tmp_path / "lora.safetensors"
    model = adapted_hosts(method)
    keras_svdtune.to_lora(model, rank)
    expected = eager(model, DATA)
    keras_svdtune.save_adapter(model, path)
    fresh = hosts_model(names=HOSTS)
    keras_svdtune.load_adapter(fresh, path)
    assert ranks(fresh) == ranks(model)
    assert_same(eager(fresh, DATA), expected)
    keras_svdtune.load_adapter(model, path)  # onto what it was saved from
    assert_same(eager(model, DATA), expected)


def test_as_a_method_of_keras_hub():
    """Of a part of the layers."""
    gemma = tiny_gemma(num_layers=1)
    gemma.enable_svf(target_layer_names=["query"])
    perturb(gemma)
    before = changes(gemma)
    report = gemma.to_lora(rank=8)
    assert [x.path.rsplit("/")[-1] for x in report.layers] == ["query"]
    assert_close(changes(gemma), before, 1e-5)


def test_declared_layers():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras_svdtune.SVFDense(4, name="first"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.layers[0].adapter.delta.assign([0.1, -0.2, 0.3, 0.4])
    expected = eager(model, X)
    keras_svdtune.to_lora(model, 4)
    assert_close(eager(model, X), expected, 1e-5)
    assert [v.name for v in model.trainable_variables] == [
        "lora_a",
        "lora_b",
        "kernel",
        "bias",
    ]


def test_the_table():
    model = adapted_hosts(SVF())
    table = keras_svdtune.to_lora(model, 3).table()
    assert len(table.rows) == len(HOSTS)
    assert "SVF" in table.title


# Refused, and interrupted.


def refused(model, rank, *parts):
    with must_stay(model, X, compiled=False), pytest.raises(ValueError) as e:
        keras_svdtune.to_lora(model, rank)
    assert all(part in str(e.value) for part in parts), str(e.value)


@pytest.mark.parametrize("method", [SVF(), SVFT(), DoRA(rank=2)], ids=method_id)
def test_a_rank_is_needed(method):
    model = small_model()
    refused(model, 2, "no adapter")
    keras_svdtune.enable_adapter(model, method)
    refused(model, None, "rank=16", "Received: rank=None")


def test_a_rank_that_fits_nothing():
    model = small_model()
    keras_svdtune.enable_svf(model)
    for rank in (0, -1, 2.5, 0.5, True, "8", float("nan")):
        refused(model, rank, f"rank={rank!r}")


def test_not_finite():
    model = small_model()
    keras_svdtune.enable_svf(model)
    layer = model.get_layer("second")
    layer.adapter.delta.assign([1.0, np.nan, 0.0, 0.0])
    refused(model, 2, "second' holds NaN")


def test_the_model_that_it_was_enabled_on():
    inner = small_model()
    x = keras.Input((6,))
    outer = keras.Model(x, keras.layers.Dense(2)(inner(x)), name="outer")
    keras_svdtune.enable_svf(outer)
    stays = must_stay(outer, X, compiled=False)
    with stays, pytest.raises(ValueError, match="on 'outer'"):
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
    expected = eager(outer, X)
    keras_svdtune.to_lora(outer, 4)
    assert_close(eager(outer, X)[0], expected[0], 1e-5)
    assert_close(eager(outer, X)[1], expected[1], 1e-5)
    keras_svdtune.remove_adapter(two)
    assert len(adapted(one)) == 2 and not adapted(two)
    assert all(v.trainable for v in two.weights)
    assert keras_svdtune.adapter_summary(one).method == LoRA(rank=4)


def interrupted(function, nth, error):
    """A function whose `nth` call ends by an error."""
    calls = itertools.count(1)

    def function_or_error(*args, **kwargs):
        if next(calls) == nth:
            raise error
        return function(*args, **kwargs)

    return function_or_error


def test_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model = small_model(compiled=True)
    model.get_layer("first").bias.trainable = False
    keras_svdtune.enable_svf(model)
    model.fit(X, Y, verbose=0)
    adapters = [x.adapter for x in adapted(model).values()]
    places = [
        *((low_rank_change, "thin_product", 2), (attach, "detach", 2)),
        *((attach, "Adapter", 1), (attach, "Adapter", 2)),
        *((attach, "attach_plan", 2), (enable, "note_change", 1)),
        *((Adapter, "add_weight", 2), (Adapter, "add_weight", 4)),
    ]
    errors = KeyboardInterrupt, MemoryError
    with must_stay(model, X):
        for (where, name, nth), error in itertools.product(places, errors):
            ending = interrupted(getattr(where, name), nth, error)
            with monkeypatch.context() as patch, must_stay(model, X, False):
                patch.setattr(where, name, ending)
                with pytest.raises(error):
                    keras_svdtune.to_lora(model, 2)
    assert [x.adapter for x in adapted(model).values()] == adapters
    assert keras_svdtune.adapter_summary(model).method == SVF()
    model.fit(X, Y, verbose=0)
    keras_svdtune.to_lora(model, 2)  # and nothing hinders the next try
    keras_svdtune.remove_adapter(model)
    assert not model.get_layer("first").bias.trainable
    assert model.get_layer("first").kernel.trainable
