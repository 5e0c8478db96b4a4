"""Adapter files: what is in them, and that a file never loads into something
else in silence."""

import json
import os
import stat

import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import (
    BACKBONES,
    adapted,
    assert_differ,
    assert_same,
    compiles,
    default_methods,
    eager,
    hosts_data,
    hosts_model,
    method_id,
    must_stay,
    numpy,
    perturb,
    predict,
    randomise,
    small_data,
    small_model,
    tiny_gemma,
    tokens,
    trainables,
    values,
)

import keras_svdtune
from keras_svdtune import METHODS, SVF, SVFT, LoRAXS, PiSSA
from keras_svdtune.files import format

X, Y = small_data()
KEY = "keras_svdtune"


def fresh(make=small_model):
    keras.backend.clear_session(free_memory=False)
    return make()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def saved(path, method=None, make=small_model, targets=None):
    """A model with a trained adapter, written to `path`."""
    model = fresh(make)
    keras_svdtune.enable_adapter(model, method or SVF(), targets)
    perturb(model)
    keras_svdtune.save_adapter(model, path)
    return model


def read(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()[KEY])
    assert len(about.pop("sha256")) == 64
    return arrays, about


def rewrite(path, change):
    """Reads the file, lets `change` alter it, and writes it again."""
    arrays, about = read(path)
    change(arrays, about)
    keras_svdtune.SavedAdapter(about, arrays, "").save(path)


def refused(model, path, *parts, data=X):
    """Loading is an error that says `parts`; the model stays as it is."""
    learned = trainables(model)
    with must_stay(model, data, compiled=False):
        with pytest.raises(ValueError) as caught:
            keras_svdtune.load_adapter(model, path)
        assert_same(trainables(model), learned)
    for part in (*parts, str(path)):
        assert part in str(caught.value), str(caught.value)


# The format.


def test_format(path):
    gemma = fresh(tiny_gemma)
    gemma.enable_svf(["query", "ffw_linear"])
    perturb(gemma)
    gemma.save_adapter(path)
    arrays, about = read(path)
    layers = [
        f"decoder_block_{i}/{x}"
        for i in range(2)
        for x in ("attention/query", "ffw_linear")
    ]
    assert sorted(arrays) == sorted(
        ["base_fingerprints", "effects", *(f"{x}/svf_delta" for x in layers)]
    )
    assert arrays["base_fingerprints"].shape == (4, 5)
    assert arrays["effects"].shape == (4, 8)
    for x in layers:
        layer = adapted(gemma)[x]
        delta = arrays[f"{x}/svf_delta"]
        assert delta.dtype == np.float32
        assert_same(delta, numpy(layer.adapter.delta))
    assert about["format_version"] == 1
    assert about["method"] == "svf"
    assert about["settings"] == {}
    assert about["model_class"] == "GemmaBackbone"
    assert set(about["versions"]) == {"keras", "keras_hub"}
    assert list(about["layers"]) == layers
    assert about["layers"][layers[0]]["kernel_shape"] == [2, 8, 4]
    assert about["layers"][layers[0]]["dtype"] == "float32"


@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_settings_and_trainables_are_in_it(method, path):
    model = saved(path, method_for_small(method))
    arrays, about = read(path)
    assert about["method"] == method.name
    assert METHODS[about["method"]](**about["settings"]) == method_for_small(
        method
    )
    for layer in adapted(model).values():
        for name, v in layer.adapter.variables_by_name(True).items():
            assert_same(arrays[f"{layer.path}/{name}"], numpy(v))


def method_for_small(method):
    """Rank 2: the matrices of the small model are 6 x 4 and 4 x 5."""
    if not hasattr(method, "rank"):
        return method
    return type(method)(**(method.settings() | {"rank": 2}))


@pytest.mark.parametrize("name", BACKBONES)
def test_round_trip(name, path):
    make, data = BACKBONES[name]
    model = fresh(make)
    model.enable_svf()
    perturb(model)
    model.save_adapter(path)
    expected = eager(model, data)
    again = fresh(make)
    base = eager(again, data)
    again.load_adapter(str(path))
    assert_same(eager(again, data), expected)
    assert_differ(expected, base)
    assert list(adapted(again)) == list(adapted(model))
    again.remove_adapter()
    assert_same(eager(again, data), base)


