"""A file trained in float32 loads in bfloat16, and the reverse.

The kernels here are no bfloat16 numbers, and their singular values are as near
to each other as the thousands of a real model: rounding turns the vectors.
"""

import dataclasses

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_same,
    eager,
    method_id,
    must_stay,
    numpy,
    perturb,
    trainables,
)

import keras_svdtune
from keras_svdtune import SVF, SVFT, DoRA, LoRAXS, PiSSA, compose
from keras_svdtune.files.format import read_adapter
from keras_svdtune.matrix import cache
from keras_svdtune.matrix import decompose as decomposition
from keras_svdtune.matrix.rounding import rounded
from keras_svdtune.methods.base import METHODS
from keras_svdtune.methods.folded_svf import FoldedSVF
from keras_svdtune.model.targets import adapted_targets

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("dtypes_travel")

N = 64
REBUILT = [
    SVF(),
    SVF(replace_kernel=True),
    SVFT("plain"),
    SVFT("banded", off_diagonals=2),
    SVFT("random", off_diagonals=1),
    SVFT("top_k", off_diagonals=1),
    LoRAXS(rank=8),
    LoRAXS(rank=8, n_iter=4),
    LoRAXS(rank=0.7),
]
every_method = pytest.mark.parametrize("method", REBUILT, ids=method_id)
X = np.random.default_rng(9).standard_normal((5, 3, N)).astype("float32")


def kernels():
    rng = np.random.default_rng(0)
    found = {}
    for name, (rows, columns) in {
        "tall": (N, 48),
        "square": (48, 48),
        "query": (48, 80),  # in < out
    }.items():
        u, _ = np.linalg.qr(rng.standard_normal((rows, 48)))
        v, _ = np.linalg.qr(rng.standard_normal((columns, 48)))
        w = (u * np.linspace(1.05, 0.95, 48)) @ v.T
        found[name] = w.astype("float32")
    heads = found["query"].reshape(48, 2, 40)
    return found | {"query": np.ascontiguousarray(heads.transpose(1, 0, 2))}


KERNELS = kernels()


def model(dtype="float32", kernels=KERNELS):
    """The same layer paths every time, and the same W, rounded to `dtype`."""
    keras.backend.clear_session(free_memory=False)
    made = keras.Sequential(
        [
            keras.Input((3, N)),
            keras.layers.Dense(48, name="tall", dtype=dtype),
            keras.layers.Dense(48, name="square", dtype=dtype),
            keras.layers.EinsumDense(
                "btd,ndh->btnh", (None, 2, 40), name="query", dtype=dtype
            ),
            keras.layers.Activation("linear", dtype="float32"),
        ],
        name="travels",
    )
    for name, kernel in kernels.items():
        made.get_layer(name).kernel.assign(kernel)
    return made


def enabled(method, dtype="float32", size=0.3, kernels=KERNELS):
    made = model(dtype, kernels)
    keras_svdtune.enable_adapter(made, method)
    perturb(made, size=size)
    return made


def merged(model):
    """W' of every layer in float64, as the layers compute it."""
    return {
        path: numpy(target.adapted.merged(target.matrix())).astype("float64")
        for path, target in adapted_targets(model).items()
    }


def by_the_old_rule(monkeypatch):
    """As release 0.1 did it: the basis of W as it is."""
    for known in METHODS.values():
        monkeypatch.setattr(known, "rebuilds_basis", False)


@pytest.fixture
def written(tmp_path):
    """A function that trains, saves, and returns the path and the model."""

    def write(method, dtype="float32", name="a", **options):
        made = enabled(method, dtype, **options)
        path = tmp_path / f"{name}.safetensors"
        keras_svdtune.save_adapter(made, path)
        return path, made

    return write


@pytest.fixture
def old_file(written, monkeypatch):
    """The same as an earlier release would have written it."""

    def write(*args, **options):
        with monkeypatch.context() as patch:
            by_the_old_rule(patch)
            path, made = written(*args, **options)
        layers = read_adapter(path).about["layers"].values()
        assert not any("basis" in entry for entry in layers)
        return path, made

    return write


# The rounding.


def test_rounds_to_the_nearest_and_to_even():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype="uint32")
    bits[:5000] = (bits[:5000] & 0xFFFF0000) | 0x8000  # ties
    x = bits.view("float32")
    x = x[np.abs(x) < 1e38]
    bits = x.view("uint32")
    even = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    expected = (even & np.uint32(0xFFFF0000)).view("float32")
    assert_same(rounded(x), expected)
    assert_same(rounded(expected), expected)


