"""SVF with W replaced by W·V: what it computes, and what it gives back."""

import keras
import numpy as np
import pytest
from helpers import (
    LINEAR,
    adapted,
    assert_close,
    assert_differ,
    assert_same,
    dot,
    eager,
    error,
    gradient_function,
    hosts_data,
    hosts_model,
    must_stay,
    numpy,
    perturb,
    predict,
    trainables,
)
from test_hosts import trains_alone

import keras_svdtune
from keras_svdtune import SVF, PiSSA, SVFDense
from keras_svdtune.hosts import attach

DATA = hosts_data(LINEAR)
FEW = ("dense_tall", "dense_wide")
ROUNDING = {"float32": 1e-6, "bfloat16": 2e-2}
every_dtype = pytest.mark.parametrize("dtype", ROUNDING)


def made(dtype="float32", replace=True, moved=True, names=LINEAR):
    """A model with SVF; equal but for the form."""
    keras.backend.clear_session(free_memory=False)
    model = hosts_model(dtype, names)
    keras_svdtune.enable_svf(model, replace_kernel=replace)
    if moved:
        perturb(model)
    return model


def close(found, expected, dtype, what=""):
    for name in expected:
        assert error(found[name], expected[name]) < ROUNDING[dtype], (
            f"{what} {name}"
        )


@every_dtype
def test_computes_what_svf_computes(dtype):
    plain = hosts_model(dtype, LINEAR)
    base = eager(plain, DATA)
    model = made(dtype, moved=False)
    close(eager(model, DATA), base, dtype, "first")
    perturb(model)
    expected = eager(made(dtype, replace=False), DATA)
    assert_differ(expected, base)
    close(eager(model, DATA), expected, dtype, "moved")
    few, data = made(dtype, names=FEW), hosts_data(FEW)
    close(predict(few, data), eager(few, data), dtype, "compiled")
    with keras_svdtune.adapter_disabled(model):
        close(eager(model, DATA), base, dtype, "disabled")


def test_the_kernel_is_rotated():
    """Against NumPy: no product with W is left to compute."""
    plain, model = hosts_model(names=LINEAR), made(moved=False)
    for name in LINEAR:
        layer = model.get_layer(name)
        view = layer.adapter.view
        w = numpy(view.to_matrix(plain.get_layer(name)._kernel.value))
        basis = numpy(layer.adapter.basis)
        rows, columns = w.shape
        expected = w @ basis if columns <= rows else basis.T @ w
        assert_close(view.to_matrix(layer._kernel.value), expected, 1e-6)


def test_gradients_are_those_of_svf():
    found = []
    for replace in (False, True):
        model = made(replace=replace)
        layers = [model.get_layer(name) for name in LINEAR]
        inputs = [keras.Variable(x) for x in DATA]
        rng = np.random.default_rng(3)
        ups = [
            rng.standard_normal(tuple(layer(x).shape)).astype("float32")
            for layer, x in zip(layers, inputs, strict=True)
        ]

        def loss(layers=layers, inputs=inputs, ups=ups):
            return sum(
                dot(layer(x.value), up)
                for layer, x, up in zip(layers, inputs, ups, strict=True)
            )

        deltas = [layer.adapter.delta for layer in layers]
        found.append(gradient_function(loss, [*deltas, *inputs])())
    for ours, theirs in zip(*found, strict=True):
        assert_close(theirs, ours, 1e-4)
        assert np.abs(numpy(ours)).max() > 1e-3


def test_fit_trains_the_singular_values_alone():
    model = made(moved=False)
    rng = np.random.default_rng(1)
    targets = {
        k: v + 0.5 * rng.standard_normal(v.shape).astype("float32")
        for k, v in eager(model, DATA).items()
    }
    assert len(model.trainable_weights) == len(LINEAR)
    trains_alone(model, DATA, targets, rate=2.5e-3)


