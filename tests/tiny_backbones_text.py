"""The tiny backbones that read only tokens."""

from keras_hub import models
from tiny_backbones_inputs import (
    ENCODER,
    GEMMA,
    GROUPED,
    LAYERS,
    LENGTH,
    T5_GEMMA,
    VOCABULARY,
    ids,
    pairs,
    segmented,
    tokens,
)

POSITIONS = {"max_sequence_length": LENGTH}
EXPERTS = {"num_experts": 4, "top_k": 2}
# Layers with experts, but for the first, which has a plain MLP.
QWEN_EXPERTS = {
    **GROUPED,
    **EXPERTS,
    "moe_intermediate_dim": 8,
    "mlp_only_layers": [0],
}
SMOLLM3 = {
    **LAYERS,
    "vocabulary_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, False],
    "layer_types": ["attention", "attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}


def unpadded():
    """Tokens alone: these models make their mask themselves, or have none."""
    return {"token_ids": ids()}


def unmasked():
    """Tokens and segments without a mask."""
    inputs = segmented()
    del inputs["padding_mask"]
    return inputs


# Class, its settings, its inputs.
ENCODERS = {
    "AlbertBackbone": (
        {**ENCODER, **POSITIONS, "embedding_dim": 8},
        segmented,
    ),
    "BertBackbone": ({**ENCODER, **POSITIONS}, segmented),
    "DebertaV3Backbone": (
        {**ENCODER, **POSITIONS, "bucket_size": 8},
        tokens,
    ),
    "DistilBertBackbone": ({**ENCODER, **POSITIONS}, tokens),
    "ESM2Backbone": (ENCODER, unpadded),
    "ESMBackbone": (ENCODER, unpadded),
    "ElectraBackbone": (
        {
            **LAYERS,
            **POSITIONS,
            "vocab_size": VOCABULARY,
            "num_heads": 2,
            "embedding_dim": 8,
        },
        segmented,
    ),
    "FNetBackbone": (
        {**LAYERS, **POSITIONS, "vocabulary_size": VOCABULARY},
        unmasked,
    ),
    "RobertaBackbone": ({**ENCODER, **POSITIONS}, tokens),
    "RoformerV2Backbone": ({**ENCODER, "head_size": 8}, unmasked),
    "XLMRobertaBackbone": ({**ENCODER, **POSITIONS}, tokens),
    "XLNetBackbone": (ENCODER, segmented),
}
DECODERS = {
    "BloomBackbone": (ENCODER, tokens),
    "FalconBackbone": (
        {
            **LAYERS,
            "vocabulary_size": VOCABULARY,
            "num_attention_heads": 2,
        },
        tokens,
    ),
    "GPT2Backbone": ({**ENCODER, **POSITIONS}, tokens),
    "GPTNeoXBackbone": ({**ENCODER, **POSITIONS}, tokens),
    "GemmaBackbone": (GEMMA, tokens),
    "GptOssBackbone": (
        {**GROUPED, **EXPERTS, "sliding_window": 4},
        tokens,
    ),
    "Llama3Backbone": (GROUPED, tokens),
    "LlamaBackbone": (GROUPED, tokens),
    "MistralBackbone": ({**GROUPED, "sliding_window": 4}, tokens),
    "MixtralBackbone": (
        {**GROUPED, **EXPERTS, "sliding_window": 4},
        tokens,
    ),
    "OPTBackbone": ({**ENCODER, **POSITIONS}, tokens),
    "Phi3Backbone": (GROUPED, tokens),
    "Qwen2Backbone": (GROUPED, tokens),
    "Qwen3Backbone": ({**GROUPED, "head_dim": 8}, tokens),
    "Qwen3MoeBackbone": ({**QWEN_EXPERTS, "head_dim": 8}, tokens),
    "QwenBackbone": (GROUPED, tokens),
    "QwenMoeBackbone": (
        {**QWEN_EXPERTS, "shared_expert_intermediate_dim": 32},
        tokens,
    ),
    "RWKV7Backbone": (
        {
            "vocabulary_size": VOCABULARY,
            "hidden_size": 16,
            "head_size": 8,
            "num_layers": 2,
            "intermediate_dim": 32,
            "gate_lora": 8,
            "mv_lora": 4,
            "aaa_lora": 4,
            "decay_lora": 4,
        },
        # It wants a multiple of 16.
        lambda: tokens(16),
    ),
    "SmolLM3Backbone": (SMOLLM3, tokens),
    "SmolLMBackbone": (SMOLLM3, tokens),
}
ENCODER_DECODERS = {
    "BartBackbone": ({**ENCODER, **POSITIONS}, pairs),
    "EdRecBackbone": (
        {
            "vocab_size": VOCABULARY,
            "num_layers_enc": 2,
            "num_layers_dec": 2,
            "num_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 32,
        },
        pairs,
    ),
    "T5Backbone": (ENCODER, pairs),
    "T5GemmaBackbone": (T5_GEMMA, pairs),
}


def builder(name, settings, inputs):
    """A function that builds this backbone and its inputs."""
    return lambda: (getattr(models, name)(**settings), inputs())


TINY_TEXT = {
    name: builder(name, *rest)
    for name, rest in (ENCODERS | DECODERS | ENCODER_DECODERS).items()
}
