"""What every method promises, whatever kind of kernel it adapts.

`promises` is the contract. Here it is kept by the kinds of kernels that need
code of their own: quantized ones, tables of embeddings, and those that a layer
reads directly. `test_conformance.py` has Dense layers and convolutions, in
more detail; `test_census.py` every backbone of KerasHub.
"""

import dataclasses
from collections.abc import Callable

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    all_methods,
    assert_close,
    assert_same,
    default_methods,
    dot,
    eager,
    error,
    flat,
    gradients,
    hosts_data,
    hosts_model,
    method_id,
    numpy,
    perturb,
    predict,
    randomise,
)
from keras import layers, ops, tree
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts

import keras_svdtune
from keras_svdtune import SVF, DoRA, PiSSA


class Eager:
    """Calls a model. What is computed twice is the same to the bit."""

    first_step = 0.0
    moved = 1e-3  # by how much an output must change, relative
    reached = 1.0  # the share of trainables that must get a gradient

    def __init__(self, data=None):
        self.data = data

    def outputs(self, model):
        return dict(enumerate(tree.flatten(eager(model, self.data))))

    def gradients(self, model):
        """Of every trainable, for random gradients of the outputs."""
        rng = np.random.default_rng(2)
        ups = [
            rng.standard_normal(y.shape).astype("float32")
            for y in self.outputs(model).values()
        ]

        def loss():
            found = tree.flatten(model(self.data, training=False))
            return sum(map(dot, found, ups))

        return gradients(loss, stepped(model))


def stepped(model):
    """The trainables that an optimizer moves: not AdaLoRA's averages."""
    return [
        v for v in model.trainable_variables if not v.overwrite_with_gradient
    ]


def learned(model):
    """Path -> value of these."""
    return {v.path: numpy(v) for v in stepped(model)}


def state(model):
    """All that `remove_adapter` must give back."""
    return {
        "classes": [str(type(x)) for x in flat(model)],
        "modes": [str(getattr(x, "quantization_mode", 0)) for x in flat(model)],
        "paths": [v.path for v in model.weights],
        "trainable": [v.path for v in model.trainable_weights],
        "flags": [str(x.trainable) for x in [model, *flat(model)]],
        "weights": [numpy(v) for v in model.weights],
    }


def promises(
    method,
    make,
    run,
    folder,
    names=None,
    tolerance=1e-5,
    size=0.3,
    replaced=None,
):
    """What a user of any adapter may rely on.

    Args:
        method: `Method`.
        make: function that builds the model, with the same weights each time.
        run: `Eager`, or how else to compute.
        folder: for files.
        names: the target layers; None for the default.
        tolerance: for the merged model's outputs, relative.
        size: how far the trainables are moved from where they start.
        replaced: for a method that replaces the base, the tolerance of its
            outputs at first and when it is taken away; None: to the bit.
    """

    def made():
        keras.backend.clear_session(free_memory=False)  # the same paths
        return make()

    model = made()
    before, base = state(model), run.outputs(model)
    keras_svdtune.enable_adapter(model, method, names)
    first = run.outputs(model)
    exactly = replaced is None
    assert_close(
        first, base, run.first_step if exactly else replaced, "first step"
    )
    assert model.trainable_variables
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    perturb(model, size=size)
    moved, trained = run.outputs(model), learned(model)
    with keras_svdtune.adapter_disabled(model):
        assert_same(run.outputs(model), first, "disabled")
    assert_same(run.outputs(model), moved, "enabled again")
    differ = [error(moved[i], y) > run.moved for i, y in base.items()]
    assert all(differ) if run.reached == 1.0 else any(differ), differ

    found = dict(
        zip((v.path for v in stepped(model)), run.gradients(model), strict=True)
    )
    assert all(np.all(np.isfinite(g)) for g in found.values())
    unreached = [path for path, g in found.items() if not np.any(g)]
    assert len(unreached) <= (1.0 - run.reached) * len(found), unreached

    adapter, full = folder / "adapter.safetensors", folder / "all.weights.h5"
    keras_svdtune.save_adapter(model, adapter)
    model.save_weights(full)
    keras_svdtune.remove_adapter(model)
    if exactly:
        assert_same(state(model), before, "removed")
    assert_close(run.outputs(model), base, replaced or 0.0, "removed")

    # An adapter file on the base, and a full save on an adapted model.
    fresh = made()
    assert_same(state(fresh)["weights"], before["weights"], "the same model")
    keras_svdtune.load_adapter(fresh, adapter)
    assert_same(learned(fresh), trained, "loaded")
    # Of equal weights torch rounds products by where in memory they lie.
    rounding = 0.0 if exactly else 1e-6
    assert_close(run.outputs(fresh), moved, rounding, "loaded")
    perturb(fresh, seed=8)
    fresh.load_weights(full)
    assert_same(learned(fresh), trained, "loaded from a full save")
    assert_close(run.outputs(fresh), moved, rounding, "loaded from a full save")

    # A plain model reads the merged kernels of a full save.
    keras_svdtune.merge_adapter(fresh)
    assert_close(run.outputs(fresh), moved, tolerance, "merged")
    model.load_weights(full)
    after, merged = state(model), state(fresh)
    pairs = zip(after.pop("weights"), merged.pop("weights"), strict=True)
    for found, expected in pairs:
        assert_close(found, expected, rounding, "merged in a full save")
    assert_same(after, merged, "merged in a full save")
    if exactly:
        del before["weights"]
        assert_same(after, before, "merged")