@every_dtype
def test_remove_gives_the_kernel_back_and_merge_the_product(dtype):
    plain = hosts_model(dtype, LINEAR)
    model = made(dtype)
    moved = eager(model, DATA)
    keras_svdtune.merge_adapter(model)
    assert not adapted(model)
    close(eager(model, DATA), moved, dtype, "merged")
    model = made(dtype)
    keras_svdtune.remove_adapter(model)
    for name in LINEAR:
        kernels = (x.get_layer(name)._kernel for x in (model, plain))
        found, expected = (numpy(x) for x in kernels)
        assert error(found, expected) < ROUNDING[dtype], name
    close(eager(model, DATA), eager(plain, DATA), dtype)


def test_an_interrupt_leaves_every_kernel_as_it_was(monkeypatch):
    model = hosts_model(names=LINEAR)
    attach_plan, calls = attach.attach_plan, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attach_plan(*args)

    monkeypatch.setattr(attach, "attach_plan", interrupted)
    with (
        must_stay(model, DATA, compiled=False),
        pytest.raises(KeyboardInterrupt),
    ):
        keras_svdtune.enable_svf(model, replace_kernel=True)
    assert len(calls) == 4


@pytest.mark.parametrize("replace", [False, True])
def test_files_are_those_of_svf(replace, tmp_path):
    """Either form writes what the other reads; they add up."""
    model = made(replace=replace)
    expected, learned = eager(model, DATA), trainables(model)
    path = tmp_path / "adapter.safetensors"
    keras_svdtune.save_adapter(model, path)
    for other in (False, True):
        fresh = made(replace=other)
        perturb(fresh, seed=7)
        keras_svdtune.load_adapter(fresh, path)
        assert_same(trainables(fresh), learned)
        close(eager(fresh, DATA), expected, "float32", f"into {other}")
    keras.backend.clear_session(free_memory=False)
    base = hosts_model(names=LINEAR)
    half = tmp_path / "half.safetensors"
    keras_svdtune.save_adapter(made(), half)
    both = keras_svdtune.compose({path: 0.75, half: 0.25})
    keras_svdtune.load_adapter(base, both)
    close(eager(base, DATA), expected, "float32", "the sum")


def test_full_saves(tmp_path):
    model = made()
    expected = eager(model, DATA)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    plain = hosts_model(names=LINEAR)
    plain.load_weights(path)
    close(eager(plain, DATA), expected, "float32", "into a plain model")
    perturb(model, seed=9)
    model.load_weights(path)
    assert_same(eager(model, DATA), expected, "into the same")
    plain.save_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="a base that was made for its"):
        model.load_weights(tmp_path / "plain.weights.h5")


def test_what_it_cannot_do_is_said():
    model = hosts_model(names=("conv_tall",))
    with pytest.raises(ValueError, match="is a Conv2D, and only Dense"):
        keras_svdtune.enable_svf(model, replace_kernel=True)
    model = hosts_model(names=("dense_tall",))
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized to int8 already; enable"):
        keras_svdtune.enable_svf(model, replace_kernel=True)
    with pytest.raises(ValueError, match="keeps its kernel"):
        SVFDense(4, replace_kernel=True)
    model = made()
    with pytest.raises(ValueError, match="a base that was made for its"):
        keras_svdtune.to_lora(model, rank=2)
    with pytest.raises(ValueError, match="was not quantized"):
        keras_svdtune.quantization_error(model)


def test_the_form_is_no_setting_of_the_adapter():
    folded = SVF(replace_kernel=True)
    assert folded.trains_like(SVF()) and SVF().trains_like(folded)
    assert folded.settings() == {}
    assert PiSSA(4, quantize="int4").settings()["quantize"] == "int4"
    model = hosts_model(names=LINEAR)
    keras_svdtune.enable_svf(model, ["dense_tall"], replace_kernel=True)
    assert list(adapted(model)) == ["dense_tall"]
