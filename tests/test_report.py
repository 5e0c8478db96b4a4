"""What an adapter costs: the dry run and the table."""

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
    of_rank,
    small_data,
    small_model,
    tiny_gemma,
)

import keras_svdtune
from keras_svdtune import SVF, LoRA, PiSSA
from keras_svdtune.reports import cost

X, _ = small_data()
HOSTS = ("dense_tall", "dense_wide", "dense_square", "conv_tall")
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
    model = hosts_model(policy, HOSTS)
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
    method = of_rank(method, 2)
    with must_stay(model, X, compiled=False):
        function = model.predict_function
        cost = keras_svdtune.estimate(model, method, ["first"])
        assert model.predict_function is function
    assert [x.matrix for x in cost.layers] == [(6, 4)]


def test_estimate_refuses_what_enabling_refuses():
    model = small_model()
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
        method = of_rank(method, 2)
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
    model = small_model()
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


def test_keras_counts_as_many():
    """The library's own figures are those of Keras' summary."""
    model = small_model()
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
