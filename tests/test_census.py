"""Every backbone that KerasHub exports keeps the promises of `test_hosts.py`.

A release of KerasHub with a new backbone fails here until a tiny
configuration of it is in `tiny_backbones*.py`. On JAX: `pytest -m census`;
with `-k dozen` for twelve that have little in common.
"""

import keras
import pytest
from helpers import default_method, numpy, of_rank
from keras import layers
from test_hosts import Eager, promises, stepped
from tiny_backbones import EAGER_ONLY, TINY, exported, missing

import keras_svdtune
from keras_svdtune.model.targets import find_targets

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
# The other methods too: text and images, both ways of attention, experts.
DOZEN = (
    ("svf", "Gemma3Backbone"),
    ("pissa", "Llama3Backbone"),
    ("milora", "BertBackbone"),
    ("svf", "T5Backbone"),
    ("pissa", "MixtralBackbone"),
    ("adalora", "Gemma4Backbone"),
    ("lora", "WhisperBackbone"),
    ("svft", "ViTBackbone"),
    ("svf", "SwinTransformerBackbone"),
    ("lora_xs", "EfficientNetBackbone"),
    ("dora", "AlbertBackbone"),
    ("svf", "FluxBackbone"),
)


@pytest.mark.fast
def test_every_exported_backbone_is_known():
    assert not missing(), (
        f"KerasHub exports {missing()}: give each a tiny configuration in "
        "tests/tiny_backbones*.py."
    )
    assert set(TINY) <= set(exported())


# Some classes have two names.
@pytest.mark.census
@pytest.mark.parametrize(
    "name", {cls: name for name, cls in exported().items()}.values()
)
def test_svf(name, tmp_path):
    census(name, keras_svdtune.SVF(), tmp_path)


@pytest.mark.census
@pytest.mark.parametrize("method, name", DOZEN)
def test_dozen(method, name, tmp_path):
    census(name, of_rank(default_method(method), 1), tmp_path)


class Compiled(Eager):
    """Calls a backbone in two programs, one with the adapter and one without.

    A program is that of the first model in its state. Equal models, which
    have the same variables in the same order, lend it their values.
    """

    first_step = 2e-5  # XLA rounds in other loops
    moved = 1e-4
    compile = staticmethod(jax.jit)
    reached = 0.9  # a ReLU may be off, an output may be of its input alone

    def __init__(self):
        super().__init__()
        self.programs = {}

    def run(self, model):
        trained = stepped(model)
        ids = {id(v) for v in trained}
        rest = [v for v in model.variables if id(v) not in ids]
        key = tuple(v.path for v in (*trained, *rest))

        def function(*values):
            both = zip((trained, rest), values, strict=True)
            pairs = [x for y in both for x in zip(*y, strict=True)]
            with keras.StatelessScope(state_mapping=pairs):
                found = jax.tree.leaves(model(self.data, training=False))
            return self.loss(found), found

        if key not in self.programs:
            if any("adapter" in v.path for v in trained):
                program = jax.value_and_grad(function, has_aux=True)
            else:

                def program(*values):
                    return function(*values), None

            self.programs[key] = self.compile(program)
        # Arrays of one kind, or the model would be traced again as it is now.
        values = ([numpy(v) for v in x] for x in (trained, rest))
        return self.programs[key](*values)

    def loss(self, found):
        random = jax.random.key(0)
        return sum(
            (jax.random.normal(random, y.shape) * y).sum() for y in found
        )

    def outputs(self, model):
        return dict(enumerate(self.run(model)[0][1]))

    def gradients(self, model):
        return self.run(model)[1]


class Untraced(Compiled):
    """For what reads the values of its inputs, which no program can."""

    first_step = 0.0
    compile = staticmethod(lambda function: function)
    outputs = Eager.outputs


# These read values while they are called: of inputs, the last one of its
# variables.
RUNS = dict.fromkeys(EAGER_ONLY, Untraced) | {"StableDiffusion3Backbone": Eager}


def census(name, method, folder):
    run = RUNS.get(name, Compiled)()

    def make():
        keras.utils.set_random_seed(0)
        model, run.data = TINY[name]()
        assert not left_out(model, method)
        return model

    promises(method, make, run, folder, tolerance=1e-3, size=0.05)


def left_out(model, method):
    """The matrices of the model that a method does not reach."""
    reached = {id(x.kernel) for x in find_targets(model).values()}
    reached |= depthwise_kernels(model)
    return [
        v.path
        for v in model.trainable_variables
        if len([n for n in v.shape if n > 1]) > 1
        and not v.path.split("/")[-1].endswith(NO_MATRIX)
        and id(v) not in reached
        and (method.banks or "expert_bank" not in v.path)
    ]


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
