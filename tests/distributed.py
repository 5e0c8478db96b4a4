"""Programs on eight devices, for `test_distribution.py` to run.

JAX makes its devices when it starts; so they need a process of their own:

    python tests/distributed.py losses gemma, files llama3 svf
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    "--xla_force_host_platform_device_count=8"
)
os.environ["KERAS_SVDTUNE_CACHE"] = "0"

import jax
import keras
import keras_hub
import numpy as np
from helpers import default_method, default_methods, perturb

import keras_svdtune
from keras_svdtune.model.targets import adapted_targets
from keras_svdtune.runtime.keras_internals import built_without_values

VOCABULARY, STEPS = 64, 20
SIZES = dict(
    vocabulary_size=VOCABULARY,
    num_layers=1,
    num_query_heads=8,
    num_key_value_heads=8,
    intermediate_dim=128,
)
MODELS = {
    "gemma": (
        keras_hub.models.GemmaBackbone,
        keras_hub.models.GemmaCausalLM,
        {**SIZES, "hidden_dim": 32, "head_dim": 8},
    ),
    "llama3": (
        keras_hub.models.Llama3Backbone,
        keras_hub.models.Llama3CausalLM,
        {**SIZES, "hidden_dim": 64},
    ),
}


def distribution(name, shape, rules=()):
    """ModelParallel with our map for one of the models, and further rules."""
    mesh = keras.distribution.DeviceMesh(
        shape, ("batch", "model"), keras.distribution.list_devices("cpu")
    )
    cls, _, sizes = MODELS[name]
    with built_without_values():
        backbone = cls(**sizes)
    layout_map = keras_svdtune.svdtune_layout_map(backbone, mesh)
    for path, spec in dict(rules).items():
        layout_map[path] = spec
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def make(name, weights=None, **sizes):
    """A causal LM; with these weights."""
    backbone, task, defaults = MODELS[name]
    keras.utils.set_random_seed(0)
    model = task(backbone=backbone(**defaults | sizes), preprocessor=None)
    for v, value in zip(model.weights, weights or (), strict=bool(weights)):
        v.assign(value)
    return model


def numpy(variables):
    return [np.asarray(v.value) for v in variables]


def tokens():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (8, 12)).astype("int32")
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def train(model, steps=STEPS):
    """The losses of these steps of `fit`."""
    x = tokens()
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    y = np.roll(x["token_ids"], -1, axis=1)
    return model.fit(
        x, y, batch_size=8, epochs=steps, shuffle=False, verbose=0
    ).history["loss"]


def split(variable):
    """Devices that hold other parts of a variable."""
    whole = variable.value.size
    return whole // variable.value.addressable_shards[0].data.size


def same(found, expected, what):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and np.array_equal(a, b), (what, i)


def methods(names):
    """These methods; all where none is named."""
    return list(map(default_method, names)) if names else default_methods()


def losses(name, *only):
    """Every method on (2, 4), against one device: losses and bases."""
    many = distribution(name, (2, 4))
    start = make(name)
    weights = numpy(start.weights)
    for method in methods(only):
        one = make(name, weights)
        with many.scope():
            model = make(name, weights)
            model.backbone.enable_adapter(method)
        one.backbone.enable_adapter(method)
        same(numpy(model.weights), numpy(one.weights), method)
        # Enabled in the scope or not, and trained in it.
        with many.scope():
            found = train(model)
        expected = train(one)
        difference = np.max(np.abs(np.subtract(found, expected)))
        assert difference < 1e-4, (method, difference)
        assert expected[-1] < expected[0] - 1e-3, (method, expected)
        for slot in model.optimizer.variables:
            like = [
                v
                for v in model.trainable_variables
                if v.path.replace("/", "_") in slot.path
            ]
            for v in like:
                assert slot.value.sharding == v.value.sharding, slot.path
        print(method, difference)


def sizes(name, *only):
    """Bytes on each of eight devices, and where they are."""
    many = distribution(name, (1, 8))
    wide = {"hidden_dim": 256, "intermediate_dim": 1024}
    model = make(name, **wide)
    weights = numpy(model.weights)
    with many.scope():
        model = make(name, weights, **wide)
    for method in methods(only):
        model.backbone.enable_adapter(method)  # outside the scope
        parts = whole = 0
        for layer in adapted_targets(model.backbone).values():
            for key, v in layer.adapter.variables_by_name().items():
                size = v.value.nbytes
                whole += size
                parts += size // split(v)
                if key.endswith("basis"):
                    assert split(v) == 8, v.path
        print(method, parts / whole)
        if method.name in ("svf", "svft"):
            assert parts / whole <= 1 / 6, method
        else:
            # Of A and B one follows the split dim of W; the other is whole.
            assert parts / whole < 0.75, method
        model.backbone.remove_adapter()
        same(numpy(model.weights), weights, "the base")


def files(name, *only):
    """Saved on eight devices and loaded on one, and the other way round."""
    many = distribution(name, (2, 4))
    one = make(name)
    weights = numpy(one.weights)
    with many.scope():
        model = make(name, weights)
    folder = Path(tempfile.mkdtemp())
    prompt = {k: v[:, :12] for k, v in tokens().items()}
    prompt["padding_mask"] = (np.arange(12) < 6) * np.ones((8, 1), "int32")
    for method in methods(only):
        key = method.name
        pairs = [(model, one, "to one"), (one, model, "to eight")]
        for source, target, what in pairs:
            source.backbone.enable_adapter(method)
            perturb(source.backbone)
            trained = numpy(source.backbone.trainable_variables)
            path = folder / f"{key} {what}.safetensors"
            source.backbone.save_adapter(path)
            target.backbone.load_adapter(path)  # enables it
            same(
                numpy(target.backbone.weights),
                numpy(source.backbone.weights),
                what,
            )
            target.backbone.load_adapter(path)  # assigns
            full = folder / f"{key} {what}.weights.h5"
            source.backbone.save_weights(full)
            for v in target.backbone.trainable_variables:
                v.assign(np.zeros(v.shape))
            target.backbone.load_weights(full)
            same(numpy(target.backbone.trainable_variables), trained, full)
            a, b = (np.asarray(m.backbone(tokens())) for m in (source, target))
            assert np.max(np.abs(a - b)) < 1e-4 * np.max(np.abs(a)), what
            with many.scope():
                words = model.generate(prompt, stop_token_ids=None)
            expected = one.generate(prompt, stop_token_ids=None)
            same([words["token_ids"]], [expected["token_ids"]], "words")
            with keras_svdtune.adapter_disabled(model.backbone):
                off = np.asarray(model.backbone(tokens()))
            source.backbone.merge_adapter()
            merged = np.asarray(source.backbone(tokens()))
            assert np.max(np.abs(a - merged)) < 1e-4 * np.max(np.abs(a))
            target.backbone.remove_adapter()
            same(numpy(target.weights), weights, "the base again")
            for v, value in zip(source.weights, weights, strict=True):
                v.assign(value)
            base = np.asarray(model.backbone(tokens()))
            same([off], [base], "off")
    for v in model.backbone.variables:
        if "ffw_linear/kernel" in v.path:
            assert split(v) == 8, "merging kept the layout"


def named(name, *only):
    """Two adapters by name, on eight devices and on one."""
    many = distribution(name, (2, 4))
    one = make(name)
    weights = numpy(one.weights)
    with many.scope():
        model = make(name, weights)
    folder = Path(tempfile.mkdtemp())

    def alike(what):
        a, b = (np.asarray(m.backbone(tokens())) for m in (model, one))
        assert np.max(np.abs(a - b)) < 1e-4 * np.max(np.abs(b)), what
        return b

    for method in methods(only):
        for seed, key in enumerate("ab"):
            for m in (model, one):
                m.backbone.enable_adapter(method, name=key)
                perturb(m.backbone, seed)
        found = {}
        for choice in ("a", "b", None):
            for m in (model, one):
                m.backbone.set_adapter(choice)
            found[choice] = alike((method, choice))
        assert np.max(np.abs(found["a"] - found["b"])) > 1e-2
        if method.linear:
            for m in (model, one):
                m.backbone.set_adapter({"a": 0.5, "b": 0.5})
            alike((method, "a sum"))
        rows = ["a", "b", None, "a"] * 2
        with (
            keras_svdtune.adapter_per_example(model.backbone, rows),
            keras_svdtune.adapter_per_example(one.backbone, rows),
        ):
            alike((method, "rows"))
        path = folder / f"{method.name}.safetensors"
        model.backbone.save_adapter(path, name="b")
        one.backbone.load_adapter(path, name="c")
        model.backbone.set_adapter("b")
        alike((method, "a file"))
        for m in (model, one):
            m.backbone.remove_adapter()
        same(numpy(model.weights), weights, "the base again")
        print(method)


def dropout(name):
    """Masks are the same on eight devices, whatever rules a user has."""
    one = make(name)
    weights = numpy(one.weights)
    method = keras_svdtune.LoRA(rank=4, dropout=0.1)

    def enable(model):
        keras.utils.set_random_seed(0)
        model.backbone.enable_adapter(method)
        perturb(model.backbone)

    enable(one)
    expected = train(one, 3)
    greedy = {".*adapter/dropout.*": (None, "model")}
    many = distribution(name, (2, 4), greedy)
    for within in (True, False):
        with many.scope():
            model = make(name, weights)
            if within:
                enable(model)
        if not within:
            enable(model)
        with many.scope():
            found = train(model, 3)
        difference = np.max(np.abs(np.subtract(found, expected)))
        assert difference < 1e-4, (found, expected)
        states = [v for v in model.variables if "dropout" in v.path]
        assert states
        for v in states:
            assert len(v.value.sharding.device_set) == 8, v.path
            assert split(v) == 1 and np.asarray(v.value)[1] == 3, v.path


def others(name):
    """DataParallel, a user's greedy rules, other hosts, stale optimizers."""
    cls, _, defaults = MODELS[name]
    devices = keras.distribution.list_devices("cpu")
    one = make(name)
    weights = numpy(one.weights)
    one.backbone.enable_svf()
    expected = train(one, 3)
    mesh = keras.distribution.DeviceMesh((8,), ("batch",), devices)
    data_parallel = keras.distribution.DataParallel(device_mesh=mesh)
    with data_parallel.scope():
        model = make(name, weights)
        train(model, 1)  # an optimizer of the scope, replaced outside of it
        for v, value in zip(model.weights, weights, strict=True):
            v.assign(value)
    model.backbone.enable_svf()
    for v in model.variables:
        assert len(v.value.sharding.device_set) == 8, v.path
    with data_parallel.scope():
        assert np.allclose(train(model, 3), expected, atol=1e-5)
    # Rules that match the adapter's paths, with a rank of their own.
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    greedy = keras.distribution.LayoutMap(mesh)
    greedy[".*attention/(query|key|value).*"] = ("model", None, None)
    greedy[".*ffw_(gating|gating_2|linear)/.*"] = (None, "model")
    greedy[".*embeddings"] = ("model", None)
    greedy = keras.distribution.ModelParallel(layout_map=greedy)
    with greedy.scope():
        model = make(name, weights)
        model.backbone.enable_adapter(
            keras_svdtune.SVF(), [".*(query|ffw_linear)", "token_embedding"]
        )
        train(model, 1)
        model.backbone.remove_adapter()
        model.backbone.enable_svf(replace_kernel=True)
        replaced = train(model, 3)
        assert np.allclose(replaced, expected, atol=1e-4), replaced
        model.backbone.remove_adapter()
    with distribution(name, (2, 4)).scope():
        model = make(name, weights)
        model.backbone.enable_pissa(rank=2, quantize="int4")
    quantized = make(name, weights)
    quantized.backbone.enable_pissa(rank=2, quantize="int4")
    same(numpy(model.weights), numpy(quantized.weights), "QPiSSA")
    # A model on one device stays there, whatever scope it is enabled in.
    alone = make(name, weights)
    with greedy.scope():
        alone.backbone.enable_svf()
    for v in alone.variables:
        assert len(v.value.sharding.device_set) == 1, v.path
    # A declared layer, in the scope.
    dense = keras.distribution.LayoutMap(mesh)
    dense[".*kernel"] = (None, "model")
    with keras.distribution.ModelParallel(layout_map=dense).scope():
        declared = keras.Sequential(
            [keras.layers.Input((16,)), keras_svdtune.SVFDense(8)]
        )
        declared.compile("adam", "mse")
        declared.fit(np.ones((8, 16)), np.ones((8, 8)), verbose=0)
        assert split(declared.layers[-1].adapter.basis) == 4


if __name__ == "__main__":
    keras.config.disable_interactive_logging()
    assert jax.device_count() == 8
    for program in " ".join(sys.argv[1:]).split(","):
        name, *arguments = program.split()
        globals()[name](*arguments)