def test_who_rebuilds_a_basis_says_so():
    """What is neither held by a file nor drawn is computed from W again."""
    for method in map(example, METHODS.values()):
        again = [
            w
            for w in method.weights((8, 6))
            if not (w.saved or w.drawn or w.overwritten)
        ]
        needs = method.needs((8, 6)) is not None
        assert method.rebuilds_basis == (needs and bool(again)), method


def example(cls):
    ranked = any(f.name == "rank" for f in dataclasses.fields(cls))
    return cls(rank=2) if ranked else cls()


# All four directions.


@every_method
@pytest.mark.parametrize("ours", ["float32", "bfloat16"])
def test_loads_in_the_other_dtype(method, ours, written):
    path, made = written(method, ours)
    learned, w = trainables(made), merged(made)
    for theirs in ("float32", "bfloat16"):
        plain = model(theirs)
        base = eager(plain, X)
        keras_svdtune.load_adapter(plain, path)
        assert_same(trainables(plain), learned)
        # 2**-8 twice: the kernel and the basis are rounded.
        folded = isinstance(method, FoldedSVF)
        exact = ours == theirs and not (folded and ours == "bfloat16")
        assert_close(merged(plain), w, 1e-5 if exact else 1e-2)
        # And onto the method that is enabled there already.
        other = enabled(method, theirs)
        keras_svdtune.load_adapter(other, path)
        assert_same(trainables(other), learned)
        assert_close(merged(other), merged(plain), 1e-2 if folded else 0.0)
        # Before training, the base to the bit.
        if not folded:
            keras_svdtune.remove_adapter(plain)
            assert_same(eager(plain, X), base)
            keras_svdtune.enable_adapter(plain, method)
            assert_same(eager(plain, X), base)


@every_method
def test_without_the_rounding_it_does_not(method, old_file):
    """So these matrices are hard enough."""
    path, _ = old_file(method)
    plain = model("bfloat16")
    with (
        must_stay(plain, X, compiled=False),
        pytest.raises(ValueError, match="there float32, here bfloat16"),
    ):
        keras_svdtune.load_adapter(plain, path)


@every_method
def test_the_basis_is_the_same_to_the_bit(method):
    """But for the rounding of the basis itself, where the layer stores it."""
    ours, theirs = (enabled(method, d) for d in ("float32", "bfloat16"))
    for a, b in zip(
        adapted(ours).values(), adapted(theirs).values(), strict=True
    ):
        assert a.adapter.method == b.adapter.method  # ranks by energy, too
        for weight in a.adapter.method.weights(a.adapter.shape):
            x = numpy(getattr(a.adapter, weight.name))
            y = numpy(getattr(b.adapter, weight.name))
            x = rounded(x) if weight.dtype is None else x
            assert_same(x, y, weight.name)


def test_both_dtypes_share_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST", 1)
    cache.set_decomposition_cache(tmp_path / "cache")
    try:
        model_ = model()
        keras_svdtune.enable_svf(model_)
        monkeypatch.setattr(decomposition, "computed", None)
        other = model("bfloat16")
        keras_svdtune.enable_svf(other)
        # The spectrum is that of W, and the other one's W is rounded.
        keras_svdtune.spectrum(other)
        with pytest.raises(TypeError):
            keras_svdtune.spectrum(model_)
    finally:
        cache.set_decomposition_cache(False)


def test_the_estimate_counts_the_same_ranks():
    method = LoRAXS(rank=0.7)
    for dtype in ("float32", "bfloat16"):
        plain = model(dtype)
        expected = keras_svdtune.estimate(plain, method).layers
        keras_svdtune.enable_adapter(plain, method)
        found = keras_svdtune.adapter_summary(plain).layers
        assert [x.rank for x in found] == [x.rank for x in expected]


# SVFT divides by singular values.


def test_what_rounding_hides_does_not_train(written):
    """A product of thin matrices has singular values of zero; rounding makes
    others of them, and in float32 W·V / s would be anything there."""
    rng = np.random.default_rng(0)
    thin = {
        name: rng.standard_normal((*kernel.shape[:-1], 20))
        @ rng.standard_normal((20, kernel.shape[-1]))
        / 16
        for name, kernel in KERNELS.items()
        if name != "query"
    }
    kernels = KERNELS | {k: x.astype("float32") for k, x in thin.items()}
    path, made = written(SVFT(), kernels=kernels)
    w = merged(made)
    for name in thin:
        adapter = made.get_layer(name).adapter
        assert np.count_nonzero(numpy(adapter.inverse_s)) == 20
    assert np.all(numpy(made.get_layer("query").adapter.inverse_s) > 0)
    half = model("bfloat16", kernels)
    keras_svdtune.load_adapter(half, path)
    assert_close(merged(half), w, 1e-2)


