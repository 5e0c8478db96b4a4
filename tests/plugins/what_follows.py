"""What follows from the one file `olora.py`. `test_plugin.py` runs this.

It needs a process of its own, in which `plugins.olora` is imported: pytest does
that with `-p plugins.olora`, and does not find this file by its name.
"""

import inspect
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    assert_same,
    eager,
    numpy,
    perturb,
    predict,
    small_data,
    small_model,
    tiny_gemma,
    tokens,
)
from plugins.olora import OLoRA

import keras_svdtune

REPOSITORY = Path(__file__).parents[2]
OURS = [x for x in keras_svdtune.__all__ if "olora" in x.lower()]


def test_names_of_the_package():
    assert keras_svdtune.METHODS["olora"] is OLoRA is keras_svdtune.OLoRA
    # The same names that a method of the package has.
    layers = [x for x in keras_svdtune.__all__ if x.startswith("DoRA")]
    layers = [x.replace("DoRA", "OLoRA") for x in layers]
    assert sorted(OURS) == sorted(["enable_olora", *layers])
    assert set(OURS) <= set(dir(keras_svdtune))
    enable = inspect.signature(keras_svdtune.enable_olora)
    assert list(enable.parameters) == [
        "model",
        "rank",
        "alpha",
        "target_layer_names",
        "name",
        "exclude",
        "rank_pattern",
        "alpha_pattern",
        "train_bias",
    ]


@pytest.mark.parametrize("as_task", [False, True])
def test_methods_of_backbone_and_task(as_task):
    model = tiny_gemma()
    if as_task:
        model = keras_hub.models.GemmaCausalLM(model, preprocessor=None)
    before = eager(model, tokens())
    model.enable_olora(rank=2)
    assert_same(eager(model, tokens()), before)
    assert model.adapter_summary().method == OLoRA(rank=2)
    model.remove_adapter()
    assert_same(eager(model, tokens()), before)


@pytest.mark.parametrize("name", [x for x in OURS if x.endswith("Dense")])
def test_layers_are_serialisable(name, tmp_path):
    layer_class = getattr(keras_svdtune, name)
    arguments = {
        "OLoRADense": (4,),
        "OLoRAEinsumDense": ("abc,cd->abd", (None, 4)),
    }[name]
    layer = layer_class(*arguments, rank=2, alpha=6.0)
    model = keras.Sequential([keras.Input((3, 6)), layer])
    perturb(model)
    x = np.random.default_rng(0).standard_normal((2, 3, 6)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is layer_class
    assert loaded.layers[-1].method == OLoRA(rank=2, alpha=6.0)
    assert_same(predict(loaded, x), predict(model, x))

    plain = layer_class.plain_layer(*arguments)
    expected = plain(x)
    assert_same(layer_class.from_layer(plain, rank=2)(x), expected)


def test_formula_against_numpy():
    """The QR factors by Cholesky: WᵀW = RᵀR."""
    model, (x, _) = small_model(), small_data()
    before = predict(model, x)
    keras_svdtune.enable_olora(model, rank=2, alpha=6.0)
    assert_same(predict(model, x), before)
    perturb(model)
    for name, shape in (("first", (6, 4)), ("second", (4, 5))):
        layer = model.get_layer(name)
        w = numpy(layer._kernel).astype("float64")
        assert w.shape == shape
        square = w[:, : min(shape)]
        r = np.linalg.cholesky(square.T @ square).T
        a0 = (square @ np.linalg.inv(r))[:, :2]
        b0 = a0.T @ w
        a = a0 + numpy(layer.adapter.delta_a)
        b = b0 + numpy(layer.adapter.delta_b)
        expected = w + 3.0 * (a @ b - a0 @ b0)
        assert np.abs(expected - w).max() > 0.1
        close = {"rtol": 0, "atol": 1e-5}
        np.testing.assert_allclose(numpy(layer.adapter.a0), a0, **close)
        np.testing.assert_allclose(numpy(layer.adapter.b0), b0, **close)
        merged = numpy(layer.merged_kernel())
        np.testing.assert_allclose(merged, expected, **close)


def test_estimate():
    cost = keras_svdtune.estimate(small_model(), OLoRA(rank=2))
    assert cost.trainable == 2 * (6 + 4) + 2 * (4 + 5)


def test_a_file(tmp_path, monkeypatch):
    model, (x, _) = small_model(), small_data()
    keras_svdtune.enable_olora(model, rank=2)
    perturb(model)
    file = tmp_path / "adapter.safetensors"
    keras_svdtune.save_adapter(model, file)
    loaded = small_model()
    keras_svdtune.load_adapter(loaded, file)
    assert loaded.get_layer("first").adapter.method == OLoRA(rank=2)
    assert_same(predict(loaded, x), predict(model, x))
    # Where the plugin is not imported, the file says what is missing.
    monkeypatch.delitem(keras_svdtune.METHODS, "olora")
    with pytest.raises(ValueError, match="olora"):
        keras_svdtune.load_adapter(small_model(), file)


def test_page_of_the_documentation(monkeypatch):
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(REPOSITORY / ".docs")
    import hooks

    pages = hooks.pages()
    page = pages["methods/olora.md"]
    for part in ("# OLoRA", "<math", "![What OLoRA trains](olora.svg)"):
        assert part in page
    assert "<svg" in pages["methods/olora.svg"]
    assert "[OLoRA](olora.md)" in pages["methods/index.md"]
    entries = {f"::: keras_svdtune.{x}" for x in OURS if x != "OLoRA"}
    assert entries | {"::: plugins.olora.OLoRA"} <= set(page.splitlines())
    monkeypatch.setattr(OLoRA, "picture", ())
    with pytest.raises(hooks.PluginError, match="OLoRA needs .* `picture`"):
        hooks.pages()


def test_choices_of_the_demo():
    from keras_svdtune.demo import __main__, train

    options = __main__.parser().parse_args(["--method", "olora"])
    assert train.make_method(options.method) == OLoRA(rank=8)


def test_candidates_of_the_benchmarks(monkeypatch):
    pytest.importorskip("filelock")
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "benchmarks")
    import common

    methods, left_out = common.methods_for(None, 8)
    assert methods["olora"] == OLoRA(rank=8)
    assert not left_out