def same_function(found, expected, variables):
    """Asserts equal outputs, and equal gradients of these variables.

    Args:
        found, expected: functions without arguments.
        variables: none of them without a gradient.
    """
    y = numpy(expected())
    assert_close(found(), y, 1e-5, "output")
    dy = np.random.default_rng(2).standard_normal(y.shape).astype("float32")
    both = (
        gradients(lambda f=f: dot(f(), dy), variables)
        for f in (found, expected)
    )
    for variable, a, b in zip(variables, *both, strict=True):
        assert_close(a, b, 1e-4, variable.path)
        assert np.any(a), variable.path


def trains_alone(model, x, y, epochs=10, rate=2e-2):
    """Trains the adapter of a model, all of it, and nothing else."""
    frozen = [numpy(v) for v in model.non_trainable_variables]
    before = learned(model)
    model.compile(keras.optimizers.Adam(rate), "mse")
    losses = model.fit(x, y, epochs=epochs, verbose=0).history["loss"]
    assert losses[-1] < 0.98 * losses[0], losses
    for path, value in learned(model).items():
        assert not np.array_equal(value, before[path]), path
    after = [numpy(v) for v in model.non_trainable_variables]
    assert_same(after, frozen, "what is frozen")


# The hosts.

# How far requantizing W' may move an output: half a step of its range.
ROUNDING = {"int8": 0.02, "int4": 0.25}


def quantized(mode, names, dtype="float32"):
    model = hosts_model(dtype, names)
    model.quantize(mode)
    return model


# Every kind of table: the class, its settings, and its shape.
TABLES = {
    "embedding": (layers.Embedding, {"mask_zero": True}, (24, 8)),
    "wide": (layers.ReversibleEmbedding, {"mask_zero": True}, (5, 8)),
    "square": (layers.ReversibleEmbedding, {}, (8, 8)),
    "hub": (
        keras_hub.layers.ReversibleEmbedding,
        {"logit_soft_cap": 2.0, "reverse_dtype": "float32"},
        (24, 8),
    ),
}


def tables(names=tuple(TABLES), dtype="float32"):
    """A model with a branch for every table: looked up, and in reverse."""
    inputs, outputs = {}, {}
    for name in names:
        cls, settings, shape = TABLES[name]
        layer = cls(*shape, name=name, dtype=dtype, **settings)
        x = keras.Input((3,), name=f"{name}_input", dtype="int32")
        y = layer(x)
        outputs[name] = ops.cast(y, "float32")
        if cls is not layers.Embedding:
            z = layers.LayerNormalization(name=f"{name}_norm", dtype=dtype)(y)
            z = layer(z, reverse=True)
            outputs[f"{name}_reverse"] = ops.cast(z, "float32")
        inputs[name] = x
    model = keras.Model(list(inputs.values()), outputs, name="tables")
    rng = np.random.default_rng(0)
    for name in names:
        table = model.get_layer(name).weights[0]
        table.assign(rng.standard_normal(tuple(table.shape)) / 2)
    return model


def looked_up(names=tuple(TABLES), batch=6):
    """What `tables` looks up."""
    rng = np.random.default_rng(1)
    return [
        rng.integers(0, TABLES[name][2][0], (batch, 3)).astype("int32")
        for name in names
    ]


def experts():
    """A bank of three matrices, three times."""
    x = keras.Input((6,), batch_size=5)
    bank = MixtralMoeExperts(3, 6, 8, name="experts")
    model = keras.Model(x, ops.mean(bank(x), axis=0), name="moe")
    randomise(model)
    return model


def images():
    """Convolutions that are no product with the kernel as one matrix."""
    model = keras.Sequential(
        [
            layers.Input((4, 4, 4)),
            layers.Conv2DTranspose(5, 2, strides=2, name="transposed"),
            layers.SeparableConv2D(8, 2, name="separable"),
            layers.Conv2D(8, 2, groups=2, name="groups"),
        ]
    )
    randomise(model)
    return model


