"""The tiny backbones that read images or sounds as if they were text."""

import functools

import numpy as np
from keras_hub import models
from keras_hub.src.models.gemma3n.gemma3n_audio_encoder import (
    Gemma3nAudioEncoder,
)
from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net
from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import (
    Qwen3_5VisionEncoder,
)
from tiny_backbones_inputs import (
    BATCH,
    LENGTH,
    VOCABULARY,
    images,
    indices,
    marked,
    pairs,
    random,
    sized,
    tokens,
)
from tiny_backbones_text import GEMMA, T5_GEMMA
from tiny_backbones_vision import MOBILENET_V5

QWEN3_5 = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "mrope_section": [2, 1, 1],
}
# The special tokens are in the vocabulary: first those of the language, then
# those of images, then those of sounds.
GEMMA_3N = {
    "text_vocab_size": 48,
    "text_hidden_size": 16,
    "pad_token_id": 0,
    "intermediate_size": [32, 32],
    "hidden_activation": "gelu_approximate",
    "vocab_size_per_layer_input": 32,
    "hidden_size_per_layer_input": 4,
    "altup_num_inputs": 4,
    "laurel_rank": 4,
    "vision_hidden_size": 16,
    "vision_vocab_offset": 32,
    "vision_vocab_size": 8,
    "image_token_id": 33,
    "vision_soft_tokens_per_image": 4,
    "audio_hidden_size": 16,
    "audio_vocab_offset": 40,
    "audio_vocab_size": 8,
    "audio_token_id": 41,
    "audio_soft_tokens_per_image": 4,
}


GEMMA_3N_AUDIO = {
    "input_feat_size": 8,
    "sscp_conv_channel_size": [4, 8],
    "sscp_conv_kernel_size": [(3, 3), (3, 3)],
    "sscp_conv_stride_size": [(2, 2), (2, 2)],
    "sscp_conv_group_norm_eps": 1e-5,
    "num_hidden_layers": 1,
    "gradient_clipping": 1e10,
    "residual_weight": 0.5,
    "num_attention_heads": 2,
    "attention_chunk_size": 2,
    "num_attention_context_right": 1,
    "num_attention_context_left": 2,
    "attention_logit_cap": 50.0,
    "conv_kernel_size": 3,
    "reduction_factor": 1,
}


def blip2():
    model = models.BLIP2Backbone(
        vision_encoder=sized(
            models.BLIP2VisionEncoder,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
        ),
        qformer=sized(
            models.BLIP2QFormer,
            num_query_tokens=4,
            vision_dim=16,
            cross_attention_frequency=2,
        ),
        language_model=sized(
            models.BLIP2CustomOPT,
            num_query_tokens=4,
            qformer_hidden_dim=16,
            max_sequence_length=16,
        ),
    )
    return model, {"images": images(16), **tokens()}


def gemma3():
    encoder = sized(models.Gemma3VisionEncoder)
    model = sized(models.Gemma3Backbone, vision_encoder=encoder, **GEMMA)
    return model, {
        **tokens(12),
        "images": images(16)[:, None],
        "vision_indices": indices(2, 4),
        "vision_mask": marked(2, 4, 12),
    }


def gemma3n():
    """An image, a clip, and one token of each that is not replaced."""
    vision = models.MobileNetV5Backbone(
        **MOBILENET_V5, use_msfa=False, image_shape=(16, 16, 3)
    )
    audio = sized(Gemma3nAudioEncoder, **GEMMA_3N_AUDIO)
    model = sized(
        models.Gemma3nBackbone,
        vision_encoder_config=vision.get_config(),
        audio_encoder_config=audio.get_config(),
        **GEMMA_3N,
    )
    inputs = tokens(16)
    inputs["token_ids"][:, 2:12] = [33] * 4 + [34] + [41] * 4 + [42]
    return model, {
        "token_ids": inputs["token_ids"],
        "padding_mask": inputs["padding_mask"].astype("bool"),
        "images": images(16)[:, None],
        "input_features": random(1, 16, 8),
        "input_features_mask": np.zeros((BATCH, 1, 16), "bool"),
    }


