"""What an adapter costs: the dry run, the table, and published counts."""

import io

import keras
import keras_hub
import numpy as np
import pytest
import rich.console
from helpers import (
    adapted,
    all_methods,
    default_methods,
    hosts_model,
    method_id,
    must_stay,
    small_data,
    small_model,
    tiny_gemma,
)

import keras_svdtune
from keras_svdtune import SVF, SVFT, LoRA, LoRAXS, PiSSA
from keras_svdtune.reports import cost

X, _ = small_data()
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}


@pytest.fixture(autouse=True)
def quick_clock(request, monkeypatch):
    """No timing of this machine, but where the seconds are what is tested."""
    if "seconds" not in request.node.name:
        monkeypatch.setattr(cost, "_seconds_per_operation", lambda: 1e-9)


def counted(model):
    """(trainable, frozen, bytes) of the variables that the adapters have.

    What an optimizer never steps (it is overwritten) counts as frozen.
    """
    trainable = frozen = size = 0
    for layer in adapted(model).values():
        mine = {id(v) for v in layer.adapter.variables_by_name(True).values()}
        for v in layer.adapter.weights:
            n = int(np.prod(v.shape))
            size += n * BYTES[v.dtype]
            if id(v) in mine:
                trainable += n
            else:
                frozen += n
    return trainable, frozen, size


@pytest.mark.parametrize(
    "method, policy",
    [
        pytest.param(method, policy, id=f"{method_id(method)}-{policy}")
        for policy in ("float32", "bfloat16")
        for method in (
            all_methods() if policy == "float32" else default_methods()
        )
    ],
)
def test_estimate_is_what_enabling_does(method, policy):
    model = hosts_model(policy)
    parameters = model.count_params()
    cost = keras_svdtune.estimate(model, method)
    keras_svdtune.enable_adapter(model, method)
    expected = counted(model)
    assert (cost.trainable, cost.frozen, cost.bytes) == expected
    assert cost.model_parameters == parameters
    assert model.count_params() == parameters + cost.trainable + cost.frozen
    assert [x.path for x in cost.layers] == [p for p in adapted_in_order(model)]
    summary = keras_svdtune.adapter_summary(model)
    assert summary.layers == cost.layers
    assert summary.model_parameters == parameters
    assert summary.decomposition_seconds is None


def adapted_in_order(model):
    layers = adapted(model)
    return [x.path for x in model.layers if x.path in layers]


@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_estimate_touches_nothing(method):
    model = small_model(compiled=True)
    if hasattr(method, "rank"):
        method = type(method)(**(method.settings() | {"rank": 2}))
    with must_stay(model, X, compiled=False):
        function = model.predict_function
        cost = keras_svdtune.estimate(model, method, ["first"])
        assert model.predict_function is function
    assert [x.matrix for x in cost.layers] == [(6, 4)]


def test_estimate_refuses_what_enabling_refuses():
    model = small_model()
    with pytest.raises(ValueError, match="`rank` must be an integer"):
        keras_svdtune.estimate(model, PiSSA(rank=9))
    with pytest.raises(ValueError, match="matches no layer"):
        keras_svdtune.estimate(model, SVF(), ["frist"])
    with pytest.raises(ValueError, match="Received the class"):
        keras_svdtune.estimate(model, SVF)


def test_a_model_without_values_is_counted():
    """As large ones are, before their weights are there."""
    sizes = tiny_gemma().get_config()
    with keras.StatelessScope(initialize_variables=False):
        model = keras_hub.models.GemmaBackbone.from_config(sizes)
    # Or else Keras gives them values when it leaves the next scope.
    keras.utils.clear_session()
    for method in default_methods():
        if hasattr(method, "rank"):
            method = type(method)(**(method.settings() | {"rank": 2}))
        assert keras_svdtune.estimate(model, method).layers == (
            keras_svdtune.estimate(tiny_gemma(), method).layers
        )
    for use in (
        lambda: keras_svdtune.enable_svf(model),
        lambda: keras_svdtune.enable_adapter(model, LoRA(2)),
        lambda: keras_svdtune.estimate(model, PiSSA(rank=0.5)),
    ):
        with pytest.raises(ValueError, match="has no values"):
            use()
    assert not adapted(model)


def test_seconds():
    model = hosts_model()
    seconds = keras_svdtune.estimate(model, SVF()).decomposition_seconds
    assert seconds > 0
    # Nothing is decomposed for LoRA.
    assert not keras_svdtune.estimate(model, LoRA(2)).decomposition_seconds


def test_table(capsys):
    gemma = tiny_gemma()
    cost = keras_svdtune.estimate(gemma, SVF())
    console = rich.console.Console(
        file=io.StringIO(), width=100, color_system=None
    )
    cost.print(console)
    shown = console.file.getvalue()
    # A row for each name and shape, with both layers in it.
    (query,) = [x for x in shown.splitlines() if "query" in x]
    assert "8 x 8" in query and "16" in query.split()
    assert f"{cost.trainable:,}" in shown and f"{cost.frozen:,}" in shown
    assert f"{cost.trainable / gemma.count_params():.4%}" in shown
    assert "SVF()" in shown and "Enabling takes about" in shown
    gemma.enable_svf()
    capsys.readouterr()
    returned = gemma.adapter_summary()
    printed = capsys.readouterr().out
    assert "query" in printed and "SVF()" in printed
    assert f"{returned.trainable:,}" in printed
    assert "Enabling takes" not in printed


