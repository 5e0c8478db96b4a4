"""Kernels that a layer reads directly: experts, transposed convolutions."""

import keras
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_same,
    default_methods,
    method_id,
    numpy,
    perturb,
    randomise,
)
from keras import layers, ops
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts

import keras_svdtune
from keras_svdtune import PiSSA
from keras_svdtune.model.targets import adapted_targets

METHODS = [*(m for m in default_methods() if m.banks), PiSSA(0.5)]


def experts():
    x = keras.Input((6,), batch_size=5)
    bank = MixtralMoeExperts(3, 6, 8, name="experts")
    model = keras.Model(x, ops.mean(bank(x), axis=0), name="moe")
    randomise(model)
    return model, np.random.default_rng(1).normal(size=(5, 6)).astype("float32")


def images():
    model = keras.Sequential(
        [
            layers.Input((6, 6, 4)),
            layers.Conv2DTranspose(5, 3, strides=2, name="transposed"),
            layers.SeparableConv2D(8, 2, name="separable"),
            layers.Conv2D(8, 2, groups=2, name="groups"),
        ]
    )
    randomise(model)
    rng = np.random.default_rng(1)
    return model, rng.normal(size=(2, 6, 6, 4)).astype("float32")


@pytest.mark.parametrize("make", [experts, images])
@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_keeps_every_promise(method, make, tmp_path):
    model, x = make()
    base, before = numpy(model(x)), [numpy(v) for v in model.weights]
    classes = [type(layer) for layer in model.layers]
    keras_svdtune.enable_adapter(model, method)
    assert len(adapted_targets(model)) == 3
    assert_same(numpy(model(x)), base, "first step")
    perturb(model)
    moved = numpy(model(x))
    assert np.abs(moved - base).max() > 1e-3
    keras_svdtune.save_adapter(model, tmp_path / "adapter.safetensors")
    model.save_weights(tmp_path / "full.weights.h5")
    keras_svdtune.remove_adapter(model)
    assert [type(layer) for layer in model.layers] == classes
    assert_same([numpy(v) for v in model.weights], before, "given back")
    keras_svdtune.load_adapter(model, tmp_path / "adapter.safetensors")
    assert_close(numpy(model(x)), moved, 1e-6, "loaded")
    keras_svdtune.merge_adapter(model)
    assert_close(numpy(model(x)), moved, 1e-5, "merged")
    for variable, value in zip(model.weights, before, strict=True):
        variable.assign(value)
    model.load_weights(tmp_path / "full.weights.h5")
    assert_close(numpy(model(x)), moved, 1e-5, "a full save is merged")


def test_each_expert_has_its_own_singular_values():
    """Against float64 NumPy, expert by expert."""
    model, _ = experts()
    bank = model.get_layer("experts")
    keras_svdtune.enable_svf(model)
    perturb(model)
    for kernel in adapted_targets(model).values():
        w = numpy(kernel.variable).astype("float64")
        delta = numpy(kernel.adapter.delta).astype("float64")
        assert delta.shape == (3, min(w.shape[1:]))
        merged = numpy(kernel.merged_kernel())
        for expert in range(3):
            u, s, vt = np.linalg.svd(w[expert], full_matrices=False)
            expected = (u * (s * (1.0 + delta[expert]))) @ vt
            assert_close(merged[expert], expected, 1e-5)
    assert numpy(bank._expert_feedforward_gate_dense).shape == (3, 6, 8)


def test_only_the_adapters_train():
    model, x = experts()
    keras_svdtune.enable_svf(model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    frozen = [numpy(v) for v in model.non_trainable_variables]
    start = [numpy(v) for v in model.trainable_variables]
    y = numpy(model(x))
    model.fit(x, np.zeros_like(y), batch_size=len(x), verbose=0)
    assert_same(
        [numpy(v) for v in model.non_trainable_variables], frozen, "frozen"
    )
    for variable, value in zip(model.trainable_variables, start, strict=True):
        assert (numpy(variable) != value).any(), variable.path


def test_adalora_leaves_banks_out():
    model, _ = experts()
    with pytest.raises(ValueError, match="takes no bank of matrices"):
        keras_svdtune.enable_adalora(model, rank=2)
