"""EfficientNet-Lite0 with its ImageNet weights, as a KerasHub backbone.

The weights are those of a PyTorch package, which pads as TensorFlow does. Of
KerasHub's blocks those of type "unfused" pad so too; the first stack, which
has no stride, is of type "v1", since an "unfused" block without expansion
has another kernel. `difference` compares the features of both.
"""

import sys
from typing import Any

import classifiers_data
import keras
import keras_hub
import numpy as np

CONFIG = {
    "stackwise_kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "stackwise_num_repeats": [1, 2, 2, 3, 3, 4, 1],
    "stackwise_input_filters": [32, 16, 24, 40, 80, 112, 192],
    "stackwise_output_filters": [16, 24, 40, 80, 112, 192, 320],
    "stackwise_expansion_ratios": [1, 6, 6, 6, 6, 6, 6],
    "stackwise_strides": [1, 2, 2, 2, 1, 2, 1],
    "stackwise_squeeze_and_excite_ratios": [0] * 7,
    "stackwise_block_types": ["v1"] + ["unfused"] * 6,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "activation": "relu6",
    "include_stem_padding": False,
    "stem_conv_padding": "same",
    "batch_norm_momentum": 0.99,
    "batch_norm_epsilon": 1e-3,
}


def backbone(size: int, pretrained: bool = True) -> Any:
    """The backbone for square images of `size`, scaled to -1 .. 1."""
    model = keras_hub.models.EfficientNetBackbone(
        **CONFIG, input_shape=(size, size, 3)
    )
    if pretrained:
        convert(model, state())
    return model


def state() -> dict[str, np.ndarray]:
    """The PyTorch weights by name."""
    import torch

    path = classifiers_data.unpacked(classifiers_data.EFFICIENTNET_WEIGHTS)
    found = torch.load(path, weights_only=True, map_location="cpu")
    return {k: v.numpy() for k, v in found.items()}


def convert(model: Any, weights: dict[str, np.ndarray]) -> None:
    """Assigns all weights but those of ImageNet's classes."""
    left = dict(weights)

    def kernel(layer: Any, name: str) -> None:
        value = left.pop(f"{name}.weight")
        # (out, in, height, width); depthwise (channels, 1, height, width).
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        axes = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        layer.kernel.assign(value.transpose(axes))

    def norm(layer: Any, name: str) -> None:
        layer.gamma.assign(left.pop(f"{name}.weight"))
        layer.beta.assign(left.pop(f"{name}.bias"))
        layer.moving_mean.assign(left.pop(f"{name}.running_mean"))
        layer.moving_variance.assign(left.pop(f"{name}.running_var"))

    def layer(name: str) -> Any:
        return model.get_layer(name)

    kernel(layer("stem_conv"), "_conv_stem")
    norm(layer("stem_bn"), "_bn0")
    kernel(layer("block1a_dwconv"), "_blocks.0._depthwise_conv")
    norm(layer("block1a_dwconv_bn"), "_blocks.0._bn1")
    kernel(layer("block1a_project"), "_blocks.0._project_conv")
    norm(layer("block1a_project_bn"), "_blocks.0._bn2")
    blocks = [
        layer(f"block{stack + 1}{chr(ord('a') + i)}_")
        for stack, repeats in enumerate(CONFIG["stackwise_num_repeats"])
        if stack
        for i in range(repeats)
    ]
    for i, block in enumerate(blocks, start=1):
        kernel(block.conv1, f"_blocks.{i}._expand_conv")
        norm(block.bn1, f"_blocks.{i}._bn0")
        kernel(block.depthwise, f"_blocks.{i}._depthwise_conv")
        norm(block.bn2, f"_blocks.{i}._bn1")
        kernel(block.output_conv, f"_blocks.{i}._project_conv")
        norm(block.bn3, f"_blocks.{i}._bn2")
    kernel(layer("top_conv"), "_conv_head")
    norm(layer("top_bn"), "_bn1")
    unused = [
        k
        for k in left
        if not k.startswith("_fc.") and not k.endswith("num_batches_tracked")
    ]
    assert not unused, f"not converted: {unused}"


def difference(size: int) -> float:
    """The largest difference of features to the PyTorch package's own.

    As a share of the largest feature.
    """
    import torch

    path = classifiers_data.unpacked(classifiers_data.EFFICIENTNET_CODE)
    sys.path.insert(0, str(path.parent))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.remove(str(path.parent))
    weights = state()
    peer = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    peer.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    peer.eval()
    images = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3))
    images = images.astype("float32")
    with torch.no_grad():
        expected = peer.extract_features(
            torch.from_numpy(images.transpose(0, 3, 1, 2))
        )
    expected = expected.numpy().transpose(0, 2, 3, 1)
    found = keras.ops.convert_to_numpy(backbone(size)(images, training=False))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
