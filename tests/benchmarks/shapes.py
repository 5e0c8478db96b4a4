"""Published configs of large models, and small ones of the same families.

With random weights, or of shapes alone, for what no weights are needed for.
"""

from typing import Any

import keras
import keras_hub

TINY = "tiny"


def _gemma(
    layers: int,
    width: int,
    heads: tuple[int, int],
    inner: int,
    **more: Any,
) -> tuple[str, dict[str, Any]]:
    return "GemmaBackbone", {
        "vocabulary_size": 256_000,
        "num_layers": layers,
        "num_query_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_dim": width,
        "intermediate_dim": inner,  # both halves
        "head_dim": 256,
        "dtype": "bfloat16",
        **more,
    }


def _llama(
    layers: int, width: int, heads: tuple[int, int], inner: int, **more: Any
) -> tuple[str, dict[str, Any]]:
    return "Llama3Backbone", {
        "vocabulary_size": 128_256,
        "num_layers": layers,
        "num_query_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_dim": width,
        "intermediate_dim": inner,
        "dtype": "bfloat16",
        **more,
    }


_POST_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma_2b": _gemma(18, 2048, (8, 1), 32_768),
    "gemma_7b": _gemma(28, 3072, (16, 16), 49_152),
    "gemma2_9b": _gemma(
        *(42, 3584, (16, 8), 28_672),
        query_head_dim_normalize=True,
        final_logit_soft_cap=30.0,
        attention_logit_soft_cap=50.0,
        use_sliding_window_attention=True,
        **_POST_NORMS,
    ),
    "gemma3_27b_text": (
        "Gemma3Backbone",
        {
            "vocabulary_size": 262_144,
            "image_size": 16,  # of no image: text only
            "num_layers": 62,
            "num_query_heads": 32,
            "num_key_value_heads": 16,
            "hidden_dim": 5376,
            "intermediate_dim": 21_504,
            "head_dim": 128,
            "dtype": "bfloat16",
            **_POST_NORMS,
        },
    ),
    "llama3_8b": _llama(32, 4096, (32, 8), 14_336),
    "llama3_70b": _llama(80, 8192, (64, 8), 28_672),
    "llama3_small": _llama(
        *(4, 512, (16, 8), 1536), vocabulary_size=4096, dtype="float32"
    ),
    TINY: _gemma(
        *(2, 64, (8, 8), 256),
        vocabulary_size=64,
        head_dim=8,
        dtype="float32",
    ),
}


def build(name: str, **changed: Any) -> keras.Model:
    """The backbone of `MODELS`, with other settings where they are given."""
    class_name, settings = MODELS[name]
    return getattr(keras_hub.models, class_name)(**{**settings, **changed})


def published_parameters(name: str) -> int | None:
    """What KerasHub says of its preset, `name` or `name_en`."""
    presets = getattr(keras_hub.models, MODELS[name][0]).presets
    found = presets.get(name) or presets.get(f"{name}_en")
    return found and found["metadata"]["params"]
