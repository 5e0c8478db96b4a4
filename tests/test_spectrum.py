"""Singular values of a model, against NumPy's SVD in float64."""

import io
import sys

import keras
import keras_hub
import numpy as np
import pytest
import rich.console
from helpers import (
    adapted,
    default_methods,
    hosts_model,
    method_id,
    numpy,
    perturb,
    small_model,
    tiny_gemma,
    values,
)
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts

import keras_svdtune
from keras_svdtune import (
    SVF,
    DoRA,
    LayerSpectrum,
    LoRA,
    LoRAXS,
    MiCA,
    MiLoRA,
    OPLoRA,
    PiSSA,
    Spectrum,
)
from keras_svdtune.matrix import decompose
from keras_svdtune.matrix.rounding import rounded
from keras_svdtune.reports.plot_spectrum import trained_span

# By hand: what each kernel of `hosts_model` is as a matrix (in, out).
MATRICES = {
    "einsum_query": lambda k: k.transpose(1, 0, 2).reshape(8, 6),
    "einsum_output": lambda k: k.reshape(6, 8),
    "conv_tall": lambda k: k.reshape(18, 6),
    "conv_wide": lambda k: k.reshape(12, 16),
}


def exact(matrix):
    """Singular values in float64."""
    return np.linalg.svd(numpy(matrix).astype("float64"), compute_uv=False)


def layer_of(s):
    """A LayerSpectrum with these values."""
    s = np.array(s, "float64")
    return LayerSpectrum("a/query", "query", 0, (len(s), len(s)), s)


def printed(found, width=80):
    console = rich.console.Console(
        file=io.StringIO(), width=width, color_system=None
    )
    found.print(console)
    return console.file.getvalue()


def test_values_are_those_of_the_kernels():
    model = hosts_model()
    before = values(model)
    found = keras_svdtune.spectrum(model)
    assert found.model == "hosts"
    assert len(found.layers) == 9
    for layer in found.layers:
        kernel = numpy(model.get_layer(layer.kind).kernel)
        matrix = MATRICES.get(layer.kind, lambda k: k)(kernel)
        assert layer.matrix == matrix.shape
        assert layer.adapted is None and layer.drift == 0.0
        np.testing.assert_allclose(layer.s, exact(matrix), rtol=1e-6)
    for (path, old), (_, new) in zip(before, values(model), strict=True):
        assert np.array_equal(old, new), path


def test_path_kind_and_depth():
    gemma = tiny_gemma()
    found = gemma.spectrum(["query", "ffw_linear"])
    assert [(x.path, x.kind, x.depth) for x in found.layers] == [
        ("decoder_block_0/attention/query", "query", 0),
        ("decoder_block_0/ffw_linear", "ffw_linear", 0),
        ("decoder_block_1/attention/query", "query", 1),
        ("decoder_block_1/ffw_linear", "ffw_linear", 1),
    ]
    assert {k: len(x) for k, x in found.by_kind().items()} == {
        "query": 2,
        "ffw_linear": 2,
    }
    assert len(gemma.spectrum().layers) == 14
    embedding = gemma.spectrum(["token_embedding"]).layers[0]
    assert embedding.matrix == (32, 8)
    np.testing.assert_allclose(
        embedding.s, exact(gemma.token_embedding.embeddings), rtol=1e-6
    )
    with pytest.raises(ValueError, match="matches no layer"):
        gemma.spectrum(["qeury"])
    # A task means its backbone.
    task = keras_hub.models.GemmaCausalLM(gemma, preprocessor=None)
    (ours,) = task.spectrum(["token_embedding"]).layers
    assert ours.path == embedding.path
    assert np.array_equal(ours.s, embedding.s)


def test_measures_by_their_definitions():
    flat = layer_of(np.full(5, 0.7))
    assert flat.effective_rank == pytest.approx(5.0)
    assert flat.condition == pytest.approx(1.0)
    assert flat.energy(2) == pytest.approx(0.4)
    one = layer_of([3.0, 0.0, 0.0])
    assert one.effective_rank == pytest.approx(1.0)
    assert one.condition == np.inf
    assert one.energy(1) == one.energy(7) == 1.0
    s = np.array([4.0, 1.1, 0.5, 0.1, 0.05])
    layer = layer_of(s)
    p = s / s.sum()
    assert layer.effective_rank == pytest.approx(np.exp(-np.sum(p * np.log(p))))
    assert layer.share_within(0.1, 1.1) == pytest.approx(3 / 5)
    assert layer.share_within(0.0, 0.07) == pytest.approx(1 / 5)
    assert layer.condition == pytest.approx(80.0)
    assert Spectrum("m", (layer, flat)).share_within() == pytest.approx(8 / 10)
    zero = layer_of([0.0, 0.0])
    assert (zero.effective_rank, zero.energy(1)) == (0.0, 0.0)