def gemma4():
    """An image, a clip, inputs for each layer, and experts."""
    model = sized(
        models.Gemma4Backbone,
        vision_encoder=sized(
            models.Gemma4VisionEncoder,
            num_key_value_heads=2,
            position_embedding_size=4,
        ),
        audio_encoder=models.Gemma4AudioEncoder(
            input_feat_size=8,
            hidden_size=16,
            num_heads=2,
            num_layers=1,
            chunk_size=4,
            context_left=5,
            context_right=0,
            sscp_conv_channels=(8, 4),
            output_proj_dims=16,
            output_dim=16,
        ),
        num_audio_tokens_per_clip=4,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        enable_moe_block=True,
        num_experts=4,
        expert_intermediate_dim=8,
        num_experts_per_token=2,
    )
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1)
    grid = np.tile(grid.reshape(1, 1, 16, 2), (BATCH, 1, 1, 1))
    return model, {
        **tokens(16),
        "position_ids": indices(0, 16),
        "pixel_values": random(1, 16, 48, low=0.0),
        "pixel_position_ids": grid.astype("int32"),
        "vision_indices": indices(2, 4),
        "vision_mask": marked(2, 4, 16),
        "audio_mel": random(1, 16, 8),
        "audio_mel_mask": np.ones((BATCH, 1, 16), "int32"),
        "audio_indices": indices(8, 4),
        "audio_mask": marked(8, 4, 16),
    }


def pali_gemma():
    model = sized(
        models.PaliGemmaBackbone,
        num_key_value_heads=1,
        vit_patch_size=4,
        vit_num_layers=2,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_intermediate_dim=32,
        **GEMMA,
    )
    inputs = {**tokens(), "images": images(16)}
    return model, {**inputs, "response_mask": marked(4, 4)}


def shorten_chunks():
    """Makes linear attention work on chunks of 8 tokens, not of 64.

    The result is the same, but a chunk is a loop over its tokens, each step
    of which is compiled: half a minute for sequences of 8 tokens.
    """
    rule = qwen3_5_gated_delta_net._chunk_gated_delta_rule
    qwen3_5_gated_delta_net._chunk_gated_delta_rule = functools.partial(
        rule, chunk_size=LENGTH
    )


def qwen3_5(name, **settings):
    """One image of 4x4 patches, whose tokens take places 2 to 5.

    Unlike elsewhere, the places count through the whole batch, and the grid
    must have values: these two do not work inside of jit.
    """
    shorten_chunks()
    encoder = sized(
        Qwen3_5VisionEncoder,
        depth=1,
        intermediate_size=32,
        patch_size=4,
        out_hidden_size=16,
        num_position_embeddings=16,
    )
    cls = getattr(models, name)
    model = sized(cls, vision_encoder=encoder, **QWEN3_5, **settings)
    return model, {
        **tokens(),
        "pixel_values": random(16, 2, 4, 4, 3, low=0.0),
        "image_grid_thw": np.tile(np.int32([[[1, 4, 4]]]), (BATCH, 1, 1)),
        "vision_indices": indices(2, 4) + LENGTH * np.int32([[0], [1]]),
    }


def t5_gemma2():
    """With an image; the token after it is the one for its end."""
    model = sized(
        models.T5Gemma2Backbone,
        **T5_GEMMA,
        vision_encoder=sized(models.Gemma3VisionEncoder),
        eoi_token_index=VOCABULARY - 1,
    )
    inputs = {**pairs(), "images": images(16)[:, None]}
    inputs["encoder_token_ids"][:, 5] = VOCABULARY - 1
    inputs["decoder_token_ids"][:, 1] = VOCABULARY - 1
    return model, {**inputs, "vision_indices": indices(1, 4)}


TINY_LANGUAGE = {
    "BLIP2Backbone": blip2,
    "Gemma3Backbone": gemma3,
    "Gemma3nBackbone": gemma3n,
    "Gemma4Backbone": gemma4,
    "PaliGemmaBackbone": pali_gemma,
    "Qwen3_5Backbone": lambda: qwen3_5("Qwen3_5Backbone"),
    "Qwen3_5MoeBackbone": lambda: qwen3_5(
        "Qwen3_5MoeBackbone", shared_expert_intermediate_size=8
    ),
    "T5Gemma2Backbone": t5_gemma2,
}
