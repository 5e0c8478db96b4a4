"""Which mesh axes split an adapter's weights: derived, on names alone."""

import math

import keras
import keras_hub
import pytest
from helpers import default_methods, method_id, tiny_gemma
from keras.src.backend.common import global_state
from tiny_backbones import TINY
from tiny_backbones_text import DECODERS

import keras_svdtune
from keras_svdtune.adapter.sharding import adapter_layouts, block_axes
from keras_svdtune.matrix.view import GroupedView, MatrixView
from keras_svdtune.runtime.keras_internals import built_without_values

SIZES = {"batch": 2, "model": 4}
MODEL, BATCH, WHOLE = ("model",), ("batch",), ()
LORA, SVF = keras_svdtune.LoRA(rank=2), keras_svdtune.SVF()


def layouts(method, equation, shape, spec, bank=False):
    view = MatrixView(equation, shape, bank)
    return adapter_layouts(method.weights(view.shape), view, spec, SIZES)


@pytest.mark.parametrize(
    ("shape", "spec", "basis", "delta"),
    [
        # V (out, n) with W's out; V with its components where out is whole.
        ((64, 32), (WHOLE, MODEL), (MODEL, WHOLE), (WHOLE,)),
        ((64, 32), (MODEL, WHOLE), (WHOLE, MODEL), (MODEL,)),
        # U (in, n), the same from the other side.
        ((32, 64), (MODEL, WHOLE), (MODEL, WHOLE), (WHOLE,)),
        ((32, 64), (WHOLE, MODEL), (WHOLE, MODEL), (MODEL,)),
        # Both dims of W split: nothing of n² is on every device.
        ((64, 32), (BATCH, MODEL), (MODEL, BATCH), (BATCH,)),
        (
            (64, 32),
            (WHOLE, ("batch", "model")),
            (("batch", "model"), ()),
            ((),),
        ),
        ((64, 32), (WHOLE, WHOLE), (WHOLE, WHOLE), (WHOLE,)),
        # 30 is not divisible by 4: the axis is of no use there.
        ((64, 30), (MODEL, WHOLE), (WHOLE, WHOLE), (WHOLE,)),
    ],
)
def test_svf_follows_its_kernel(shape, spec, basis, delta):
    found = layouts(SVF, "ti,io->to", shape, spec)
    assert found == {"basis": basis, "delta": delta}


def test_low_rank_follows_in_and_out():
    found = layouts(LORA, "ti,io->to", (64, 32), (BATCH, MODEL))
    assert found == {"a": (BATCH, WHOLE), "b": (WHOLE, MODEL)}


@pytest.mark.parametrize(
    ("shape", "spec", "out"),
    [
        ((8, 64, 16), (MODEL, BATCH, WHOLE), MODEL),  # heads
        # Split within each head, it is in no blocks of (head, head_dim).
        ((8, 64, 16), (WHOLE, BATCH, MODEL), WHOLE),
        ((1, 64, 16), (WHOLE, BATCH, MODEL), MODEL),  # one head: it is
        ((4, 64, 16), (MODEL, WHOLE, BATCH), ("model", "batch")),
        ((8, 64, 16), (MODEL, WHOLE, BATCH), MODEL),
    ],
)
def test_heads_are_flattened_in_blocks(shape, spec, out):
    found = layouts(LORA, "btd,ndh->btnh", shape, spec)
    assert found["b"] == (WHOLE, out)


def test_a_bank_is_split_by_its_matrices():
    found = layouts(
        SVF, "eti,eio->eto", (8, 64, 32), (MODEL, BATCH, WHOLE), bank=True
    )
    assert found == {"basis": (MODEL, WHOLE, BATCH), "delta": (MODEL, BATCH)}
    view = GroupedView((3, 3, 2, 16), 4)
    spec = (WHOLE, WHOLE, WHOLE, MODEL)
    found = adapter_layouts(SVF.weights(view.shape), view, spec, SIZES)
    assert found["basis"] == (MODEL, WHOLE, WHOLE)


def test_a_packed_kernel_gives_its_axes_to_the_components():
    view = MatrixView("btd,ndh->btnh", (8, 64, 16))
    found = adapter_layouts(
        SVF.weights(view.shape), view, (MODEL, BATCH), SIZES
    )
    assert found["basis"] == (WHOLE, ("model", "batch"))


def test_blocks():
    sizes = {"a": 2, "b": 3}
    spec = (("a",), ("b",))
    assert block_axes((0, 1), (2, 9), spec, sizes) == ("a", "b")
    assert block_axes((0, 1), (4, 9), spec, sizes) == ("a",)
    assert block_axes((1, 0), (2, 9), spec, sizes) == ("b",)
    assert block_axes((0, 1), (3, 9), spec, sizes) == ()


@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_every_weight_says_what_its_dims_are(method):
    for weight in method.weights((64, 32)):
        assert len(weight.axes) in (0, len(weight.shape)), weight.name
        if len(weight.shape) > 1 and max(weight.shape) >= 32:
            assert any(weight.axes), weight.name


def mesh(*shape):
    names = [f"cpu:{i}" for i in range(shape[0] * shape[1])]
    return keras.distribution.DeviceMesh(shape, ("batch", "model"), names)


def made(name):
    """A tiny backbone without values."""
    with built_without_values():
        backbone, _ = TINY[name]()
    return backbone


