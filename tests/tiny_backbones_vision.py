"""The tiny backbones that read only images."""

from keras_hub import models
from tiny_backbones_inputs import images, sized

# The first stage must have 64 filters.
RESNET = {
    "input_conv_filters": [8],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 16],
    "stackwise_num_blocks": [2, 1],
    "stackwise_num_strides": [1, 2],
    "block_type": "bottleneck_block",
}
MIT = {
    "layerwise_depths": [1, 1],
    "image_shape": (32, 32, 3),
    "hidden_dims": [8, 16],
    "num_layers": 2,
    "layerwise_num_heads": [2, 2],
    "layerwise_sr_ratios": [4, 1],
    "max_drop_path_rate": 0.1,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
}
# Its blocks are, in this order: edge residual, universal inverted residual,
# attention. Each halves the image, which the stem has halved before.
MOBILENET_V5 = {
    "stackwise_block_types": [["er"], ["uir", "mqa"]],
    "stackwise_num_blocks": [1, 2],
    "stackwise_num_filters": [[8], [16, 16]],
    "stackwise_strides": [[2], [2, 1]],
    "stackwise_act_layers": [["gelu"], ["gelu", "gelu"]],
    "stackwise_exp_ratios": [[2.0], [2.0, 1.0]],
    "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
    "stackwise_dw_kernel_sizes": [[0], [3, 3]],
    "stackwise_dw_start_kernel_sizes": [[0], [3, 0]],
    "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
    "stackwise_exp_kernel_sizes": [[3], [0, 0]],
    "stackwise_pw_kernel_sizes": [[1], [0, 0]],
    "stackwise_num_heads": [[0], [0, 2]],
    "stackwise_key_dims": [[0], [0, 8]],
    "stackwise_value_dims": [[0], [0, 8]],
    "stackwise_kv_strides": [[0], [0, 1]],
    "stackwise_use_cpe": [[False], [False, False]],
    "stem_size": 8,
    "num_features": 16,
}
HGNET_V2 = {
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    # Channels in, in the middle, and out; blocks, layers, kernel size.
    "stackwise_stage_filters": [[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, True],
    "use_learnable_affine_block": True,
    "hidden_act": "relu",
}
D_FINE = {
    "decoder_in_channels": [16, 16],
    "num_labels": 4,
    "num_denoising": 0,
    "learn_initial_query": False,
    "num_queries": 6,
    "anchor_image_size": (32, 32),
    "feat_strides": [4, 8],
    "num_feature_levels": 2,
    "encoder_in_channels": [16, 32],
    "encode_proj_layers": [1],
    "encoder_ffn_dim": 32,
    "num_encoder_layers": 1,
    "hidden_expansion": 0.5,
    "depth_multiplier": 0.5,
    "eval_idx": -1,
    "num_decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_n_points": [2, 2],
    "lqe_hidden_dim": 16,
    "num_lqe_layers": 2,
    "out_features": ["stage1", "stage2"],
    "seed": 0,
}


def resnet(filters, **settings):
    """An image encoder with as many stages as filters.

    Its blocks are those with two convolutions that may change the number of
    channels in the first stage too.
    """
    return models.ResNetBackbone(
        **{
            **RESNET,
            "stackwise_num_filters": filters,
            "stackwise_num_blocks": [1] * len(filters),
            "stackwise_num_strides": [1] + [2] * (len(filters) - 1),
            "block_type": "basic_block_vd",
            **settings,
        }
    )


def basnet():
    """Uses the encoder without its first convolution."""
    model = models.BASNetBackbone(
        image_encoder=resnet([64, 16, 16, 16]),
        num_classes=4,
        projection_filters=8,
    )
    return model, images(64)


def cspnet():
    model = models.CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=2,
        stackwise_num_filters=[16, 32],
        block_type="dark_block",
        stage_type="csp",
        stem_padding="same",
        down_growth=True,
        bottle_ratio=(0.5, 1.0),
        block_ratio=(1.0, 0.5),
        expand_ratio=(2.0, 1.0),
    )
    return model, images(32)


def d_fine():
    features = D_FINE["out_features"]
    encoder = models.HGNetV2Backbone(**HGNET_V2, out_features=features)
    model = sized(
        models.DFineBackbone,
        backbone=encoder,
        image_shape=(32, 32, 3),
        **D_FINE,
    )
    return model, images(32)


def deeplab_v3():
    model = models.DeepLabV3Backbone(
        image_encoder=resnet([64, 16, 16]),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        dilation_rates=[1, 2],
        upsampling_size=4,
        projection_filters=8,
        image_shape=(64, 64, 3),
    )
    return model, images(64)


def densenet():
    model = models.DenseNetBackbone(
        stackwise_num_repeats=[2, 2], growth_rate=4, image_shape=(32, 32, 3)
    )
    return model, images(32)