@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_of_an_adapted_model(method):
    model = hosts_model(names=("dense_tall", "dense_wide", "conv_tall"))
    base = keras_svdtune.spectrum(model)
    keras_svdtune.enable_adapter(model, method)
    for new, old in zip(
        keras_svdtune.spectrum(model).layers, base.layers, strict=True
    ):
        assert (new.path, new.kind, new.depth) == (old.path, old.kind, 0)
        assert np.array_equal(new.s, old.s)
        assert np.array_equal(new.adapted, old.s) and new.drift == 0.0
    perturb(model)
    found = keras_svdtune.spectrum(model)
    keras_svdtune.merge_adapter(model)
    merged = keras_svdtune.spectrum(model)
    for new, old, then in zip(
        found.layers, base.layers, merged.layers, strict=True
    ):
        assert np.array_equal(new.s, old.s)
        np.testing.assert_allclose(new.adapted, then.s, rtol=1e-5, atol=1e-6)
        drift = np.linalg.norm(then.s - old.s) / np.linalg.norm(old.s)
        assert new.drift == pytest.approx(drift, rel=1e-4) and drift > 1e-3


@pytest.mark.parametrize(
    "method", [SVF(replace_kernel=True), PiSSA(2, quantize="int8")]
)
def test_base_of_a_replaced_kernel(method):
    model = small_model()
    before = keras_svdtune.spectrum(model)
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    found = keras_svdtune.spectrum(model)
    # W again: but for rounding, or for the quantization of what is left.
    tolerance = 1e-5 if method.quantization is None else 2e-2
    for new, old in zip(found.layers, before.layers, strict=True):
        np.testing.assert_allclose(new.s, old.s, atol=tolerance * old.s[0])
        assert new.drift > 1e-2


@pytest.mark.parametrize("enabled", [False, True])
def test_bank_of_experts(enabled):
    bank = MixtralMoeExperts(3, 6, 8, name="experts")
    x = keras.Input((6,), batch_size=5)
    model = keras.Model(x, bank(x), name="moe")
    if enabled:
        keras_svdtune.enable_adapter(model, SVF())
        perturb(model)
    found = keras_svdtune.spectrum(model)
    kernel = numpy(bank.__dict__["_expert_feedforward_gate_dense"])
    assert len(found.layers) == 9
    name = "_expert_feedforward_gate_dense".strip("_")
    for i, layer in enumerate(found.by_kind()[name]):
        assert layer.path == f"experts/{name}#{i}"
        np.testing.assert_allclose(layer.s, exact(kernel[i]), rtol=1e-6)
        assert (layer.drift > 1e-3) == enabled


def test_quantized_and_half_precision_kernels():
    model = small_model("bfloat16")
    for layer in keras_svdtune.spectrum(model).layers:
        kernel = numpy(model.get_layer(layer.kind).kernel)
        np.testing.assert_allclose(layer.s, exact(kernel), rtol=1e-6)
    model = small_model()
    before = keras_svdtune.spectrum(model)
    model.quantize("int8")
    found = keras_svdtune.spectrum(model)
    for new, old in zip(found.layers, before.layers, strict=True):
        assert not np.array_equal(new.s, old.s)
        np.testing.assert_allclose(new.s, old.s, atol=2e-2 * old.s[0])


def test_decompositions_are_shared_with_enabling(tmp_path, monkeypatch):
    """Of a kernel that bfloat16 holds, as those of Gemma's presets are."""
    model = keras.Sequential([keras.Input((120,)), keras.layers.Dense(110)])
    kernel = model.layers[0].kernel
    kernel.assign(rounded(numpy(kernel)))
    keras_svdtune.set_decomposition_cache(tmp_path)
    try:
        found = keras_svdtune.spectrum(model).layers[0]

        def computed(*args):
            raise AssertionError("decomposed again")

        monkeypatch.setattr(decompose, "computed", computed)
        keras_svdtune.enable_svf(model)
        assert np.array_equal(
            keras_svdtune.spectrum(model).layers[0].s, found.s
        )
    finally:
        keras_svdtune.set_decomposition_cache(False)


@pytest.mark.parametrize("keep", [True, False])
def test_small_values_survive_where_a_device_decomposes(monkeypatch, keep):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(2))
    s = np.geomspace(1.0, 1e-5, 12)
    w = (u * s @ v.T).astype("float32")
    monkeypatch.setattr(decompose, "on_host", lambda: False)
    found = decompose.singular_values(w, keep=keep)
    np.testing.assert_allclose(found, exact(w), rtol=1e-5)


def test_numbers_out_of_range():
    layer = LayerSpectrum("q", "query", 0, (2, 2), np.array([2.0, 1.0]))
    found = Spectrum("model", (layer,))
    for rank in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="`rank` must be an integer, 1"):
            layer.energy(rank)
    for low, high in ((1.1, 0.1), (float("nan"), 1.0), (0.0, float("nan"))):
        for x in (layer, found):
            with pytest.raises(ValueError, match="`low` must be a number"):
                x.share_within(low, high)
    assert layer.share_within(1.5, float("inf")) == 0.5


