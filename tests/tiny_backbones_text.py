"""The tiny backbones that read only tokens."""

import functools

from keras_hub import models
from tiny_backbones_inputs import ids, pairs, segmented, sized, tokens

# Local and global layers, every norm that a Gemma may have.
GEMMA = {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
}
T5_GEMMA = {"cross_attention_hidden_size": 16, "query_pre_attn_scalar": 8.0}
# Layers with experts, but for the first, which has a plain MLP.
PLAIN_FIRST = {"mlp_only_layers": [0]}
SMOLLM3 = {
    "rope_layer_enabled_list": [True, False],
    "layer_types": ["attention", "attention"],
}


def unpadded():
    """Tokens alone: these models make their mask themselves, or have none."""
    return {"token_ids": ids()}


def unmasked():
    """Tokens and segments without a mask."""
    inputs = segmented()
    del inputs["padding_mask"]
    return inputs


# Name: inputs; settings, if any.
ENCODERS = {
    "AlbertBackbone": (segmented, {"embedding_dim": 8}),
    "BertBackbone": (segmented,),
    "DebertaV3Backbone": (tokens, {"bucket_size": 8}),
    "DistilBertBackbone": (tokens,),
    "ESM2Backbone": (unpadded,),
    "ESMBackbone": (unpadded,),
    "ElectraBackbone": (segmented, {"embedding_dim": 8}),
    "FNetBackbone": (unmasked,),
    "RobertaBackbone": (tokens,),
    "RoformerV2Backbone": (unmasked,),
    "XLMRobertaBackbone": (tokens,),
    "XLNetBackbone": (segmented,),
}
DECODERS = {
    "BloomBackbone": (tokens,),
    "FalconBackbone": (tokens,),
    "GPT2Backbone": (tokens,),
    "GPTNeoXBackbone": (tokens,),
    "GemmaBackbone": (tokens, GEMMA),
    "GptOssBackbone": (tokens,),
    "Llama3Backbone": (tokens,),
    "LlamaBackbone": (tokens,),
    "MistralBackbone": (tokens,),
    "MixtralBackbone": (tokens,),
    "OPTBackbone": (tokens,),
    "Phi3Backbone": (tokens,),
    "Qwen2Backbone": (tokens,),
    "Qwen3Backbone": (tokens,),
    "Qwen3MoeBackbone": (tokens, {**PLAIN_FIRST, "head_dim": 8}),
    "QwenBackbone": (tokens,),
    "QwenMoeBackbone": (
        tokens,
        {**PLAIN_FIRST, "shared_expert_intermediate_dim": 32},
    ),
    "RWKV7Backbone": (
        functools.partial(tokens, 16),  # it wants a multiple of 16
        {"gate_lora": 8, "mv_lora": 4, "aaa_lora": 4, "decay_lora": 4},
    ),
    "SmolLM3Backbone": (tokens, SMOLLM3),
    "SmolLMBackbone": (tokens, SMOLLM3),
}
ENCODER_DECODERS = {
    "BartBackbone": (pairs,),
    "EdRecBackbone": (pairs,),
    "T5Backbone": (pairs,),
    "T5GemmaBackbone": (pairs, T5_GEMMA),
}


def builder(name, inputs, settings=None):
    """A function that builds this backbone and its inputs."""
    return lambda: (sized(getattr(models, name), **settings or {}), inputs())


TINY_TEXT = {
    name: builder(name, *rest)
    for name, rest in (ENCODERS | DECODERS | ENCODER_DECODERS).items()
}
