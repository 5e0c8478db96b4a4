"""Every backbone that KerasHub exports, adapted.

A release of KerasHub with a new backbone fails here until a tiny
configuration of it is in `tiny_backbones.py`. Each one is adapted, trained for
a step, saved, loaded into a fresh model, merged and given back, on JAX.
"""

import keras
import numpy as np
import pytest
from helpers import assert_close, assert_same, default_method, numpy
from keras import layers
from tiny_backbones import EAGER_ONLY, TINY, exported, missing

import keras_svdtune
from keras_svdtune.hosts.host import kernel_of
from keras_svdtune.model.targets import adapted_targets

jax = pytest.importorskip("jax")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX is the reference"
)

# Weights of two axes and more that are no matrix of a product, by the end of
# their path. Whatever else is not adapted fails the census.
NO_MATRIX = (
    # Looked up or added, never multiplied by.
    *("embeddings", "embedding", "_token", "_tokens", "_embed", "rel_pos_h"),
    *("rel_pos_w", "position_embedding_table", "bias_table", "mask_emb"),
    *("gaussian_matrix", "rope_embeddings_cos", "rope_embeddings_sin"),
    *("segment_encoding", "class_token", "variable"),
    # One row for each head or expert that is added or scales.
    *("attention_bias", "_proj_bias", "r_k", "bias"),
    # Depthwise: each output reads one channel.
    *("depthwise_kernel", "conv1d_kernel"),
)
# They read the values of their inputs, and cannot be traced.
EAGER = (*EAGER_ONLY, "StableDiffusion3Backbone")
# A quarter of a minute and more each: whether every matrix is reached is tested
# always, the rest by `pytest -m slow`.
LONG = (
    *(*EAGER, "BASNetBackbone", "DFineBackbone", "DepthAnythingBackbone"),
    "SAM3PromptableConceptBackbone",
)
# The other methods: a dozen backbones of all kinds.
REPRESENTATIVES = (
    ("svft", "ViTBackbone"),
    ("svft", "Gemma3Backbone"),
    ("pissa", "MixtralBackbone"),
    ("pissa", "Llama3Backbone"),
    ("milora", "GptOssBackbone"),
    ("milora", "BertBackbone"),
    ("lora_xs", "ResNetBackbone"),
    ("lora_xs", "T5Backbone"),
    ("lora", "Qwen3MoeBackbone"),
    ("dora", "WhisperBackbone"),
    ("dora", "GemmaBackbone"),
    ("adalora", "Gemma4Backbone"),
)


def test_every_exported_backbone_is_known():
    assert not missing(), (
        f"KerasHub exports {missing()}: give each a tiny configuration in "
        "tests/tiny_backbones*.py."
    )
    assert set(TINY) <= set(exported())


# Some classes have two names.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
        for name in {cls: name for name, cls in exported().items()}.values()
    ],
)
def test_svf(name, tmp_path):
    run_census(name, keras_svdtune.SVF(), tmp_path)


@pytest.mark.parametrize("name", LONG)
def test_svf_reaches_every_matrix(name):
    enable(TINY[name]()[0], keras_svdtune.SVF())


@pytest.mark.parametrize("method, name", REPRESENTATIVES)
def test_other_methods(method, name, tmp_path):
    method = default_method(method)
    if hasattr(method, "rank"):
        method = type(method)(rank=1)
    run_census(name, method, tmp_path)


def run_census(name, method, tmp_path):
    model, inputs = TINY[name]()
    plain = list(model.variables)
    base = [numpy(v) for v in plain]
    jit = (lambda f: f) if name in EAGER else jax.jit
    forward = jit(lambda values: outputs(model, inputs, plain, values))
    y = forward(base)

    enable(model, method)
    trained = list(model.trainable_variables)
    step = jit(
        jax.value_and_grad(
            lambda values: loss(outputs(model, inputs, trained, values), y),
            has_aux=True,
        )
    )
    (_, first), gradients = step([v.value for v in trained])
    assert_close_all(first, y, 2e-5, "first step")
    for variable, gradient in zip(trained, gradients, strict=True):
        if variable.overwrite_with_gradient:
            continue  # AdaLoRA's averages: no file holds them
        size = float(np.abs(gradient).max())
        assert np.isfinite(size), variable.path
        variable.assign(variable - 0.05 / (size + 1e-12) * gradient)
    dead = [
        v.path
        for v, g in zip(trained, gradients, strict=True)
        if not np.any(g) and v.path.endswith(("svf_delta", "svft_m", "_r"))
    ]
    assert len(dead) < 0.1 * len(trained), f"no gradient: {dead}"
    (_, moved), _ = step([v.value for v in trained])
    assert any(
        not np.allclose(a, b, atol=1e-4)
        for a, b in zip(moved, first, strict=True)
    )
    assert_same([numpy(v) for v in plain], base, "the base")

    path = tmp_path / "adapter.safetensors"
    # Layers without a name of their own are counted anew, as in a process
    # that has built nothing yet.
    keras.backend.clear_session(free_memory=False)
    model_b, _ = TINY[name]()
    for ours, value in zip(model_b.variables, base, strict=True):
        ours.assign(value)
    keras_svdtune.save_adapter(model, path)
    keras_svdtune.load_adapter(model_b, path)
    for a, b in zip(trained, model_b.trainable_variables, strict=True):
        assert_same(numpy(b), numpy(a), f"loaded {a.path}")
    keras_svdtune.merge_adapter(model_b)
    if name in EAGER:
        merged = outputs(model_b, inputs, [], [])
    else:  # the program of the plain model is compiled already
        merged = forward([v.value for v in model_b.variables])
    assert_close_all(merged, moved, 1e-3, "merged")
    keras_svdtune.remove_adapter(model)
    assert [v.path for v in model.variables] == [v.path for v in plain]
    assert_same([numpy(v) for v in model.variables], base, "given back")


def enable(model, method):
    """Enables it, on every matrix that the model has."""
    matrices = {
        id(v): v.path
        for v in model.trainable_variables
        if len([n for n in v.shape if n > 1]) > 1
        and not v.path.split("/")[-1].endswith(NO_MATRIX)
    }
    keras_svdtune.enable_adapter(model, method)
    reached = {id(kernel_of(x)) for x in adapted_targets(model).values()}
    reached |= depthwise_kernels(model)
    if not method.banks:
        reached |= {i for i, p in matrices.items() if "expert_bank" in p}
    left = [p for i, p in matrices.items() if i not in reached]
    assert not left, f"not adapted: {left}"


def outputs(model, inputs, variables, values):
    """What the model computes with these values, a list of arrays."""
    pairs = list(zip(variables, values, strict=True))
    with keras.StatelessScope(state_mapping=pairs):
        return jax.tree.leaves(model(inputs, training=False))


def loss(found, start):
    """A loss whose gradient is not zero at the start."""
    pairs = zip(found, start, strict=True)
    return sum((a * jax.numpy.cos(3.0 * b)).sum() for a, b in pairs), found


def depthwise_kernels(model):
    """Kernels each of whose outputs reads one channel: no matrices."""
    found = set()
    for layer in model._flatten_layers():
        if type(layer) in (layers.DepthwiseConv1D, layers.DepthwiseConv2D):
            found.add(id(layer.kernel))
        elif getattr(layer, "_kernel", None) is not None:
            kernel = layer._kernel
            if getattr(layer, "groups", 1) > 1 and kernel.shape[-2] == 1:
                found.add(id(kernel))
    return found


def assert_close_all(found, expected, tolerance, what):
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, tolerance, what)