def test_kernels_that_are_not_finite():
    model = small_model()
    kernel = numpy(model.layers[0].kernel)
    kernel[1, 1] = np.nan
    model.layers[0].kernel.assign(kernel)
    with pytest.raises(ValueError, match="small/first' holds NaN"):
        keras_svdtune.spectrum(model)
    model = small_model()
    keras_svdtune.enable_svf(model)
    delta = next(iter(adapted(model).values())).adapter.delta
    delta.assign(numpy(delta) * np.nan)
    with pytest.raises(ValueError, match="small/first' holds NaN"):
        keras_svdtune.spectrum(model)


def test_table():
    s = np.array([4.0, 1.1, 0.5, 0.1, 0.05])
    layers = [
        LayerSpectrum("0/query", "query", 0, (5, 8), s),
        LayerSpectrum("1/query", "query", 1, (5, 8), s * 2),
        LayerSpectrum("0/key", "key", 0, (5, 5), s[:5]),
    ]
    shown = printed(Spectrum("tiny", tuple(layers)))
    assert "Singular values of tiny" in shown
    rows = {
        cells[0]: cells
        for line in shown.splitlines()
        if (cells := [x.strip() for x in line.strip("│").split("│")])
    }
    assert rows["query"] == [
        *("query", "5 x 8", "2", "8", "0.05", "60%", "100%", "2", "80")
    ]
    assert rows["total"][1:6] == ["15 s", "3", "8", "0.05", "60.0%"]
    assert max(map(len, shown.splitlines())) <= 80


def test_plot():
    gemma = tiny_gemma()
    found = gemma.spectrum()
    methods = [PiSSA(2), MiLoRA(1), SVF()]
    figure = keras_svdtune.plot_spectrum(found, methods)
    axes = [x for x in figure.axes if x.get_title()]
    assert [x.get_title() for x in axes][:2] == ["query\n8 x 8", "key\n8 x 4"]
    assert len(axes) == 7
    for axis, layers in zip(axes, found.by_kind().values(), strict=True):
        assert axis.get_yscale() == "log"
        lines = axis.get_lines()
        for line, layer in zip(lines, layers, strict=False):
            assert np.array_equal(line.get_ydata(), layer.s)
            assert np.array_equal(
                line.get_xdata(), np.arange(1, len(layer.s) + 1)
            )
        bars = [tuple(x.get_xdata()) for x in lines[len(layers) :]]
        n = len(layers[0].s)
        assert bars == [(0.5, 2.5), (n - 0.5, n + 0.5), (0.5, n + 0.5)]
        assert lines[0].get_color() != lines[1].get_color()
    (legend,) = figure.legends
    assert [x.get_text() for x in legend.get_texts()] == [
        *("PiSSA, rank 2", "MiLoRA, rank 1", "SVF")
    ]
    assert figure.get_supylabel() == "singular value"
    # The bottom axis of every column says what is on it.
    assert [bool(x.get_xlabel()) for x in axes] == [False] * 3 + [True] * 4


def test_a_model_of_which_a_part_has_an_adapter():
    gemma = tiny_gemma()
    gemma.enable_svf(["query"])
    perturb(gemma)
    found = gemma.spectrum()
    assert len(found.layers) == 14
    for layer in found.layers:
        assert (layer.adapted is not None) == (layer.kind == "query")
    assert "drift" in printed(found)
    figure = gemma.plot_spectrum(target_layer_names=["query"])
    lines = figure.axes[0].get_lines()
    assert [x.get_linestyle() for x in lines] == ["-", "--", "-", "--"]


def test_plot_with_many_kinds_has_one_panel(tmp_path):
    layers = [
        LayerSpectrum(f"dense_{i}", f"dense_{i}", 0, (4 + i, 4), np.ones(4) + i)
        for i in range(13)
    ]
    figure = keras_svdtune.plot_spectrum(Spectrum("m", tuple(layers)))
    titles = [x.get_title() for x in figure.axes]
    assert titles[0] == "all matrices"
    assert len(figure.axes[0].get_lines()) == 13
    figure.savefig(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 0


@pytest.mark.parametrize(
    "method, span",
    [
        (SVF(), (1, 6)),
        (PiSSA(2), (1, 2)),
        (LoRAXS(4), (1, 4)),
        (OPLoRA(2, keep=2), (3, 6)),
        (OPLoRA(2), (4, 6)),  # at most half of them stay
        (MiCA(2), (5, 6)),
        (MiLoRA(2), (5, 6)),
        (PiSSA(0.8), (1, 1)),  # 64 of 79.5
        (MiLoRA(0.1), (2, 6)),  # 15.5 of 79.5; without the 9 too little
    ],
    ids=lambda x: method_id(x) if not isinstance(x, tuple) else "",
)
def test_trained_span(method, span):
    layer = layer_of(np.sqrt([64.0, 9.0, 3.0, 2.0, 1.0, 0.5]))
    assert trained_span(layer, method) == span


@pytest.mark.parametrize("method", [LoRA(2), DoRA(2)], ids=method_id)
def test_plot_refuses_methods_without_components(method):
    with pytest.raises(ValueError, match="trains no singular components"):
        keras_svdtune.plot_spectrum(small_model(), [method])


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ImportError, match=r"keras_svdtune\[plot\]"):
        keras_svdtune.plot_spectrum(small_model())
