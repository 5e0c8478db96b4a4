"""Files that release 0.1 wrote load, and compute what they did there.

`fixtures/release_0_1/make.py` made them, and says how.
"""

import importlib.util
import pathlib
import shutil

import keras
import numpy as np
import pytest
from helpers import adapted, assert_close, assert_same, numpy

import keras_svdtune
from keras_svdtune import SVF
from keras_svdtune.files.format import read_adapter
from keras_svdtune.matrix import cache, decompose
from keras_svdtune.matrix.factors import Needs

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("old_files")

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "release_0_1"
_spec = importlib.util.spec_from_file_location(
    "release_0_1", FOLDER / "make.py"
)
release = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(release)

OUTPUTS = np.load(FOLDER / "outputs.npz")
# Another backend or machine sums up in another order.
TOLERANCE = 1e-5


def path_of(name):
    return FOLDER / f"{name}.safetensors"


def same_contents(path, name):
    """Whether `path` holds what the old file does."""
    ours, theirs = read_adapter(path), read_adapter(path_of(name))
    about = [dict(x.about) for x in (ours, theirs)]
    # Moving statistics are among what trained besides the adapter now.
    assert sorted(about[0].pop("beside", {})) == about[1].pop("statistics")
    about[0].pop("saved_from", None)
    for x in about:
        del x["versions"]  # of Keras, where it was written
    assert about[0] == about[1]
    assert_close(ours.arrays, theirs.arrays, TOLERANCE, name)
    for x in (ours, theirs):
        del x.arrays["effects"]  # which are computed
    assert_same(ours.arrays, theirs.arrays, name)


@pytest.mark.parametrize("name", release.METHODS)
def test_adapter_of_every_method(name, tmp_path):
    model = release.plain()
    keras_svdtune.load_adapter(model, path_of(name))
    assert_close(release.outputs(model), OUTPUTS[name], TOLERANCE, name)
    # How SVF holds its base is no setting, and not in the file.
    method = SVF() if "replace_kernel" in name else release.METHODS[name]
    found = keras_svdtune.adapter_summary(model).method
    assert found == method and type(found) is type(method)
    # What is written today is the same file.
    again = tmp_path / "again.safetensors"
    keras_svdtune.save_adapter(model, again)
    same_contents(again, name)


def test_paths_of_every_kind_of_kernel():
    model = release.many_kinds()
    base = release.outputs(model)
    keras_svdtune.load_adapter(model, path_of("many_kinds"))
    assert_close(release.outputs(model), OUTPUTS["many_kinds"], TOLERANCE)
    keras_svdtune.remove_adapter(model)
    assert_same(release.outputs(model), base)


def test_sum_of_old_files():
    model = release.plain()
    parts = {path_of("lora"): 1.0, path_of("pissa"): 0.0}
    keras_svdtune.load_adapter(model, keras_svdtune.compose(parts))
    assert_close(release.outputs(model), OUTPUTS["lora"], TOLERANCE)


@pytest.mark.fast
def test_moving_statistics(tmp_path):
    """They were live under an adapter of release 0.1; the file holds them."""
    model = release.normalised()
    norm, base = model.get_layer("norm"), release.outputs(model)
    of_base = numpy(norm.moving_mean), numpy(norm.moving_variance)

    def statistics():
        return numpy(norm.moving_mean), numpy(norm.moving_variance)

    keras_svdtune.load_adapter(model, path_of("statistics"))
    learned, moved = release.outputs(model), statistics()
    assert_close(learned, OUTPUTS["statistics"], TOLERANCE)
    arrays = read_adapter(path_of("statistics")).arrays
    assert_same(moved[0], arrays["normalised/norm/moving_mean"])
    assert_same(moved[1], arrays["normalised/norm/moving_variance"])
    assert np.abs(moved[0] - of_base[0]).max() > 0.1

    with keras_svdtune.adapter_disabled(model):
        assert_same(release.outputs(model), base)
        assert_same(statistics(), of_base)
    assert_same(release.outputs(model), learned)

    # Training goes on with them, and leaves them as they are.
    again = tmp_path / "again.safetensors"
    keras_svdtune.save_adapter(model, again)
    same_contents(again, "statistics")
    x = release.data(model)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.train_on_batch(x, x[:, :3])
    assert_same(statistics(), moved)
    assert np.any(release.outputs(model) != learned)

    # Onto an adapted model, and back to one without statistics.
    keras_svdtune.load_adapter(model, again)
    assert_same(release.outputs(model), learned)
    keras_svdtune.remove_adapter(model)
    assert_same(release.outputs(model), base)
    assert_same(statistics(), of_base)


def test_merged_with_its_moving_statistics():
    model = release.normalised()
    keras_svdtune.load_adapter(model, path_of("statistics"))
    keras_svdtune.merge_adapter(model)
    assert_close(release.outputs(model), OUTPUTS["statistics"], TOLERANCE)


@pytest.mark.parametrize("name", release.FULL_SAVES)
def test_weights_of_an_adapted_model(name):
    """In the same model adapted, and merged in a plain one."""
    file = FOLDER / f"{name}.weights.h5"
    model = release.plain()
    base = release.outputs(model)
    keras_svdtune.enable_adapter(model, release.METHODS[name])
    model.load_weights(file)
    assert_close(release.outputs(model), OUTPUTS[name], TOLERANCE)
    # And so is the adapter file, onto the method that is enabled already.
    release.train(model)
    keras_svdtune.load_adapter(model, path_of(name))
    assert_close(release.outputs(model), OUTPUTS[name], TOLERANCE)
    keras_svdtune.remove_adapter(model)
    assert_same(release.outputs(model), base)
    model.load_weights(file)
    assert_close(release.outputs(model), OUTPUTS[name], TOLERANCE)


def test_an_adapted_model():
    model = keras.saving.load_model(FOLDER / "svf.keras")
    assert not adapted(model)
    assert_close(release.outputs(model), OUTPUTS["svf"], TOLERANCE)


def test_a_model_of_declared_layers():
    model = keras.saving.load_model(FOLDER / "declared.keras")
    assert [type(x) for x in model.layers] == [
        keras_svdtune.SVFDense,
        keras_svdtune.LoRAEinsumDense,
    ]
    assert_close(release.outputs(model), OUTPUTS["declared"], TOLERANCE)
    assert len(model.trainable_weights) == 3


def arrays_of(factors):
    return {k: x for k, x in vars(factors).items() if isinstance(x, np.ndarray)}


@pytest.mark.fast
def test_kept_decompositions(tmp_path, monkeypatch):
    """Their keys are those of today but for the version of the algorithms,
    which may be another on purpose: so nothing is computed again."""
    monkeypatch.setattr(decompose, "_VERSION", 2)
    kept = tmp_path / "decompositions"
    shutil.copytree(FOLDER / "decompositions", kept)
    monkeypatch.setattr(cache, "SMALLEST", 1)
    cache.set_decomposition_cache(kept)
    try:
        for w, settings in release.decompositions():
            needs = Needs(*settings)
            expected = arrays_of(decompose.computed(w, needs))
            with monkeypatch.context() as patch:
                patch.setattr(decompose, "computed", None)
                found = arrays_of(decompose.decompose(w, needs))
            assert_close(found, expected, 1e-5, str(needs))
    finally:
        cache.set_decomposition_cache(False)