def test_ranks_by_energy_differ_by_layer():
    model = hosts_model()
    layer = model.get_layer("dense_tall")
    layer.kernel.assign(np.outer(np.arange(8), np.ones(6)))  # of rank 1
    cost = keras_svdtune.estimate(model, PiSSA(rank=0.9))
    ranks = {x.path: x.rank for x in cost.layers}
    assert all(isinstance(r, int) for r in ranks.values())
    assert ranks["dense_tall"] == 1 and max(ranks.values()) > 1
    keras_svdtune.enable_adapter(model, PiSSA(rank=0.9))
    for path, layer in adapted(model).items():
        assert layer.adapter.method.rank == ranks[path]


# Counts that were published, by arithmetic on the shapes alone.


def gemma(layers, d, ffw, heads, kv_heads, head_dim):
    attention = [
        (d, heads * head_dim),
        (d, kv_heads * head_dim),
        (d, kv_heads * head_dim),
        (heads * head_dim, d),
    ]
    return layers * (attention + [(d, ffw), (d, ffw), (ffw, d)])


SHAPES = {
    "Gemma-2B": gemma(18, 2048, 16384, 8, 1, 256),
    "Gemma-7B": gemma(28, 3072, 24576, 16, 16, 256),
    "Gemma2-9B": gemma(42, 3584, 14336, 16, 8, 256),
    "Gemma3-1B": gemma(26, 1152, 6912, 4, 1, 256),
    "Llama2-7B": gemma(32, 4096, 11008, 32, 32, 128),
    "Llama3-8B": gemma(32, 4096, 14336, 32, 8, 128),
}


def trained(method, shapes):
    return sum(
        int(np.prod(w.shape))
        for shape in shapes
        for w in method.weights(shape)
        if w.trainable
    )


@pytest.mark.parametrize(
    "model, expected",
    [
        ("Gemma-2B", 193_536),
        ("Gemma-7B", 602_112),
        ("Gemma2-9B", 924_672),
        ("Gemma3-1B", 156_416),
        ("Llama2-7B", 917_504),
        ("Llama3-8B", 720_896),
    ],
)
def test_svf_counts(model, expected):
    assert trained(SVF(), SHAPES[model]) == expected
    assert trained(SVFT(pattern="plain"), SHAPES[model]) == expected


@pytest.mark.parametrize(
    "model, width, millions",
    [
        ("Gemma-2B", 2, 0.967),
        ("Gemma-2B", 8, 3.281),
        ("Gemma-2B", 16, 6.352),
        ("Gemma-7B", 16, 19.8),
        ("Gemma2-9B", 8, 15.7),
        ("Gemma3-1B", 2, 0.781),
        ("Llama2-7B", 8, 15.6),
        ("Llama3-8B", 16, 23.7),
    ],
)
@pytest.mark.parametrize("pattern", ["banded", "random"])
def test_svft_counts(pattern, model, width, millions):
    found = trained(SVFT(pattern, off_diagonals=width), SHAPES[model]) / 1e6
    assert found == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize(
    "model, rank, expected",
    [
        ("Gemma-2B", 16, 32_256),
        ("Gemma-7B", 32, 200_704),
        ("Gemma3-1B", 64, 745_472),
        ("Llama3-8B", 16, 57_344),
    ],
)
def test_lora_xs_counts(model, rank, expected):
    assert trained(LoRAXS(rank), SHAPES[model]) == expected


@pytest.mark.parametrize(
    "model, rank, millions",
    [("Gemma-2B", 8, 9.81), ("Gemma-7B", 16, 50.0), ("Llama3-8B", 64, 167.8)],
)
@pytest.mark.parametrize("method", [LoRA, PiSSA, keras_svdtune.MiLoRA])
def test_low_rank_counts(method, model, rank, millions):
    found = trained(method(rank), SHAPES[model]) / 1e6
    assert found == pytest.approx(millions, rel=5e-3)


def test_dora_counts():
    """Query, key, value, up and down of Gemma-2B with rank 16: 13.5 M."""
    shapes = [
        s for i, s in enumerate(SHAPES["Gemma-2B"]) if i % 7 in (0, 1, 2, 5, 6)
    ]
    found = trained(keras_svdtune.DoRA(16), shapes) / 1e6
    assert found == pytest.approx(13.5, rel=5e-3)


def test_svf_keeps_the_square_of_the_small_side():
    for shapes in SHAPES.values():
        frozen = sum(
            int(np.prod(w.shape))
            for shape in shapes
            for w in SVF().weights(shape)
            if not w.trainable
        )
        assert frozen == sum(min(shape) ** 2 for shape in shapes)


def test_keras_counts_as_many():
    """The library's own figures are those of Keras' summary."""
    model = hosts_model()
    cost = keras_svdtune.estimate(model, SVF())
    keras_svdtune.enable_svf(model)
    trainable = sum(int(np.prod(v.shape)) for v in model.trainable_weights)
    assert trainable == cost.trainable
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert any(
        "Trainable params" in line and f"{cost.trainable:,}" in line
        for line in "\n".join(lines).splitlines()
    )