def normal(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


@dataclasses.dataclass(frozen=True)
class Host:
    """A model whose kernels are of one kind, its inputs, and its methods.

    Of these only the names in `quick` are not slow, with one setting each.
    """

    make: Callable
    data: object
    methods: list
    quick: str
    names: tuple | None = None
    tolerance: float = 1e-5
    replaced: float | None = None


def of_tables(names, quick, dtype="float32", tolerance=1e-5):
    methods = all_methods() if dtype == "float32" else default_methods()
    return Host(
        lambda: tables(names, dtype),
        looked_up(names),
        [m for m in methods if m.embeddings],
        quick,
        names,
        tolerance,
    )


def of_quantized(mode, names, quick):
    return Host(
        lambda: quantized(mode, names),
        hosts_data(names),
        [SVF(), PiSSA(2), DoRA(2)],
        quick,
        tolerance=ROUNDING[mode],
    )


FEW = ("dense_wide", "einsum_query")


def int8_table():
    model = tables(("embedding",))
    model.quantize("int8")
    return model


EACH = "svf svft pissa milora lora_xs lora dora"
BANKS = [PiSSA(0.5), *(m for m in default_methods() if m.banks)]
HOSTS = {
    "int8": of_quantized("int8", ("dense_tall", "einsum_query"), "svf dora"),
    "int4": of_quantized("int4", ("dense_wide", "einsum_output"), "svf pissa"),
    "lookup": of_tables(("embedding",), "svf svft pissa lora"),
    "tied": of_tables(("wide", "square"), "svf dora"),
    "hub": of_tables(("hub",), EACH),
    # SVFT divides by s, and magnifies what bfloat16 rounds.
    "bfloat16": of_tables(("hub",), "svf", "bfloat16", 8e-2),
    "mixed": of_tables(("wide", "hub"), "", "mixed_bfloat16", 8e-2),
    "int8_table": Host(
        int8_table,
        looked_up(("embedding",)),
        [SVF(), PiSSA(2), DoRA(2)],
        "svf",
        ("embedding",),
        ROUNDING["int8"],
    ),
    "qpissa": Host(
        lambda: hosts_model(names=FEW),
        hosts_data(FEW),
        [PiSSA(4, quantize="int4"), PiSSA(4, quantize="int8")],
        "pissa",
        tolerance=ROUNDING["int4"],
        replaced=ROUNDING["int4"],
    ),
    "experts": Host(experts, normal(5, 6), BANKS, "svf svft pissa dora"),
    "images": Host(images, normal(2, 4, 4, 4), BANKS, "svf"),
}


def cases():
    """Every kind of host with each of its methods."""
    found = []
    for kind, host in HOSTS.items():
        quick = set(host.quick.split())
        for method in host.methods:
            marks = [] if method.name in quick else [pytest.mark.slow]
            if (kind, method.name) in FAST:
                marks.append(pytest.mark.fast)
            quick.discard(method.name)  # its other settings are slow
            found.append(
                pytest.param(
                    kind, method, id=f"{kind}-{method_id(method)}", marks=marks
                )
            )
    return found


FAST = (("hub", "svf"), ("lookup", "pissa"), ("experts", "svf"))


@pytest.mark.parametrize("kind, method", cases())
def test_keeps_every_promise(kind, method, tmp_path):
    host = HOSTS[kind]
    promises(
        method,
        host.make,
        Eager(host.data),
        tmp_path,
        names=host.names,
        tolerance=host.tolerance,
        replaced=host.replaced,
    )


QUICK = ("int4", "lookup", "tied", "qpissa", "experts", "images")


@pytest.mark.parametrize(
    "kind, method",
    [
        *(
            pytest.param(
                kind,
                host.methods[0],
                id=kind,
                marks=[pytest.mark.slow] * (kind not in QUICK),
            )
            for kind, host in HOSTS.items()
        ),
        *(
            pytest.param(
                "hub",
                method,
                id=f"hub-{method.name}",
                marks=[pytest.mark.slow] * (method.name not in ("svf", "lora")),
            )
            for method in default_methods()
            if method.embeddings
        ),
    ],
)
def test_compiled_it_trains_the_adapter_alone(kind, method):
    host = HOSTS[kind]
    model = host.make()
    first = predict(model, host.data)
    keras_svdtune.enable_adapter(model, method, host.names)
    if host.replaced is None:
        assert_same(predict(model, host.data), first, "first step")
    # Within reach of scaled singular values, and of thin changes in part.
    trains_alone(model, host.data, tree.map_structure(lambda y: 1.5 * y, first))
