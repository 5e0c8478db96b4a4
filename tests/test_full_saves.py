"""Full saves of adapted models load in plain Keras and KerasHub as the merged
model; adapted ones take them up where they were; hand-built ones keep apart
what belongs to the base and to the adapter."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    BACKBONES,
    adapted,
    assert_close,
    assert_differ,
    assert_same,
    default_methods,
    flat,
    method_id,
    must_stay,
    numpy,
    of_rank,
    perturb,
    randomise,
    small_data,
    small_model,
    trainables,
    values,
)
from helpers import eager as outputs

import keras_svdtune
from keras_svdtune.hosts.host import AdapterHost
from keras_svdtune.matrix.rounding import rounded

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("full_saves")

X, Y = small_data()
Z = np.random.default_rng(1).standard_normal((4, 3, 6)).astype("float32")
slow = pytest.mark.slow


# The smallest matrices here are 6 x 4 and 4 x 5.
METHODS = [of_rank(method, 2) for method in default_methods()]
one_of_each = pytest.mark.parametrize("method", METHODS, ids=method_id)


def fresh(make, seed=0):
    """A new model, its weights drawn with another seed."""
    keras.backend.clear_session(free_memory=False)
    model = make()
    if seed:
        randomise(model, seed)
    return model


def save(model, path, kind):
    if kind == "preset":
        model.save_to_preset(str(path / "preset"))
    else:
        path = path / f"model.{kind}"
        model.save(path) if kind == "keras" else model.save_weights(path)


def load_plain(make, path, kind):
    """A model that never had an adapter."""
    match kind:
        case "preset":
            return keras_hub.models.Backbone.from_preset(str(path / "preset"))
        case "keras":
            return keras.saving.load_model(path / "model.keras")
        case "weights.h5":
            model = fresh(make, seed=5)
            model.load_weights(path / "model.weights.h5")
            return model


def assert_plain(model):
    assert not any(isinstance(x, AdapterHost) for x in flat(model))
    assert not any("svf" in v.path for v in model.weights)


one_backbone = pytest.mark.parametrize(
    "name",
    ["albert", *(pytest.param(x, marks=slow) for x in ("bert", "gemma"))],
)


@pytest.mark.parametrize("kind", ["keras", "weights.h5", "preset"])
@one_backbone
def test_backbone_loads_in_plain_keras_hub(name, kind, tmp_path):
    make, data = BACKBONES[name]
    model = make()
    base = outputs(model, data)
    model.enable_svf()
    perturb(model)
    expected = outputs(model, data)
    assert_differ(expected, base)
    learned = values(model)
    save(model, tmp_path, kind)
    # Saving changed nothing.
    assert_same(values(model), learned)
    assert_same(outputs(model, data), expected)

    plain = load_plain(make, tmp_path, kind)
    assert_plain(plain)
    assert_close(outputs(plain, data), expected, 1e-4)
    # To the bit it is what merging gives.
    model.merge_adapter()
    assert_same([v for _, v in values(plain)], [v for _, v in values(model)])
    assert_same(
        [v.path for v in plain.weights], [v.path for v in model.weights]
    )


@one_of_each
def test_every_method_saves_merged(method, tmp_path):
    model = small_model()
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    assert method.name not in model.to_json().lower()
    save(model, tmp_path, "keras")
    plain = load_plain(small_model, tmp_path, "keras")
    assert_plain(plain)
    keras_svdtune.merge_adapter(model)
    assert_same([v for _, v in values(plain)], [v for _, v in values(model)])


@one_backbone
def test_adapted_model_loads_a_plain_file(name, tmp_path):
    """The file's kernels, the adapter at its start on their own basis."""
    make, data = BACKBONES[name]
    plain = fresh(make, seed=7)
    expected = outputs(plain, data)
    plain.save_weights(tmp_path / "model.weights.h5")
    model = fresh(make)
    model.enable_svf()
    perturb(model)
    model.load_weights(tmp_path / "model.weights.h5")
    assert len(adapted(model)) > 3
    assert_same(outputs(model, data), expected)
    # The basis is that of the new kernels: as if enabled on them.
    plain.enable_svf()
    for model_ in (model, plain):
        perturb(model_)
    assert_same(outputs(model, data), outputs(plain, data))
    model.remove_adapter()
    plain.remove_adapter()
    assert_same([v for _, v in values(model)], [v for _, v in values(plain)])