@pytest.mark.parametrize("name", DECODERS)
def test_layout_map_of_every_decoder(name):
    """Its kernels are split, and no dim by what does not divide it."""
    backbone = made(name)
    for shape in ((1, 2), (2, 4), (1, 8), (8, 1), (1, 3)):
        found = keras_svdtune.svdtune_layout_map(backbone, mesh(*shape))
        sizes = dict(zip(("batch", "model"), shape, strict=True))
        split = 0
        for v in backbone.variables:
            layout = found[v.path]  # of rules that both match: an error
            if layout is None:
                continue
            assert len(layout.axes) == len(v.shape), v.path
            for n, axis in zip(v.shape, layout.axes, strict=True):
                assert axis is None or n % sizes[axis] == 0, (v.path, n, axis)
            split += "model" in layout.axes
        blocks = [v for v in backbone.variables if v.path.endswith("kernel")]
        if shape == (1, 2):  # which divides all of them
            assert split >= len(blocks) - 2 * backbone.num_layers
            assert split > len(blocks) / 2


SLOW_DECODERS = ("Gemma3nBackbone", "Qwen3_5Backbone")


@pytest.mark.parametrize(
    "name",
    [
        *("Gemma3Backbone", "Gemma4Backbone", "PaliGemmaBackbone"),
        "Qwen3_5MoeBackbone",
        *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_DECODERS),
    ],
)
def test_layout_map_of_a_decoder_with_images(name):
    backbone = made(name)
    found = keras_svdtune.svdtune_layout_map(backbone, mesh(1, 2))
    kernels = [v for v in backbone.variables if v.path.endswith("kernel")]
    assert held(backbone, found, {"batch": 1, "model": 2})[1]
    split = [v for v in kernels if "model" in axes_of(found, v)]
    assert len(split) > 0.8 * len(kernels)


WITH_A_MAP = [
    name
    for name in DECODERS
    if hasattr(getattr(keras_hub.models, name), "get_layout_map")
]


@pytest.mark.parametrize("name", WITH_A_MAP)
def test_layout_map_leaves_no_more_on_a_device_than_keras_hubs(name):
    cls, backbone = getattr(keras_hub.models, name), made(name)
    for shape in ((1, 2), (2, 2), (1, 8)):
        sizes = dict(zip(("batch", "model"), shape, strict=True))
        ours = keras_svdtune.svdtune_layout_map(backbone, mesh(*shape))
        theirs = cls.get_layout_map(mesh(*shape))
        ours_held, ours_divides = held(backbone, ours, sizes)
        theirs_held, theirs_divides = held(backbone, theirs, sizes)
        assert ours_divides and ours_held <= theirs_held
        # One or two key/value heads, eight devices: theirs cannot be used.
        assert theirs_divides == (shape != (1, 8))


def axes_of(layout_map, v):
    """The mesh axis of each dim, or None."""
    return getattr(layout_map[v.path], "axes", (None,) * len(v.shape))


def held(backbone, layout_map, sizes):
    """Numbers on each device; whether each dim divides that is split."""
    total, divides = 0.0, True
    for v in backbone.variables:
        parts = 1
        for n, axis in zip(v.shape, axes_of(layout_map, v), strict=True):
            divides &= axis is None or n % sizes[axis] == 0
            parts *= 1 if axis is None else sizes[axis]
        total += math.prod(v.shape) / parts
    return total, divides


def test_layout_map_is_keras_hubs_where_that_works():
    sizes = dict(
        num_query_heads=8, num_key_value_heads=8, hidden_dim=32, head_dim=8
    )
    with built_without_values():
        gemma = keras_hub.models.GemmaBackbone(
            vocabulary_size=64, num_layers=2, intermediate_dim=128, **sizes
        )
    ours = keras_svdtune.svdtune_layout_map(gemma, mesh(2, 4))
    theirs = gemma.get_layout_map(mesh(2, 4))
    for v in gemma.variables:
        assert axes_of(ours, v) == axes_of(theirs, v), v.path


def test_layout_map_pairs_columns_and_rows():
    """Llama's query (d, heads, ·) by heads; KerasHub splits its d."""
    llama = made("Llama3Backbone")
    found = keras_svdtune.svdtune_layout_map(llama, mesh(1, 2))
    block = "transformer_layer_0"
    axes = {
        "self_attention/query": ("batch", "model", None),
        "self_attention/key": ("batch", "model", None),
        "self_attention/attention_output": ("model", None, "batch"),
        "feedforward_gate_dense": ("batch", "model"),
        "feedforward_output_dense": ("model", "batch"),
    }
    for layer, expected in axes.items():
        assert found[f"{block}/{layer}/kernel"].axes == expected


def names_counted():
    """How many of each name Keras has given, as `dense` to `dense_4`."""
    names = global_state.get_global_attribute("object_name_uids")
    return dict(names or {})


def test_layout_map_from_a_preset(tmp_path):
    backbone = tiny_gemma()
    backbone.save_to_preset(str(tmp_path))
    first = names_counted()
    ours = keras_svdtune.svdtune_layout_map(str(tmp_path), mesh(1, 2))
    # Or the model that is built next has other names than the rules.
    assert names_counted() == first
    built = keras_svdtune.svdtune_layout_map(backbone, mesh(1, 2))
    assert {k: v.axes for k, v in ours.items()} == {
        k: v.axes for k, v in built.items()
    }
    # Nothing is left behind that would get a value later.
    with keras.StatelessScope():
        pass


def test_layout_map_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="no axes 'model' and 'data'"):
        keras_svdtune.svdtune_layout_map(
            tiny_gemma(), mesh(1, 2), data_parallel_dim_name="data"
        )
    with pytest.raises(ValueError, match="must be a keras.distribution"):
        keras_svdtune.svdtune_layout_map(tiny_gemma(), (1, 2))
    dense = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="no table of token embeddings"):
        keras_svdtune.svdtune_layout_map(dense, mesh(1, 2))
