"""Adapter files: what is in them, and that a file never loads into something
else in silence.

Every method's round trip is in `test_conformance.py`, the files of an earlier
release in `test_old_files.py`, damaged ones in `test_hostile_files.py`.
"""

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
    eager,
    must_stay,
    numpy,
    perturb,
    randomise,
    small_data,
    small_model,
    tiny_gemma,
    trainables,
    values,
)

import keras_svdtune
from keras_svdtune import SVF, SVFT, LoRAXS, PiSSA
from keras_svdtune.runtime import storage

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("files")

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


@pytest.mark.fast
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


@pytest.mark.parametrize(
    "name", ["albert", pytest.param("bert", marks=pytest.mark.slow)]
)
def test_round_trip(name, path):
    """Paths of blocks in a list, and of one that is called twice."""
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
    before = values(model)
    keras_svdtune.save_adapter(model, second)
    assert_same(values(model), before)
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
    for ours, theirs in (("float32", "bfloat16"), ("bfloat16", "float32")):
        model = saved(path, make=lambda dtype=ours: small_model(dtype))
        other = fresh(lambda dtype=theirs: small_model(dtype))
        keras_svdtune.load_adapter(other, path)
        assert_same(trainables(other), trainables(model))


def test_a_part_of_the_layers(path):
    model = saved(path, targets=["second"])
    again = fresh()
    keras_svdtune.load_adapter(again, path)
    assert [x.name for x in adapted(again).values()] == ["second"]
    assert_same(eager(again, X), eager(model, X))


@pytest.mark.parametrize("method", [SVF(), SVFT(), LoRAXS(rank=2)], ids=str)
def test_it_is_hardly_larger_than_what_it_holds(method, path):
    """A few hundred bytes a layer; the real models have long paths too."""
    model = saved(path, method, make=lambda: numbered(30))
    held = sum(v.nbytes for v in trainables(model).values())
    assert path.stat().st_size - held < 300 * len(adapted(model))


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


def test_onto_another_method_or_other_layers(path):
    pissa, first = PiSSA(rank=3), ["first"]
    for file, enabled, part in [
        ((pissa,), (SVFT(),), "remove_adapter()"),
        ((pissa,), (PiSSA(rank=1),), "remove_adapter()"),
        ((pissa,), (PiSSA(rank=2),), "remove_adapter()"),
        ((SVF(),), (SVF(), first), "second"),
        ((SVF(), small_model, first), (SVF(),), "remove_adapter()"),
    ]:
        saved(path, *file)
        model = fresh()
        keras_svdtune.enable_adapter(model, *enabled)
        perturb(model)
        refused(model, path, part)


# What does not fit.


def test_another_ending(tmp_path):
    model, enabled = fresh(), small_model()
    keras_svdtune.enable_svf(enabled)
    for name in ("adapter.h5", "adapter", "a.safetensors.gz"):
        refused(model, tmp_path / name, "ends in '.safetensors'")
        with pytest.raises(ValueError, match="ends in '.safetensors'"):
            keras_svdtune.save_adapter(enabled, tmp_path / name)
    assert not os.listdir(tmp_path)