# float16 is not nested in bfloat16.


def test_float16_where_it_holds_the_kernel(written):
    """bfloat16 numbers of a moderate size are float16 numbers."""
    exact = {
        k: np.where(np.abs(x) < 2.0**-14, 0.0, rounded(x)).astype("float32")
        for k, x in KERNELS.items()
    }
    path, made = written(SVFT(), kernels=exact)
    for dtype in ("float16", "bfloat16"):
        half = model(dtype, exact)
        keras_svdtune.load_adapter(half, path)
        assert_close(merged(half), merged(made), 1e-2)


def test_float16_of_another_kernel_is_rounded_twice(written, tmp_path):
    twice = {k: x.astype("float16") for k, x in KERNELS.items()}
    differ = [
        np.mean(rounded(twice[k].astype("float32")) != rounded(KERNELS[k]))
        for k in KERNELS
    ]
    assert 0.04 < np.mean(differ) < 0.08  # 1 in 16
    path, made = written(SVFT())
    half = model("float16")
    with pytest.raises(ValueError, match="there float32, here float16"):
        keras_svdtune.load_adapter(half, path)
    whole = tmp_path / "whole.safetensors"
    keras_svdtune.save_adapter(made, whole, include_basis=True)
    keras_svdtune.load_adapter(half, whole)
    assert_close(merged(half), merged(made), 1e-2)
    # Among themselves they share it.
    path, made = written(SVFT(), "float16")
    half = model("float16")
    keras_svdtune.load_adapter(half, path)
    assert_same(eager(half, X), eager(made, X))


# Files of an earlier release: by their rule, wherever they go.


@every_method
def test_an_old_file_loads_by_its_rule(method, old_file, tmp_path):
    path, made = old_file(method)
    expected, w = eager(made, X), merged(made)
    plain = model()
    keras_svdtune.load_adapter(plain, path)
    assert_close(merged(plain), w, 1e-5)
    if isinstance(getattr(method, "rank", 1), int):
        # Onto what is enabled today, and back to a file of today.
        now = enabled(method)
        today = tmp_path / "today.safetensors"
        keras_svdtune.save_adapter(now, today)
        there = merged(now)
        if isinstance(method, FoldedSVF):
            with (
                must_stay(now, X, compiled=False),
                pytest.raises(ValueError, match="earlier release.*remove_ada"),
            ):
                keras_svdtune.load_adapter(now, path)
            keras_svdtune.remove_adapter(now)
        keras_svdtune.load_adapter(now, path)
        assert_close(merged(now), w, 1e-5)
        keras_svdtune.load_adapter(now, today)
        assert_close(merged(now), there, 1e-5)
    # Saved again it is the old file, whose numbers are of the old basis.
    again = tmp_path / "again.safetensors"
    keras_svdtune.save_adapter(plain, again)
    assert (
        read_adapter(again).about["layers"]
        == (read_adapter(path).about["layers"])
    )
    other = model()
    keras_svdtune.load_adapter(other, again)
    assert_close(eager(other, X), expected, 1e-5)


def test_the_rule_is_in_the_file(written, old_file):
    path, _ = written(SVF())
    saved = read_adapter(path)
    entries = saved.about["layers"].values()
    assert all(entry["basis"] == "bfloat16" for entry in entries)
    for entry in entries:
        entry["basis"] = "float8"
    saved.save(path)
    with pytest.raises(ValueError, match="no valid entry.*float8"):
        keras_svdtune.load_adapter(model(), path)
    for method in (PiSSA(rank=2), DoRA(rank=2)):  # all is in their file
        path, _ = written(method)
        entries = read_adapter(path).about["layers"].values()
        assert not any("basis" in entry for entry in entries)


def test_a_quantized_kernel_is_taken_as_it_reads(tmp_path):
    made = model()
    made.quantize("int8")
    keras_svdtune.enable_svf(made)
    perturb(made)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(made, path)
    entries = read_adapter(path).about["layers"].values()
    assert not any("basis" in entry for entry in entries)
    again = model()
    again.quantize("int8")
    keras_svdtune.load_adapter(again, path)
    assert_same(eager(again, X), eager(made, X))


# Full saves: of what is enabled today, and of an earlier release.


