"""Layers that are left out, and layers with a rank or an alpha of their own."""

import inspect
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_same,
    eager,
    must_stay,
    perturb,
    small_data,
    small_model,
    tiny_gemma,
    tokens,
    trainables,
)

import keras_svdtune
from keras_svdtune import SVF, AdaLoRA, LoRA, MiCA, PiSSA

X, _ = small_data()
PATTERNS = {
    "rank_pattern": {"query": 2, ".*decoder_block_1.*ffw_linear": 5},
    "alpha_pattern": {"query": 6.0},
}


def of_each(model):
    """(rank, alpha) by path."""
    return {
        path: (x.adapter.method.rank, x.adapter.method.alpha)
        for path, x in adapted(model).items()
    }


def expected_for(paths):
    found = {}
    for path in paths:
        found[path] = (3, None)
        if path.endswith("query"):
            found[path] = (2, 6.0)
        if "decoder_block_1" in path and path.endswith("ffw_linear"):
            found[path] = (5, None)
    return found


@pytest.mark.parametrize("cls", [LoRA, MiCA, PiSSA])
def test_patterns(cls, tmp_path):
    gemma = tiny_gemma()
    base = eager(gemma, tokens())
    cost = keras_svdtune.estimate(gemma, cls(rank=3), **PATTERNS)
    if cls.has_enable:
        getattr(gemma, f"enable_{cls.name}")(3, **PATTERNS)
    else:
        gemma.enable_adapter(cls(rank=3), **PATTERNS)
    found = of_each(gemma)
    assert found == expected_for(found)
    assert {rank for rank, _ in found.values()} == {2, 3, 5}
    assert keras_svdtune.adapter_summary(gemma).layers == cost.layers
    shapes = {v.path: v.shape for v in gemma.trainable_variables}
    assert sum(int(np.prod(x)) for x in shapes.values()) == cost.trainable
    assert_same(eager(gemma, tokens()), base)
    perturb(gemma)
    path = tmp_path / "a.safetensors"
    gemma.save_adapter(path)
    y = eager(gemma, tokens())
    keras.backend.clear_session(free_memory=False)
    other = tiny_gemma()
    other.load_adapter(path)
    assert of_each(other) == found
    assert_same(eager(other, tokens()), y)
    other.merge_adapter()
    assert_close(eager(other, tokens()), y, 1e-5)


def test_a_task_trains_them():
    task = keras_hub.models.GemmaCausalLM(tiny_gemma(), None)
    task.enable_adapter(LoRA(3), exclude=["key"], **PATTERNS)
    assert not any("key" in path for path in adapted(task))
    found = of_each(task)
    assert found == expected_for(found)
    task.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    before = trainables(task)
    y = np.ones((2, 6), "int32")
    task.fit(tokens(), y, epochs=2, verbose=0)
    assert all(
        not np.array_equal(x, before[path])
        for path, x in trainables(task).items()
    )


def test_a_second_adapter_has_the_same():
    model = small_model()
    patterns = {"rank_pattern": {"first": 3}}
    keras_svdtune.enable_adapter(model, MiCA(2), name="a", **patterns)
    keras_svdtune.enable_adapter(model, MiCA(2), name="b", **patterns)
    keras_svdtune.enable_adapter(model, MiCA(2), name="c")  # as they are
    with pytest.raises(ValueError, match="same settings in each layer"):
        keras_svdtune.enable_adapter(
            model, MiCA(2), name="d", rank_pattern={"first": 1}
        )
    perturb(model)
    keras_svdtune.set_adapter(model, {"a": 0.5, "c": 0.5})
    assert [x.adapter.method.rank for x in adapted(model).values()] == [3, 2]


def test_a_rank_of_none_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="Received: rank=None"):
        keras_svdtune.enable_svf(model, rank=2, rank_pattern={"first": None})
    assert not adapted(model)


@pytest.mark.parametrize(
    "targets, exclude, left",
    [
        (None, ["first"], ["second"]),
        (None, [".*second"], ["first"]),
        (["first", "second"], ["second"], ["first"]),
        (None, (), ["first", "second"]),
    ],
)
def test_exclude(targets, exclude, left):
    model = small_model()
    keras_svdtune.enable_svf(model, targets, exclude=exclude)
    assert [x.name for x in adapted(model).values()] == left
    keras_svdtune.remove_adapter(model)
    cost = keras_svdtune.estimate(model, SVF(), targets, exclude=exclude)
    assert [x.path.rpartition("/")[2] for x in cost.layers] == left


def test_what_is_no_matrix_is_left_out_without_a_word():
    x = keras.Input((6, 6, 2))
    y = keras.layers.Conv2D(4, 2, name="plain")(x)
    y = keras.layers.Conv2D(4, 2, groups=4, name="depth")(y)
    model = keras.Model(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        keras_svdtune.enable_svf(model, exclude=["depth"])
    assert [x.name for x in adapted(model).values()] == ["plain"]


@pytest.mark.parametrize(
    "method, options, message",
    [
        (SVF(), {"exclude": ["firs"]}, "matches no layer.*'first'"),
        (SVF(), {"exclude": "first"}, "`exclude` must be a list"),
        (SVF(), {"exclude": [".*"]}, "nothing that is adapted"),
        (LoRA(2), {"rank_pattern": {"frist": 2}}, "matches no layer.*'first'"),
        (LoRA(2), {"rank_pattern": {"first": 0}}, "`rank` must be"),
        (LoRA(2), {"rank_pattern": ["first"]}, "must be a dict"),
        (LoRA(2), {"alpha_pattern": {"first": -1.0}}, "`alpha` must be"),
        (
            LoRA(2),
            {"rank_pattern": {"first": 3, ".*": 2}},
            "gives layer '.*first' two numbers, 3 and 2",
        ),
        (SVF(), {"rank_pattern": {"first": 2}}, "no rank of each layer"),
        (SVF(), {"alpha_pattern": {"first": 2}}, "no alpha of each layer"),
        (AdaLoRA(2), {"rank_pattern": {"first": 2}}, "no rank of each layer"),
    ],
)
def test_clear_errors(method, options, message):
    model = small_model()
    with must_stay(model, X), pytest.raises(ValueError, match=message):
        keras_svdtune.enable_adapter(model, method, **options)


def test_all_that_was_named_is_left_out():
    model = small_model()
    with pytest.raises(ValueError, match="leaves out all"):
        keras_svdtune.enable_svf(model, ["first"], exclude=["first"])


def test_svf_of_some_ranks():
    model = small_model()
    keras_svdtune.enable_svf(model, rank=2, rank_pattern={"first": 3})
    found = [x.adapter.method.rank for x in adapted(model).values()]
    assert found == [3, 2]


def test_no_option_without_a_use():
    def options(name):
        function = getattr(keras_svdtune, f"enable_{name}")
        found = inspect.signature(function).parameters
        return {x for x in found if x.endswith("_pattern")}

    assert options("pissa") == {"rank_pattern", "alpha_pattern"}
    assert options("psoft") == options("svf") == {"rank_pattern"}
    assert options("adalora") == {"alpha_pattern"}
    assert options("svft") == set()
