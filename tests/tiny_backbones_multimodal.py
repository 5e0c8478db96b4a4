"""The other tiny backbones with several inputs, and those for sound."""

import functools

import numpy as np
from keras_hub import layers, models
from keras_hub.src.models.stable_diffusion_3.t5_encoder import T5Encoder
from keras_hub.src.models.vae.vae_backbone import VAEBackbone
from tiny_backbones_inputs import (
    BATCH,
    LENGTH,
    VOCABULARY,
    ids,
    images,
    mask,
    random,
    sized,
    tokens,
)
from tiny_backbones_vision import vit_det

# Group normalization wants 32 channels.
VAE = {
    "encoder_num_filters": [32, 32],
    "encoder_num_blocks": [1, 1],
    "decoder_num_filters": [32, 32],
    "decoder_num_blocks": [1, 1],
}


def two_towers(family, end=VOCABULARY - 1):
    """The three models of a family: both towers, and each of them.

    Some take the text's embedding from the place of the token for its end.
    """
    texts = {"token_ids": ids()}
    texts["token_ids"][:, -1] = end
    both, vision, text = (
        getattr(models, f"{family}{part}")
        for part in ("Backbone", "VisionEncoder", "TextEncoder")
    )
    seen = functools.partial(sized, vision, image_shape=(16, 16, 3))
    return {
        both.__name__: lambda: (
            sized(both, vision_encoder=seen(), text_encoder=sized(text)),
            {"images": images(), **texts},
        ),
        vision.__name__: lambda: (seen(), {"images": images()}),
        text.__name__: lambda: (sized(text), dict(texts)),
    }


def flux():
    """The heads have as many numbers as the axes together."""
    model = sized(
        models.FluxBackbone,
        input_channels=8,
        hidden_size=32,
        mlp_ratio=2.0,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[4, 6, 6],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(16, 8),
        text_shape=(LENGTH, 24),
        image_ids_shape=(16, 3),
        text_ids_shape=(LENGTH, 3),
        y_shape=(24,),
    )
    return model, {
        "image": random(16, 8),
        "image_ids": random(16, 3, low=0.0, high=4.0),
        "text": random(LENGTH, 24),
        "text_ids": random(LENGTH, 3, low=0.0, high=4.0),
        "y": random(24),
        "timesteps": random(low=0.0),
        "guidance": random(low=1.0, high=4.0),
    }


def moonshine():
    model = sized(
        models.MoonshineBackbone, filter_dim=16, feedforward_expansion_factor=2
    )
    # The convolutions make one step of 384 samples.
    return model, {
        "encoder_input_values": random(2304, 1),
        "encoder_padding_mask": np.ones((BATCH, 2304), "bool"),
        "decoder_token_ids": ids(),
        "decoder_padding_mask": mask().astype("bool"),
    }


def parseq():
    vit = sized(
        models.ViTBackbone,
        image_shape=(16, 32, 3),
        patch_size=(4, 8),
        use_class_token=False,
    )
    model = sized(
        models.PARSeqBackbone,
        image_encoder=vit,
        max_label_length=LENGTH,
        num_decoder_layers=1,
        num_decoder_heads=2,
    )
    return model, {"images": random(16, 32, 3, low=0.0), **tokens()}


def sam():
    """Points of each kind, boxes, and a mask."""
    encoder, pixels = vit_det()
    model = models.SAMBackbone(
        image_encoder=encoder,
        prompt_encoder=layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=16,
        ),
        mask_decoder=sized(
            layers.SAMMaskDecoder,
            num_layers=1,
            hidden_size=8,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    )
    return model, {
        "images": pixels,
        "points": random(3, 2, low=0.0, high=16.0),
        "labels": np.tile(np.float32([0, 1, -1]), (BATCH, 1)),
        "boxes": random(1, 2, 2, low=0.0, high=16.0),
        "masks": random(1, 16, 16, 1),
    }


def sam3():
    model = models.SAM3PromptableConceptBackbone(
        vision_encoder=sized(
            layers.SAM3VisionEncoder,
            image_shape=(32, 32, 3),
            patch_size=8,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(16, 16, 3),
            window_size=2,
            global_attn_indexes=[1],
        ),
        text_encoder=sized(
            layers.SAM3TextEncoder, num_layers=1, max_sequence_length=32
        ),
        geometry_encoder=sized(
            layers.SAM3GeometryEncoder, num_layers=1, roi_size=3
        ),
        detr_encoder=sized(layers.SAM3DetrEncoder, num_layers=1),
        detr_decoder=sized(
            layers.SAM3DetrDecoder,
            image_shape=(32, 32, 3),
            patch_size=8,
            num_layers=1,
            num_queries=4,
        ),
        mask_decoder=sized(layers.SAM3MaskDecoder, num_upsampling_stages=3),
    )
    # The first number of a box is the place of its image in the batch. There
    # is one for each image: KerasHub's mask fails with more.
    box = [0.5, 0.5, 0.4, 0.6]
    boxes = np.float32([[[place, *box]] for place in range(BATCH)])
    return model, {
        "pixel_values": images(32),
        **tokens(32),
        "boxes": boxes,
        "box_labels": np.int32([[1], [0]]),
    }


def stable_diffusion_3():
    def clip(name):
        return sized(
            models.CLIPTextEncoder, name=name, intermediate_output_index=-2
        )

    model = models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=8,
        mmdit_qk_norm="rms_norm",
        mmdit_dual_attention_indices=(0,),
        vae=VAEBackbone(**VAE, sampler_method="mode"),
        clip_l=clip("clip_l"),
        clip_g=clip("clip_g"),
        t5=sized(T5Encoder, hidden_dim=32),
        image_shape=(32, 32, 3),
    )
    texts = ("clip_l", "clip_g", "t5")
    return model, {
        "images": images(32),
        "latents": random(4, 4, 16),
        **{f"{text}_token_ids": ids() for text in texts},
        **{f"{text}_negative_token_ids": ids()[::-1] for text in texts},
        "num_steps": np.full(BATCH, 4, "int32"),
        "guidance_scale": np.full(BATCH, 2.0, "float32"),
    }


def video_prism():
    model = sized(
        models.VideoPrismBackbone,
        num_frames=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        vocabulary_size=VOCABULARY,
        num_text_layers=1,
        image_shape=(16, 16, 3),
    )
    return model, {"pixel_values": random(2, 16, 16, 3, low=0.0), **tokens()}


def whisper():
    model = sized(
        models.WhisperBackbone,
        num_mels=8,
        max_encoder_sequence_length=16,
        max_decoder_sequence_length=LENGTH,
    )
    return model, {
        "encoder_features": random(16, 8),
        **tokens(prefix="decoder_"),
    }


TINY_MULTIMODAL = {
    **two_towers("CLIP"),
    **two_towers("MetaCLIP2", end=2),
    **two_towers("SigLIP"),
    "FluxBackbone": flux,
    "MoonshineBackbone": moonshine,
    "PARSeqBackbone": parseq,
    "SAM3PromptableConceptBackbone": sam3,
    "SAMBackbone": sam,
    "StableDiffusion3Backbone": stable_diffusion_3,
    "VideoPrismBackbone": video_prism,
    "WhisperBackbone": whisper,
}