@pytest.mark.parametrize("method", [SVF(), SVFT(), LoRAXS(rank=8)], ids=str)
def test_full_saves_of_both_rules(method, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        by_the_old_rule(patch)
        old = enabled(method)
    now = enabled(method)
    found = {}
    for name, made in (("old", old), ("now", now)):
        path = tmp_path / f"{name}.weights.h5"
        made.save_weights(path)
        found[path] = eager(made, X)
    other = enabled(method)
    perturb(other, seed=5)
    for path in [*found, *reversed(found)]:  # the other rule, and back
        other.load_weights(path)
        assert_close(eager(other, X), found[path], 1e-5, path.name)
        # What is saved next says by which.
        again = tmp_path / "again.safetensors"
        keras_svdtune.save_adapter(other, again)
        layers = read_adapter(again).about["layers"].values()
        assert {"basis" in x for x in layers} == {"now" in path.name}
    # By neither: the model is as it was.
    path = tmp_path / "other.weights.h5"
    if isinstance(method, SVFT):
        wrong = enabled(SVFT("random"))
    else:
        wrong = enabled(method)
        for layer in adapted(wrong).values():
            name = "basis" if method == SVF() else "v"
            variable = getattr(layer.adapter, name)
            variable.assign(numpy(variable)[:, ::-1].copy())
    wrong.save_weights(path)
    before = eager(other, X)
    with pytest.raises(ValueError, match="would not do in layer|holds no"):
        other.load_weights(path)
    assert_same(eager(other, X), before)


def test_full_saves_load_in_the_other_dtype(tmp_path):
    path = tmp_path / "a.weights.h5"
    made = enabled(SVFT())
    made.save_weights(path)
    half = enabled(SVFT(), "bfloat16")
    perturb(half, seed=5)
    half.load_weights(path)
    assert_close(merged(half), merged(made), 1e-2)


def test_declared_layers_remember_the_rule(tmp_path, monkeypatch):
    """They hold their basis, whatever the rule; a file of theirs names it."""

    def declared():
        keras.backend.clear_session(free_memory=False)
        made = keras.Sequential(
            [keras.Input((3, N)), keras_svdtune.SVFDense(48, name="tall")],
            name="travels",
        )
        return made

    with monkeypatch.context() as patch:
        by_the_old_rule(patch)
        old = declared()
    for made, rounds in ((old, False), (declared(), True)):
        perturb(made)
        made.save(tmp_path / "a.keras")
        again = keras.saving.load_model(tmp_path / "a.keras")
        assert_same(eager(again, X), eager(made, X))
        path = tmp_path / "a.safetensors"
        keras_svdtune.save_adapter(again, path)
        (entry,) = read_adapter(path).about["layers"].values()
        assert ("basis" in entry) == rounds


# Sums.


def test_files_of_both_dtypes_add_up(written):
    a, first = written(SVFT(), name="a")
    b, second = written(SVFT(), "bfloat16", name="b")
    first, second, w = merged(first), merged(second), base()
    for order in ({a: 0.5, b: 0.25}, {b: 0.25, a: 0.5}):
        both = compose(order)
        expected = {
            k: w[k] + 0.5 * (first[k] - w[k]) + 0.25 * (second[k] - w[k])
            for k in w
        }
        for dtype in ("float32", "bfloat16"):
            plain = model(dtype)
            keras_svdtune.load_adapter(plain, both)
            assert_close(merged(plain), expected, 1e-2)


def base():
    made = model()
    keras_svdtune.enable_svf(made)
    return merged(made)


@pytest.mark.parametrize("method", [SVF(), SVFT(), LoRAXS(rank=8)], ids=str)
def test_files_of_other_rules_do_not(method, written, old_file):
    old, _ = old_file(method, name="old")
    old_half, made_half = old_file(method, "bfloat16", name="old_half")
    new, _ = written(method, name="new")
    new_half, _ = written(method, "bfloat16", name="new_half")
    for a, b in ((old, new), (old, new_half), (old, old_half)):
        for order in ({a: 1.0, b: 1.0}, {b: 1.0, a: 1.0}):
            with pytest.raises(ValueError, match="earlier release.*to_lora"):
                compose(order)
    # A kernel in bfloat16 is its own rounding.
    both = compose({old_half: 1.5, new_half: -0.5})
    plain = model("bfloat16")
    keras_svdtune.load_adapter(plain, both)
    assert_close(merged(plain), merged(made_half), 1e-5)
    # And two old ones of one dtype add up as ever.
    plain = model()
    keras_svdtune.load_adapter(plain, compose({old: 0.5, str(old): 0.5}))
