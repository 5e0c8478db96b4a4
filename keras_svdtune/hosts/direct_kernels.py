"""Adapts kernels that a layer reads without a Dense or a convolution.

The experts of a mixture are one weight (experts, in, out) that its parent reads
by einsum; a transposed or a separable convolution has a kernel that no product
x·W of its input describes. Such layers cannot be made to compute a branch. But
they read an attribute, and that can return the merged kernel:

    W' = W + ΔW, formed in each step, one ΔW for each expert

This costs a second kernel of the same size while the step runs, and for SVF 2n
multiplications for each number in it. KerasHub's experts each compute every
token, one multiplication for each number and token: with n = 2,048 and 4,096
tokens a step, forming W' costs as much as their forward pass.

To add a kernel, enter it in `DIRECT_KERNELS`.
"""

import functools
from typing import ClassVar

from keras_svdtune.hosts.target import Target
from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.runtime.types import Layer, Tensor

_BANK = "eti,eio->eto"
_MATRIX = "ti,io->to"
_TRANSPOSED = {1: "ti,xoi->txo", 2: "ti,xyoi->txyo", 3: "ti,xyzoi->txyzo"}
_POINTWISE = {1: "txi,xio->to", 2: "txyi,xyio->to"}
_QWEN = ("_expert_feedforward_gate_dense", "_expert_feedforward_output_dense")

# Class of the parent -> attribute -> equation that makes it a matrix or bank.
DIRECT_KERNELS: dict[str, dict[str, str]] = {
    "MixtralMoeExperts": {
        "_expert_feedforward_gate_dense": _BANK,
        "_expert_feedforward_intermediate_dense": _BANK,
        "_expert_feedforward_output_dense": _BANK,
    },
    "QwenMoeExperts": dict.fromkeys(_QWEN, _BANK),
    "Qwen3MoeExperts": dict.fromkeys(_QWEN, _BANK),
    "Qwen3_5MoeExperts": dict.fromkeys(_QWEN, _BANK),
    "GptOssExperts": {"gate_up_proj": _BANK, "down_proj": _BANK},
    "Gemma4MoEBlock": dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), _BANK
    ),
    "Gemma4AudioRelativePositionEmbedding": {"pos_proj": _MATRIX},
    "RWKV7TimeMix": dict.fromkeys(
        ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"), _MATRIX
    ),
    "Conv1DTranspose": {"kernel": _TRANSPOSED[1]},
    "Conv2DTranspose": {"kernel": _TRANSPOSED[2]},
    "Conv3DTranspose": {"kernel": _TRANSPOSED[3]},
    "SeparableConv1D": {"pointwise_kernel": _POINTWISE[1]},
    "SeparableConv2D": {"pointwise_kernel": _POINTWISE[2]},
}


class ReadsMerged:
    """Mixin for layers of class `plain` with adapters on direct kernels."""

    plain: ClassVar[type]


def direct_targets(layer: Layer) -> list[Target]:
    """Returns the direct kernels that a layer has built; most have none."""
    return [
        _target(layer, attribute, equation)
        for attribute, equation in _table(type(layer)).items()
        if layer.__dict__.get(attribute) is not None
    ]


def adapted_directly(layer: Layer) -> list[Target]:
    """Returns the direct kernels of a layer that have an adapter."""
    if not isinstance(layer, ReadsMerged):
        return []
    slots = (_slot(attribute) for attribute in _table(type(layer)))
    adapters = (getattr(layer, slot, None) for slot in slots)
    return [adapter.target for adapter in adapters if adapter is not None]


def _target(layer: Layer, attribute: str, equation: str) -> Target:
    shape = tuple(layer.__dict__[attribute].shape)
    view = MatrixView(equation, shape, bank=equation == _BANK)
    path = f"{layer.path or layer.name}/{attribute.strip('_')}"
    return Target(path, layer, attribute, view, _slot(attribute), direct=True)


def _slot(attribute: str) -> str:
    return f"{attribute.strip('_')}_adapter"


def _table(cls: type) -> dict[str, str]:
    plain = getattr(cls, "plain", cls)
    ours = plain.__module__.startswith(("keras.", "keras_hub."))
    return DIRECT_KERNELS.get(plain.__name__, {}) if ours else {}


@functools.cache
def reading_merged(plain: type, mixin: type) -> type:
    """Makes a class like `plain` that reads W' where a kernel is adapted."""
    properties = {name: _merged_or_own(name) for name in _table(plain)}
    namespace = {"plain": plain, "__module__": plain.__module__, **properties}
    return type(plain.__name__, (mixin, ReadsMerged, plain), namespace)


def _merged_or_own(attribute: str) -> property:
    slot = _slot(attribute)

    def read(layer: Layer) -> Tensor:
        adapter = getattr(layer, slot, None)
        if adapter is None:
            return layer.__dict__[attribute]
        return adapter.target.merged_in_compute_dtype()

    return property(read)