def depth_anything():
    encoder = dino(
        models.DINOV2Backbone,
        num_layers=4,
        image_shape=(24, 24, 3),
        position_embedding_shape=(32, 32, 3),
        apply_layernorm=True,
    )
    model = models.DepthAnythingBackbone(
        image_encoder=encoder,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[8, 8, 16, 16],
        fusion_hidden_dim=16,
        head_hidden_dim=8,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    )
    return model, images(24)


def dino(cls, image_shape=(16, 16, 3), **settings):
    settings = {"num_register_tokens": 2, "use_mask_token": False, **settings}
    return sized(cls, image_shape=image_shape, **settings)


def dinov2():
    model = dino(models.DINOV2Backbone, position_embedding_shape=(32, 32, 3))
    return model, {"images": images()}


def dinov3():
    return dino(models.DINOV3Backbone), {"pixel_values": images()}


def efficientnet():
    """One block of each type, the first and the last with a residual."""
    model = models.EfficientNetBackbone(
        stackwise_block_types=["fused", "unfused", "v1"],
        stackwise_kernel_sizes=[3, 3, 3],
        stackwise_num_repeats=[1, 1, 1],
        stackwise_input_filters=[8, 8, 16],
        stackwise_output_filters=[8, 16, 16],
        stackwise_expansion_ratios=[2, 2, 2],
        stackwise_squeeze_and_excite_ratios=[0.5, 0.5, 0.5],
        stackwise_strides=[1, 2, 1],
        stackwise_force_input_filters=[0, 0, 0],
        stackwise_nores_option=[False, False, False],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        num_features=32,
    )
    return model, images(32)


def mobilenet():
    model = models.MobileNetBackbone(
        stackwise_expansion=[[16], [32, 32]],
        stackwise_num_blocks=[1, 2],
        stackwise_num_filters=[[8], [16, 16]],
        stackwise_kernel_size=[[3], [5, 5]],
        stackwise_num_strides=[[2], [2, 1]],
        stackwise_se_ratio=[[None], [0.25, 0.25]],
        stackwise_activation=[["relu"], ["hard_swish", "hard_swish"]],
        stackwise_padding=[[1], [2, 2]],
        input_num_filters=8,
        output_num_filters=32,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=True,
        squeeze_and_excite=0.5,
        last_layer_filter=32,
        image_shape=(32, 32, 3),
    )
    return model, images(32)


def mobilenet_v5():
    model = models.MobileNetV5Backbone(
        **MOBILENET_V5,
        use_msfa=True,
        msfa_output_resolution=4,
        image_shape=(32, 32, 3),
    )
    return model, images(32)


def retinanet():
    """Few levels: each has convolutions of 256 filters."""
    model = models.RetinaNetBackbone(
        image_encoder=resnet([64, 16, 16, 16]),
        min_level=4,
        max_level=6,
        use_p5=False,
        image_shape=(64, 64, 3),
    )
    return model, images(64)


def swin():
    model = models.SwinTransformerBackbone(
        image_shape=(32, 32, 3),
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
    )
    return model, images(32)


def vgg():
    model = models.VGGBackbone(
        stackwise_num_repeats=[1, 2],
        stackwise_num_filters=[8, 16],
        image_shape=(16, 16, 3),
    )
    return model, images()


def vit_det():
    """Also the image encoder of SAM. One layer has windows, one has not."""
    model = sized(
        models.ViTDetBackbone,
        image_shape=(16, 16, 3),
        patch_size=4,
        global_attention_layer_indices=[1],
        window_size=2,
        num_output_channels=8,
    )
    return model, images()


def xception():
    model = models.XceptionBackbone(
        stackwise_conv_filters=[[8, 16], [16, 32], [32, 32]],
        stackwise_pooling=[False, True, False],
    )
    return model, images(32)


TINY_VISION = {
    "BASNetBackbone": basnet,
    "CSPNetBackbone": cspnet,
    "DFineBackbone": d_fine,
    "DINOV2Backbone": dinov2,
    "DINOV3Backbone": dinov3,
    "DeepLabV3Backbone": deeplab_v3,
    "DeiTBackbone": lambda: (sized(models.DeiTBackbone), images()),
    "DenseNetBackbone": densenet,
    "DepthAnythingBackbone": depth_anything,
    "EfficientNetBackbone": efficientnet,
    "HGNetV2Backbone": lambda: (models.HGNetV2Backbone(**HGNET_V2), images(32)),
    "MiTBackbone": lambda: (models.MiTBackbone(**MIT), images(32)),
    "MobileNetBackbone": mobilenet,
    "MobileNetV5Backbone": mobilenet_v5,
    "ResNetBackbone": lambda: (models.ResNetBackbone(**RESNET), images(32)),
    "RetinaNetBackbone": retinanet,
    "SegFormerBackbone": lambda: (
        models.SegFormerBackbone(
            image_encoder=models.MiTBackbone(**MIT), projection_filters=16
        ),
        images(32),
    ),
    "SwinTransformerBackbone": swin,
    "VGGBackbone": vgg,
    "ViTBackbone": lambda: (sized(models.ViTBackbone), images()),
    "ViTDetBackbone": vit_det,
    "XceptionBackbone": xception,
}