def test_a_loaded_adapter_trains_and_saves(path, tmp_path):
    model = saved(path)
    model = fresh()
    keras_svdtune.load_adapter(model, path)
    second = tmp_path / "second.safetensors"
    keras_svdtune.save_adapter(model, second)
    assert second.read_bytes() == path.read_bytes()
    assert len(model.trainable_weights) == 2
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(X, Y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_a_rank_for_each_layer(path):
    """A rank by energy is an integer of its own in each layer."""
    model = saved(path, PiSSA(rank=0.6))
    _, about = read(path)
    ranks = {k: v["settings"]["rank"] for k, v in about["layers"].items()}
    assert len(ranks) == 2 and all(isinstance(r, int) for r in ranks.values())
    assert about["settings"]["rank"] == 0.6
    again = fresh()
    keras_svdtune.load_adapter(again, path)
    assert_same(eager(again, X), eager(model, X))


def test_other_precision_of_the_same_base(path):
    """Trained in float32, used in bfloat16, and the other way round."""
    for saved_in, loaded_in in (
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
    ):
        model = fresh(lambda dtype=saved_in: tiny_gemma(dtype))
        model.enable_svf()
        perturb(model)
        model.save_adapter(path)
        other = fresh(lambda dtype=loaded_in: tiny_gemma(dtype))
        other.load_adapter(path)
        assert_same(trainables(other), trainables(model))


def test_a_part_of_the_layers(path):
    model = saved(path, targets=["second"])
    again = fresh()
    keras_svdtune.load_adapter(again, path)
    assert [x.name for x in adapted(again).values()] == ["second"]
    assert_same(eager(again, X), eager(model, X))


# Loading onto what is enabled.


def test_onto_an_enabled_one(path):
    model = saved(path)
    expected, basis = (
        eager(model, X),
        numpy(adapted(model).popitem()[1].adapter.basis),
    )
    perturb(model, seed=8)
    variables = [id(v) for v in model.weights]
    keras_svdtune.load_adapter(model, path)
    assert_same(eager(model, X), expected)
    assert [id(v) for v in model.weights] == variables
    assert_same(numpy(adapted(model).popitem()[1].adapter.basis), basis)


@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_a_swap_compiles_nothing(method, path):
    """Other values, the same compiled `predict`, as the traces show."""
    names = ("dense_tall", "dense_wide")
    model, data = hosts_model(names=names), hosts_data(names)
    keras_svdtune.enable_adapter(model, method)
    perturb(model, seed=1)
    keras_svdtune.save_adapter(model, path)
    expected = predict(model, data)
    perturb(model, seed=2)
    traces = model.get_layer("dense_tall_counter").calls
    assert_differ(predict(model, data), expected)
    keras_svdtune.load_adapter(model, path)
    assert_same(predict(model, data), expected)
    if compiles():
        assert model.get_layer("dense_tall_counter").calls == traces


@pytest.mark.parametrize(
    "method", [SVF(), SVFT(), LoRAXS(rank=2)], ids=method_id
)
def test_it_is_hardly_larger_than_what_it_holds(method, path):
    """A few hundred bytes a layer; the real models have long paths too."""
    model = saved(path, method, make=lambda: tiny_gemma(num_layers=20))
    held = sum(v.nbytes for v in trainables(model).values())
    assert path.stat().st_size - held < 300 * len(adapted(model))


@pytest.mark.parametrize("enabled", [SVFT(), PiSSA(rank=1), PiSSA(rank=2)])
def test_onto_another_method(enabled, path):
    saved(path, PiSSA(rank=3))
    model = fresh()
    keras_svdtune.enable_adapter(model, enabled)
    perturb(model)
    refused(model, path, "remove_adapter()")


@pytest.mark.parametrize("ours, theirs", [(["first"], None), (None, ["first"])])
def test_onto_other_layers(ours, theirs, path):
    saved(path, targets=theirs)
    model = fresh()
    keras_svdtune.enable_svf(model, ours)
    perturb(model)
    refused(model, path)


# What does not fit.


def test_no_such_file(tmp_path):
    refused(fresh(), tmp_path / "none.safetensors", "There is no file")


@pytest.mark.parametrize("name", ["adapter.h5", "adapter", "a.safetensors.gz"])
def test_another_ending(name, tmp_path):
    refused(fresh(), tmp_path / name, "ends in '.safetensors'")
    model = fresh()
    keras_svdtune.enable_svf(model)
    with pytest.raises(ValueError, match="ends in '.safetensors'"):
        keras_svdtune.save_adapter(model, tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_truncated(share, path):
    saved(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(fresh(), path, "damaged")


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04 a zip", b"\x89HDF", b"\xff" * 64, b"{}"]
)
def test_not_safetensors(data, path):
    path.write_bytes(data)
    refused(fresh(), path, "damaged")


def test_a_directory(path):
    path.mkdir()
    refused(fresh(), path)


@pytest.mark.parametrize("metadata", [None, {}, {KEY: "no json"}, {KEY: "[]"}])
def test_foreign_safetensors(metadata, path):
    arrays = {"lora_A.weight": np.zeros((2, 3), "float32")}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    refused(fresh(), path, "not an adapter that `save_adapter` wrote")


def test_a_later_format(path):
    saved(path)
    rewrite(path, lambda arrays, about: about.update(format_version=2))
    refused(fresh(), path, "format version 2", "Update keras_svdtune")


@pytest.mark.parametrize("key", ["method", "settings", "layers"])
@pytest.mark.parametrize("value", [None, 3])
def test_metadata_of_another_kind(key, value, path):
    saved(path)
    rewrite(path, lambda arrays, about: about.update({key: value}))
    refused(fresh(), path, f"no valid '{key}'")


def test_a_method_that_is_not_known(path):
    saved(path)
    rewrite(path, lambda arrays, about: about.update(method="svff"))
    refused(fresh(), path, "'svff'", "'svf'")


def test_settings_that_are_not_known(path):
    saved(path)
    rewrite(path, lambda arrays, about: about.update(settings={"depth": 3}))
    refused(fresh(), path, "settings", "depth")


def test_a_layer_that_the_model_has_not(path):
    saved(path, make=tiny_gemma)
    smaller = fresh(lambda: tiny_gemma(num_layers=1))
    refused(
        smaller,
        path,
        "decoder_block_1/",
        "GemmaBackbone",
        "'decoder_block_0/",
        data=tokens(),
    )


def test_another_kernel_shape(path):
    saved(path, make=tiny_gemma)
    wider = fresh(lambda: tiny_gemma(intermediate_dim=32))
    refused(wider, path, "ffw_gating", "(8, 16)", "(8, 8)", data=tokens())


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("which", ["first", "second"])
def test_another_base(which, enabled, path):
    """One kernel of the model is not what the adapter was trained on."""
    saved(path)
    model = fresh()
    layer = model.get_layer(which)
    kernel = numpy(layer.kernel)
    kernel[0] += 0.1 * kernel[1]
    layer.kernel.assign(kernel)
    if enabled:
        keras_svdtune.enable_svf(model)
        perturb(model)
    refused(model, path, f"{which}'", "trained on other weights")


def test_a_base_that_was_trained_further(path):
    saved(path)
    model = fresh()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(X, Y, verbose=0)
    refused(model, path, "trained on other weights")


def test_a_new_random_base(path):
    saved(path)
    model = fresh()
    randomise(model, seed=1)
    refused(model, path, "trained on other weights")


def test_permuted_base(path):
    """The same numbers in other places, and so the same norm."""
    saved(path)
    model = fresh()
    kernel = model.get_layer("first").kernel
    kernel.assign(numpy(kernel)[::-1])
    refused(model, path, "trained on other weights")


@pytest.mark.parametrize("change", ["gone", "shape", "dtype", "nan"])
def test_an_array_that_is_wrong(change, path):
    saved(path)

    def alter(arrays, about):
        key = next(k for k in arrays if k.endswith("second/svf_delta"))
        array = arrays.pop(key)
        match change:
            case "shape":
                arrays[key] = array[:-1].copy()
            case "dtype":
                arrays[key] = array.astype("float64")
            case "nan":
                arrays[key] = np.full_like(array, np.nan)

    rewrite(path, alter)
    refused(fresh(), path, "second/svf_delta")


@pytest.mark.parametrize("enabled", [False, True])
def test_no_fingerprint(enabled, path):
    saved(path)
    rewrite(
        path,
        lambda arrays, about: [
            arrays.pop(k) for k in list(arrays) if "fingerprint" in k
        ],
    )
    model = fresh()
    if enabled:
        keras_svdtune.enable_svf(model)
    refused(model, path)


def test_a_later_wrong_layer_leaves_the_first_alone(path):
    """All is checked before anything is assigned."""
    model = saved(path)
    perturb(model, seed=4)

    def alter(arrays, about):
        key = next(k for k in arrays if k.endswith("second/svf_delta"))
        arrays[key] = np.full_like(arrays[key], np.inf)

    rewrite(path, alter)
    refused(model, path, "second/svf_delta")


# Writing.


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    model = saved(path)
    old = path.read_bytes()
    perturb(model, seed=3)
    for name in ("fsync", "replace"):
        for error in (OSError("No space left on device"), KeyboardInterrupt()):

            def fail(*args, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(format.os, name, fail)
                with pytest.raises(type(error)):
                    keras_svdtune.save_adapter(model, path)
            assert path.read_bytes() == old
            assert os.listdir(path.parent) == [path.name]
    keras_svdtune.save_adapter(model, path)
    assert path.read_bytes() != old
    assert os.listdir(path.parent) == [path.name]


def test_permissions_are_those_of_any_file(path):
    saved(path)
    other = path.with_name("other")
    other.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
        other.stat().st_mode
    )


def test_same_adapter_same_bytes(path, tmp_path):
    model = saved(path)
    other = tmp_path / "other.safetensors"
    keras_svdtune.save_adapter(model, other)
    assert other.read_bytes() == path.read_bytes()


def test_saving_changes_nothing(path):
    model = saved(path)
    before = values(model)
    keras_svdtune.save_adapter(model, path)
    assert_same(values(model), before)


def numbered(layers=3, others=0):
    """A model whose layers have no names of their own."""
    for _ in range(others):
        keras.layers.Dense(4)
    keras.utils.set_random_seed(4)
    return keras.Sequential(
        [keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(layers))]
    )


@pytest.mark.parametrize("others", [1, 2, 7])
def test_layers_with_other_numbers_are_found_by_their_kernels(others, tmp_path):
    """`dense_1` may be another layer here, or none."""
    path = tmp_path / "adapter.safetensors"
    model, x = numbered(), np.ones((2, 4), "float32")
    keras_svdtune.enable_svf(model)
    perturb(model)
    keras_svdtune.save_adapter(model, path)
    expected = eager(model, x)
    keras.backend.clear_session(free_memory=False)
    fresh = numbered(others=others)
    paths = [layer.path for layer in fresh.layers]
    assert paths != [layer.path for layer in model.layers]
    keras_svdtune.load_adapter(fresh, path)
    assert_same(eager(fresh, x), expected, "into the base")
    perturb(fresh, seed=6)
    keras_svdtune.load_adapter(fresh, path)
    assert_same(eager(fresh, x), expected, "into the adapted one")


def test_equal_kernels_with_other_numbers_are_refused(tmp_path):
    """Which is which, nobody knows."""
    path = tmp_path / "adapter.safetensors"
    model = numbered()
    keras_svdtune.enable_svf(model)
    keras_svdtune.save_adapter(model, path)
    keras.backend.clear_session(free_memory=False)
    fresh = numbered(others=5)
    fresh.layers[1].kernel.assign(numpy(fresh.layers[0].kernel))
    x = np.ones((2, 4), "float32")
    refused(fresh, path, "which this model does not have", data=x)