@one_backbone
def test_adapted_model_loads_an_adapted_file(name, tmp_path):
    make, data = BACKBONES[name]
    model = fresh(make)
    model.enable_svf()
    perturb(model)
    model.save_weights(tmp_path / "model.weights.h5")
    again = fresh(make)
    base = [v for _, v in values(again)]
    again.enable_svf()
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same(trainables(again), trainables(model))
    assert_same(outputs(again, data), outputs(model, data))
    again.remove_adapter()
    assert_same([v for _, v in values(again)], base)


SVF, LoRA, PiSSA = keras_svdtune.SVF, keras_svdtune.LoRA, keras_svdtune.PiSSA


@pytest.mark.parametrize(
    "ours, theirs, seed, message",
    [
        (SVF(), SVF(), 3, "(first|second).*base|base.*(first|second)"),
        (SVF(), PiSSA(2), 0, "holds no pissa_a0.*svf_delta"),
        (LoRA(2, alpha=16.0), LoRA(2), 0, "would not do in layer|holds no"),
        (
            keras_svdtune.SVFT("banded", off_diagonals=1),
            keras_svdtune.SVFT("random", off_diagonals=1),
            0,
            "would not do in layer|holds no",
        ),
    ],
    ids=["base", "method", "alpha", "pattern"],
)
def test_another_adapted_model_is_an_error(
    ours, theirs, seed, message, tmp_path
):
    model = fresh(small_model)
    keras_svdtune.enable_adapter(model, ours)
    perturb(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other = fresh(small_model, seed)
    keras_svdtune.enable_adapter(other, theirs)
    before = outputs(other, X)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        other.load_weights(tmp_path / "model.weights.h5")
    if not seed:  # else Keras has read its biases by then
        assert_same(outputs(other, X), before)


# Hand-built models with declared layers.


def layer_classes(method):
    cls = type(method)
    stem = "".join(c for c in cls.title if c.isalnum())
    return (
        getattr(keras_svdtune, f"{stem}Dense"),
        getattr(keras_svdtune, f"{stem}EinsumDense"),
    )


def functional(method):
    dense, einsum = layer_classes(method)
    settings = method.settings()
    x = keras.Input((3, 6))
    y = dense(8, activation="tanh", name="dense", **settings)(x)
    y = einsum(
        "btd,ndh->btnh", (None, 2, 3), bias_axes="h", name="einsum", **settings
    )(y)
    return keras.Model(x, y)


@keras.saving.register_keras_serializable(package="tests")
class Attributes(keras.Model):
    """Holds its layers in attributes, whose names are those in its files."""

    def __init__(self, dense, einsum, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.einsum = dense, einsum

    def call(self, x):
        return self.einsum(self.dense(x))

    def get_config(self):
        layers = {"dense": self.dense, "einsum": self.einsum}
        return super().get_config() | {
            k: keras.saving.serialize_keras_object(x) for k, x in layers.items()
        }

    @classmethod
    def from_config(cls, config):
        for name in ("dense", "einsum"):
            layer = keras.saving.deserialize_keras_object(config[name])
            config[name] = layer
        return cls(**config)


def attributes(dense, einsum, **settings):
    model = Attributes(
        dense(8, activation="tanh", name="dense", **settings),
        einsum(
            "btd,ndh->btnh",
            (None, 2, 3),
            bias_axes="h",
            name="einsum",
            **settings,
        ),
    )
    model(Z)
    return model


def subclassed(method):
    return attributes(*layer_classes(method), **method.settings())


@pytest.mark.parametrize(
    "build, method",
    [
        *((functional, method) for method in METHODS),
        (subclassed, SVF()),  # which makes no difference to a method
    ],
    ids=lambda x: x.__name__ if callable(x) else method_id(x),
)
def test_declared_layers_round_trip(build, method, tmp_path):
    model = fresh(lambda: build(method))
    perturb(model)
    hosts = [x for x in flat(model) if isinstance(x, AdapterHost)]
    expected, trained = outputs(model, Z), trainables(model)
    assert {v.path for v in model.trainable_weights} >= set(trained)
    assert not any(
        v.path.endswith(("kernel", "bias")) for v in model.trainable_weights
    )
    for kind in ("keras", "weights.h5"):
        save(model, tmp_path, kind)
        if kind == "keras":
            loaded = keras.saving.load_model(tmp_path / "model.keras")
        else:
            keras.utils.set_random_seed(77)
            loaded = fresh(lambda: build(method))
            assert_differ(outputs(loaded, Z), expected)
            loaded.load_weights(tmp_path / "model.weights.h5")
        layers = [x for x in flat(loaded) if isinstance(x, AdapterHost)]
        assert [type(x) for x in layers] == [type(x) for x in hosts]
        # Base and adapter apart: nothing was merged.
        assert_same([x._kernel for x in layers], [x._kernel for x in hosts])
        assert_same(outputs(loaded, Z), expected)
        assert len(loaded.trainable_weights) == len(model.trainable_weights)
    with keras_svdtune.adapter_disabled(loaded):
        assert_differ(outputs(loaded, Z), expected)


@one_of_each
def test_from_layer(method):
    dense, einsum = layer_classes(method)
    settings = method.settings()
    plain_dense = keras.layers.Dense(8, activation="gelu", name="dense")
    plain_einsum = keras.layers.EinsumDense(
        "btd,ndh->btnh", (None, 2, 3), bias_axes="nh", name="einsum"
    )
    for plain, cls in ((plain_dense, dense), (plain_einsum, einsum)):
        expected_class = type(plain)
        with pytest.raises(ValueError, match="takes a built"):
            cls.from_layer(plain, **settings)
        plain.build((None, 3, 6))
        for v in plain.weights:
            v.assign(np.random.default_rng(2).standard_normal(v.shape))
        expected = numpy(plain(Z))
        before = [numpy(v) for v in plain.weights]
        layer = cls.from_layer(plain, **settings)
        assert type(layer) is cls and layer.name == plain.name
        assert_same(numpy(layer(Z)), expected)
        assert layer.trainable_weights
        for v in layer.adapter.variables_by_name(trainable=True).values():
            v.assign(v + 0.3)
        assert_differ(numpy(layer(Z)), expected)
        # The plain one is another layer, and as it was.
        assert type(plain) is expected_class
        assert_same([numpy(v) for v in plain.weights], before)
        assert_same(numpy(plain(Z)), expected)
        assert_same(numpy(layer._kernel), numpy(plain._kernel))
    with pytest.raises(ValueError, match="takes a built"):
        dense.from_layer(plain_einsum, **settings)


@pytest.mark.fast
def test_from_layer_has_the_basis_of_the_copied_kernel():
    model = small_model()
    plain = model.get_layer("first")
    layer = keras_svdtune.SVFDense.from_layer(plain)
    keras_svdtune.enable_svf(model, ["first"])
    assert_same(numpy(layer.adapter.basis), numpy(plain.adapter.basis))


@pytest.mark.parametrize("name", ["svf", "svft", "pissa"])
def test_declared_layers_load_a_plain_file(name, tmp_path):
    """The weights of the same model with plain layers.

    Where a model holds its layers in a list (so does a Functional one), a
    weights file calls them by their class, and no plain file fits.
    """
    method = next(m for m in METHODS if m.name == name)
    plain_classes = (keras.layers.Dense, keras.layers.EinsumDense)
    source = fresh(lambda: attributes(*plain_classes))
    randomise(source, seed=4)
    source.save_weights(tmp_path / "model.weights.h5")
    model = fresh(lambda: subclassed(method))
    perturb(model)
    model.load_weights(tmp_path / "model.weights.h5")
    assert_same(outputs(model, Z), outputs(source, Z))
    keras_svdtune.enable_adapter(source, method)
    for adapted_model in (model, source):
        perturb(adapted_model)
    assert_same(outputs(model, Z), outputs(source, Z))
    # And the other way round: a plain one ignores the adapter beside.
    model.save_weights(tmp_path / "declared.weights.h5")
    with keras_svdtune.adapter_disabled(model):
        expected = outputs(model, Z)
    plain = fresh(lambda: attributes(*plain_classes))
    plain.load_weights(tmp_path / "declared.weights.h5")
    assert_same(outputs(plain, Z), expected)


def test_declared_layers_that_are_not_built():
    model = keras.Sequential([keras_svdtune.SVFDense(3)], name="raw")
    for call in (
        keras_svdtune.adapter_summary,
        keras_svdtune.merge_adapter,
        keras_svdtune.enable_svf,
        lambda m: keras_svdtune.save_adapter(m, "a.safetensors"),
    ):
        with pytest.raises(ValueError, match="'raw'"):
            call(model)


def test_in_bfloat16(tmp_path):
    def make():
        return small_model("bfloat16")

    model = fresh(make)
    keras_svdtune.enable_svf(model)
    perturb(model, size=0.5)
    model.save_weights(tmp_path / "model.weights.h5")
    plain, again = fresh(make), fresh(make)
    plain.load_weights(tmp_path / "model.weights.h5")
    keras_svdtune.enable_svf(again)
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same(outputs(again, X), outputs(model, X))
    keras_svdtune.merge_adapter(model)
    assert_same([v for _, v in values(plain)], [v for _, v in values(model)])


def test_a_failed_load_leaves_an_adapted_backbone_usable(tmp_path):
    model = fresh(small_model)
    keras_svdtune.enable_svf(model)
    model.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "bad.weights.h5").write_bytes(b"not a weights file")
    with must_stay(model, X, False), pytest.raises(Exception):  # noqa: B017
        model.load_weights(tmp_path / "bad.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")


def test_random_positions_of_a_model_with_another_name(tmp_path):
    def unnamed():
        model = keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(8, name="a"),
                keras.layers.Dense(8, name="b"),
            ]
        )
        randomise(model)
        return model

    method = keras_svdtune.SVFT("random", off_diagonals=1)
    x = np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
    first = unnamed()
    keras_svdtune.enable_adapter(first, method)
    perturb(first)
    first.save_weights(tmp_path / "adapted.weights.h5")
    second = unnamed()
    assert second.name != first.name
    keras_svdtune.enable_adapter(second, method)
    second.load_weights(tmp_path / "adapted.weights.h5")
    assert_same(outputs(second, x), outputs(first, x))


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="Keras' Sequential does not say what failed there",
)
@pytest.mark.parametrize("name", ["svf", "pissa"])
def test_declared_layers_that_fit_builds(name):
    dense, settings = (
        (keras_svdtune.SVFDense, {})
        if name == "svf"
        else (keras_svdtune.PiSSADense, {"rank": 2})
    )
    model = keras.Sequential([dense(8, **settings), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).standard_normal((16, 6)).astype("float32")
    losses = model.fit(x, x[:, :2], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    layer = model.layers[0]
    kernel = numpy(layer.kernel if name == "pissa" else layer._kernel)
    if name == "svf":
        kernel = rounded(kernel)
        _, s, _ = np.linalg.svd(kernel)
        basis = next(
            numpy(v) for v in layer.adapter.variables if v.shape == (6, 6)
        )
        gram = basis.T @ kernel @ kernel.T @ basis
        assert_close(gram, np.diag(s**2), 1e-5)
