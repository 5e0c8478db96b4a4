"""Models of transformers and KerasHub with the same weights.

Each twin is a tiny random model of transformers, saved and read by KerasHub's
own converter: so its logits are KerasHub's before anything is adapted.
"""

import contextlib
import copy
import functools
import pathlib
import tempfile

import keras_hub
import numpy as np
import pytest
from helpers import adapted, assert_close, numpy

from keras_svdtune.demo.weights import gguf_to_hf

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
WORDS = 48
IDS = np.random.default_rng(0).integers(1, WORDS, (2, 10)).astype("int32")
X = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}

SIZES = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    attn_implementation="eager",
)
GEMMA = SIZES | dict(head_dim=16)
WINDOW = dict(sliding_window=4, layer_types=["sliding_attention"] * 2)
SOFT_CAPS = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
# Name -> (config in transformers, its settings, CausalLM in KerasHub).
FAMILIES = {
    "gemma": ("GemmaConfig", GEMMA, "GemmaCausalLM"),
    "gemma2": (
        "Gemma2Config",
        GEMMA | SOFT_CAPS | dict(sliding_window=16, query_pre_attn_scalar=16),
        "GemmaCausalLM",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | WINDOW | dict(query_pre_attn_scalar=16),
        "Gemma3CausalLM",
    ),
    # Of one layer: every method is compared on it.
    "llama": (
        "LlamaConfig",
        SIZES | dict(num_hidden_layers=1),
        "Llama3CausalLM",
    ),
    "tied llama": (
        "LlamaConfig",
        SIZES | dict(tie_word_embeddings=True),
        "Llama3CausalLM",
    ),
    "mistral": ("MistralConfig", SIZES, "MistralCausalLM"),
    "qwen2": (
        "Qwen2Config",
        SIZES | dict(tie_word_embeddings=True),
        "QwenCausalLM",
    ),
    "qwen3": (
        "Qwen3Config",
        SIZES | dict(head_dim=16, tie_word_embeddings=True),
        "Qwen3CausalLM",
    ),
    "gpt2": (
        "GPT2Config",
        dict(
            vocab_size=WORDS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=16,
            attn_implementation="eager",
        ),
        "GPT2CausalLM",
    ),
}


@functools.cache
def _twins(name):
    """The same model in transformers and in KerasHub; its logits."""
    config, settings, causal_lm = FAMILIES[name]
    config = getattr(transformers, config)(**settings)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            noise = torch.randn(p.shape)
            if p.ndim == 1:
                p += 0.1 * noise
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)
            p.copy_(p.half())  # KerasHub reads Mistral in float16
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        backbone = keras_hub.models.Backbone.from_preset(
            folder, dtype="float32"
        )
    task = getattr(keras_hub.models, causal_lm)
    task = task(backbone=backbone, preprocessor=None)
    base = our_logits(task)
    assert_close(their_logits(theirs), base, TOLERANCE, "the twins")
    return theirs, task, base


@contextlib.contextmanager
def twins(name):
    """The same, to be changed."""
    theirs, task, base = _twins(name)
    weights = task.get_weights()
    try:
        yield copy.deepcopy(theirs), task, base
    finally:
        if adapted(task.backbone):
            task.remove_adapter()
        task.set_weights(weights)


def their_logits(model):
    with torch.no_grad():
        ids = torch.from_numpy(IDS.astype("int64"))
        return model(input_ids=ids).logits.numpy()


def our_logits(task):
    return numpy(task(X, training=False))


def real_twins(name):
    """Real weights in both libraries, an input, and a function for logits."""
    weights = pytest.importorskip("keras_svdtune.demo.weights.weights")
    task = weights.load_model(name)
    text = "The captain looked at the sea for a long time before he spoke."
    tokenizer = task.preprocessor.tokenizer
    ids = np.array([[tokenizer.start_token_id, *tokenizer(text)]], "int32")
    task.preprocessor = None
    with tempfile.TemporaryDirectory() as folder:
        gguf_to_hf.write_hf_folder(
            weights.cache_folder() / name / "model.gguf", pathlib.Path(folder)
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def logits(model):
        with torch.no_grad():
            found = model(input_ids=torch.from_numpy(ids.astype("int64")))
            return found.logits.numpy()

    return (
        theirs,
        task,
        {"token_ids": ids, "padding_mask": np.ones_like(ids)},
        logits,
    )
