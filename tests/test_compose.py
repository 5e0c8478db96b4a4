"""The sum of adapters, against ΔW added up in float64."""

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_same,
    eager,
    method_id,
    numpy,
    perturb,
    randomise,
    small_data,
    small_model,
)

import keras_svdtune
from keras_svdtune import (
    PSOFT,
    SVF,
    SVFT,
    AdaLoRA,
    DoRA,
    LoRA,
    LoRAXS,
    MiCA,
    MiLoRA,
    OPLoRA,
    PiSSA,
    compose,
)
from keras_svdtune.model.targets import adapted_targets

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("compose")

X, _ = small_data()


def saved(path, method, seed, targets=None):
    """Writes an adapter; returns ΔW by layer, in float64."""
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    keras_svdtune.enable_adapter(model, method, targets)
    perturb(model, seed=seed)
    keras_svdtune.save_adapter(model, path)
    return changes(model)


def changes(model):
    return {
        path: numpy(target.adapted.merged(target.matrix())).astype("float64")
        - numpy(target.matrix())
        for path, target in adapted_targets(model).items()
    }


def loaded(adapter):
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    keras_svdtune.load_adapter(model, adapter)
    return model


LINEAR = [
    SVF(),
    SVFT(off_diagonals=1),
    SVFT("random", off_diagonals=1),
    LoRAXS(rank=2, alpha=4.0),
    MiCA(rank=2, alpha=4.0),
]
LOW_RANK = [
    LoRA(rank=1, alpha=3.0),
    PiSSA(rank=1),
    MiLoRA(rank=1, alpha=0.5),
    AdaLoRA(rank=1),
]


@pytest.mark.parametrize("method", LINEAR + LOW_RANK, ids=method_id)
def test_the_sum_of_what_each_adds(method, tmp_path):
    a, b, c = (tmp_path / f"{x}.safetensors" for x in "abc")
    first = saved(a, method, seed=1)
    second = saved(b, method, seed=2)
    both = compose({a: 0.7, str(b): -0.3})
    model = loaded(both)
    expected = {k: 0.7 * first[k] - 0.3 * second[k] for k in first}
    assert_close(changes(model), expected, 2e-6)
    found = {x.adapter.method for x in adapted(model).values()}
    if method.linear:
        assert found == {method}
    else:
        assert {type(x) for x in found} == {LoRA}
    # It saves, loads and merges like any other.
    both.save(c)
    again = loaded(c)
    y = eager(again, X)
    assert_same(y, eager(model, X))
    keras_svdtune.save_adapter(model, b)
    assert_same(eager(loaded(b), X), y)
    keras_svdtune.merge_adapter(again)
    assert_close(eager(again, X), y, 1e-5)
    assert both.about["composition"]["parts"] == {
        "a.safetensors": 0.7,
        "b.safetensors": -0.3,
    }