def test_no_adapter_file(path):
    model = fresh()
    refused(model, path, "There is no file")
    path.mkdir()
    refused(model, path)
    path.rmdir()
    saved(path)
    whole = path.read_bytes()
    model = fresh()
    for share in (0.0, 0.02, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(model, path, "damaged")
    for data in (b"PK\x03\x04 a zip", b"\x89HDF", b"\xff" * 64, b"{}"):
        path.write_bytes(data)
        refused(model, path, "damaged")
    arrays = {"lora_A.weight": np.zeros((2, 3), "float32")}
    for metadata in (None, {}, {KEY: "no json"}, {KEY: "[]"}):
        path.write_bytes(safetensors.numpy.save(arrays, metadata))
        refused(model, path, "not an adapter that `save_adapter` wrote")


def test_metadata_that_are_not_known(path):
    model = fresh()
    for change, *parts in [
        ({"format_version": 2}, "format version 2", "Update keras_svdtune"),
        ({"method": "svff"}, "'svff'", "'svf'"),
        ({"settings": {"depth": 3}}, "settings", "depth"),
        *(
            ({key: value}, f"no valid '{key}'")
            for key in ("method", "settings", "layers")
            for value in (None, 3)
        ),
    ]:
        saved(path)
        rewrite(path, lambda arrays, about, new=change: about.update(new))
        refused(model, path, *parts)


def stack(*sizes):
    layers = [
        keras.layers.Dense(n, name=f"block_{i}") for i, n in enumerate(sizes)
    ]
    return keras.Sequential([keras.Input((6,)), *layers], name="stack")


def test_another_model(path):
    """A layer that it has not, and one of another shape."""
    saved(path, make=lambda: stack(4, 5))
    parts = "'stack/block_1'", "Sequential", "'stack/block_0'"
    refused(fresh(lambda: stack(4)), path, *parts)
    refused(fresh(lambda: stack(4, 7)), path, "block_1", "(4, 7)", "(4, 5)")


def one_row(kernel):
    kernel[0] += 0.1 * kernel[1]
    return kernel


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("change", [one_row, np.flipud])
def test_another_base(change, which, enabled, path):
    """One kernel is not what the adapter was trained on: a little off, or
    the same numbers in other places, and so of the same norm."""
    saved(path)
    model = fresh()
    kernel = model.get_layer(which).kernel
    kernel.assign(change(numpy(kernel)))
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
    randomise(model, seed=1)
    refused(model, path, "trained on other weights")


def test_an_array_that_is_wrong(path):
    model, enabled = fresh(), small_model()
    keras_svdtune.enable_svf(enabled)
    perturb(enabled, seed=4)
    key = "small/second/svf_delta"
    for change in (
        None,
        lambda array: array[:-1].copy(),
        lambda array: array.astype("float64"),
        lambda array: np.full_like(array, np.nan),
    ):

        def alter(arrays, about, change=change):
            array = arrays.pop(key)
            if change is not None:
                arrays[key] = change(array)

        saved(path)
        rewrite(path, alter)
        refused(model, path, key)
        refused(enabled, path, key)  # its first layer stays, too
    saved(path)
    rewrite(path, lambda arrays, about: arrays.pop("base_fingerprints"))
    refused(model, path)
    refused(enabled, path)


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
                patch.setattr(storage.os, name, fail)
                with pytest.raises(type(error)):
                    keras_svdtune.save_adapter(model, path)
            assert path.read_bytes() == old
            assert os.listdir(path.parent) == [path.name]
    keras_svdtune.save_adapter(model, path)
    assert path.read_bytes() != old
    assert os.listdir(path.parent) == [path.name]
    # Its permissions are those of any file.
    other = path.with_name("other")
    other.write_bytes(b"")
    modes = [stat.S_IMODE(x.stat().st_mode) for x in (path, other)]
    assert modes[0] == modes[1]


def numbered(layers=3, others=0):
    """A model whose layers have no names of their own."""
    for _ in range(others):
        keras.layers.Dense(4)
    keras.utils.set_random_seed(4)
    return keras.Sequential(
        [keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(layers))]
    )


@pytest.mark.parametrize("others", [1, 2, 7])
def test_layers_with_other_numbers_are_found_by_their_kernels(others, path):
    """`dense_1` may be another layer here, or none."""
    x = np.ones((2, 4), "float32")
    model = saved(path, make=numbered)
    expected = eager(model, x)
    other = fresh(lambda: numbered(others=others))
    paths = [layer.path for layer in other.layers]
    assert paths != [layer.path for layer in model.layers]
    keras_svdtune.load_adapter(other, path)
    assert_same(eager(other, x), expected, "into the base")
    perturb(other, seed=6)
    keras_svdtune.load_adapter(other, path)
    assert_same(eager(other, x), expected, "into the adapted one")


def test_equal_kernels_with_other_numbers_are_refused(path):
    """Which is which, nobody knows."""
    saved(path, make=numbered)
    other = fresh(lambda: numbered(others=5))
    other.layers[1].kernel.assign(numpy(other.layers[0].kernel))
    x = np.ones((2, 4), "float32")
    refused(other, path, "ambiguous", "dense_5", "dense_6", data=x)