@pytest.mark.parametrize("method", [SVF(), DoRA(rank=2)], ids=method_id)
def test_one_of_weight_one_is_that_one(method, tmp_path):
    """Of a method that does not add up, too."""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    saved(a, method, seed=1)
    compose({a: 1}).save(b)
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.fast
def test_low_rank_methods_mix(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first = saved(a, PiSSA(rank=1), seed=1)
    second = saved(b, LoRA(rank=1), seed=2)
    model = loaded(compose({a: 0.5, b: 2.0}))
    expected = {k: 0.5 * first[k] + 2.0 * second[k] for k in first}
    assert_close(changes(model), expected, 2e-6)
    assert [x.adapter.method.rank for x in adapted(model).values()] == [3, 3]


@pytest.mark.parametrize("method", [SVF(), LoRA(rank=1)], ids=method_id)
def test_a_layer_that_one_does_not_have(method, tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first = saved(a, method, 1, ["second"])
    second = saved(b, method, 2)
    model = loaded(compose({a: 0.5, b: 2.0}))
    expected = {k: 2.0 * v for k, v in second.items()}
    (only,) = first
    expected[only] += 0.5 * first[only]
    assert_close(changes(model), expected, 2e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_at_a_rank_it_is_the_best_and_says_how_good(rank, tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first = saved(a, LoRA(rank=1), 1)
    second = saved(b, LoRA(rank=2), 2)
    both = compose({a: 1.0, b: 1.0}, rank=rank)
    found = changes(loaded(both))
    error, size = 0.0, 0.0
    reported = both.about["composition"]["relative_error"]
    for layer, change in found.items():
        exact = first[layer] + second[layer]
        s = np.linalg.svd(exact, compute_uv=False)
        best = np.sqrt(np.sum(s[rank:] ** 2))
        off = np.linalg.norm(exact - change)
        assert off <= best * (1 + 1e-5) + 1e-6 * s[0]
        if rank < 3:
            assert abs(reported[layer] - best / np.linalg.norm(s)) < 1e-6
        error, size = error + best**2, size + np.sum(s**2)
    assert abs(reported["total"] - np.sqrt(error / size)) < 1e-6


def test_a_sum_does_not_load_into_another_base(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    saved(a, SVF(), 1)
    saved(b, SVF(), 2)
    model = small_model()
    randomise(model, seed=3)
    with pytest.raises(ValueError, match="trained on other weights"):
        keras_svdtune.load_adapter(model, compose({a: 1, b: 1}))


def test_clear_errors(tmp_path):
    a, b, c = (tmp_path / f"{x}.safetensors" for x in "abc")
    saved(a, SVF(), 1)
    for empty in ({}, [a, b], None):
        with pytest.raises(ValueError, match="dict from path to weight"):
            compose(empty)
    for weight in (float("nan"), "0.5", None):
        with pytest.raises(ValueError, match="finite number. Received"):
            compose({a: weight})
    with pytest.raises(ValueError, match="There is no file"):
        compose({a: 1, c: 1})
    with pytest.raises(ValueError, match=r"`rank` is for.*Received: rank=2"):
        compose({a: 0.5}, rank=2)
    for other in (SVFT(), LoRAXS(rank=1)):
        # The same on other layers.
        for layers in (None, ["second"]):
            saved(a, SVF(), 1, layers and ["first"])
            saved(b, other, 2, layers)
            with pytest.raises(ValueError, match="only if their settings are"):
                compose({a: 1, b: 1})
    saved(b, LoRA(rank=1), 2)
    with pytest.raises(ValueError, match=r"SVF\(\).*to_lora"):
        compose({a: 1, b: 1})
    for method in (DoRA(rank=1), PSOFT(rank=2), OPLoRA(rank=1)):
        saved(c, method, 2)
        said = f"{method.title} adds is not linear in its weights.*to_lora"
        for files in ({b: 1, c: 1}, {c: 2}):
            with pytest.raises(ValueError, match=said):
                compose(files)
    for rank in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match="1 or more. Received: rank="):
            compose({b: 1}, rank=rank)
    for weight in (True, "1", None, float("nan"), 1j):
        with pytest.raises(ValueError, match="must be a finite number"):
            compose({b: weight})
    for file in (a, b):  # SVF adds numbers up, LoRA factors
        with pytest.raises(ValueError, match="not finite in float32"):
            compose({file: 1e300})
    model = small_model()
    randomise(model, seed=3)
    keras_svdtune.enable_svf(model)
    keras_svdtune.save_adapter(model, b)
    with pytest.raises(ValueError, match="different base models: layer 'sma"):
        compose({a: 1, b: 1})


def test_the_total_error_counts_layers_that_fit_exactly(tmp_path):
    a, b = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    one = saved(a, LoRA(rank=1), 1)
    two = saved(b, LoRA(rank=1), 2, ["second"])
    both = compose({a: 1.0, b: 1.0}, rank=1)
    error = both.about["composition"]["relative_error"]
    total = {path: change + two.get(path, 0.0) for path, change in one.items()}
    size = sum(np.linalg.norm(x) ** 2 for x in total.values())
    lost = sum(
        np.sum(np.linalg.svd(x, compute_uv=False)[1:] ** 2)
        for x in total.values()
    )
    assert error["total"] == pytest.approx(np.sqrt(lost / size), rel=1e-4)


def unnamed(convolutions=3, before=0):
    """A net of unnamed layers, the same each time, whatever their numbers."""
    for _ in range(before):
        keras.layers.Conv2D(4, 3)
    layers = [
        keras.layers.Conv2D(4, 3, padding="same") for _ in range(convolutions)
    ]
    model = keras.Sequential(
        [keras.Input((4, 4, 4)), *layers, keras.layers.Dense(3)]
    )
    randomise(model)
    return model


def saved_unnamed(path, seed, kept=(0, 1, 2, 3), method=None, **numbers):
    """Writes an adapter of some of its layers; returns ΔW by index, and the
    paths."""
    model = unnamed(**numbers)
    names = [model.layers[i].name for i in kept]
    keras_svdtune.enable_adapter(model, method or SVF(), names)
    perturb(model, seed=seed)
    keras_svdtune.save_adapter(model, path)
    return changes_by_index(model), [model.layers[i].path for i in kept]


def changes_by_index(model):
    found = changes(model)
    return {
        i: found[layer.path]
        for i, layer in enumerate(model.layers)
        if layer.path in found
    }


def loaded_into_another(adapter):
    model = unnamed()
    keras_svdtune.load_adapter(model, adapter)
    return changes_by_index(model)


@pytest.mark.parametrize("method", [SVF(), LoRA(rank=1)], ids=method_id)
def test_layers_that_keras_numbered_otherwise(method, tmp_path):
    """`conv2d`, `conv2d_3` and `conv2d_6` are one layer of three models."""
    files = [tmp_path / f"{x}.safetensors" for x in "abc"]
    weights = dict(zip(files, (0.7, -0.3, 2.0), strict=True))
    found = [
        saved_unnamed(path, seed, method=method)
        for seed, path in enumerate(files)
    ]
    paths = [x for _, x in found]
    assert paths[0] != paths[1] != paths[2]
    total = compose(weights)
    assert list(total.about["layers"]) == paths[0]
    expected = {
        i: sum(
            w * each[i]
            for w, (each, _) in zip(weights.values(), found, strict=True)
        )
        for i in range(4)
    }
    assert_close(loaded_into_another(total), expected, 2e-6)


@pytest.mark.parametrize(
    "first, second", [((1,), (0, 1, 2, 3)), ((0, 1, 2), (2, 1)), ((0,), (2, 3))]
)
def test_numbered_otherwise_and_on_fewer_layers(first, second, tmp_path):
    """A number that another layer has in the first file is not taken for it."""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one, paths = saved_unnamed(a, 1, first)
    keras.backend.clear_session(free_memory=False)
    # `conv2d_1`, in both files, is the second and the first convolution.
    two, _ = saved_unnamed(b, 2, second, before=1)
    total = compose({a: 1.0, b: 0.5})
    assert list(total.about["layers"])[: len(paths)] == paths
    assert len(total.about["layers"]) == len({*first, *second})
    expected = {
        i: one.get(i, 0.0) + 0.5 * two.get(i, np.zeros(1))
        for i in {*first, *second}
    }
    assert_close(loaded_into_another(total), expected, 2e-6)


def test_a_third_file_is_compared_with_both(tmp_path):
    """Its numbers are those of the second file, whose layer the first one
    does not have; the layer that both have is numbered otherwise in each."""
    a, b, c = (tmp_path / f"{x}.safetensors" for x in "abc")
    one, _ = saved_unnamed(a, 1, (0,))
    keras.backend.clear_session(free_memory=False)
    two, _ = saved_unnamed(b, 2, (1,), before=3)
    keras.backend.clear_session(free_memory=False)
    three, _ = saved_unnamed(c, 3, (0, 1), before=3)
    expected = {0: one[0] + three[0], 1: two[1] + three[1]}
    found = loaded_into_another(compose({a: 1.0, b: 1.0, c: 1.0}))
    assert_close(found, expected, 2e-6)


def test_equal_kernels_numbered_otherwise_are_ambiguous(tmp_path):
    """Nobody knows which is which; with equal numbers all do."""
    files = [tmp_path / f"{x}.safetensors" for x in "abc"]
    for path, before in zip(files, (0, 0, 1), strict=True):
        keras.backend.clear_session(free_memory=False)
        model = unnamed(before=before)
        model.layers[1].set_weights(model.layers[0].get_weights())
        keras_svdtune.enable_svf(model)
        keras_svdtune.save_adapter(model, path)
    a, b, c = files
    assert len(compose({a: 1.0, b: 1.0}).about["layers"]) == 4
    with pytest.raises(ValueError, match="ambiguous: .*'sequential/conv2d'"):
        compose({a: 1.0, c: 1.0})
