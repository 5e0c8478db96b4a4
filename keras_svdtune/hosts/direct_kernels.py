"""Kernels that a layer reads without a Dense or a convolution of their own.

The experts of a mixture are one weight (experts, in, out) that its parent
reads by einsum; a transposed or a separable convolution has a kernel that no
product x·W of its input describes. Their layers cannot be made to compute a
branch. But they read an attribute, and that can give the merged kernel:

    W' = W + ΔW, formed in each step, one ΔW for each expert

What it costs: a second kernel of the same size while the step runs, and for
SVF 2n multiplications for each number in it. KerasHub's experts each compute
every token, one multiplication for each number and token: with n = 2,048
and 4,096 tokens a step, forming W' costs as much as their forward pass.

`RawKernel` stands for one such kernel, with the attributes of a layer that
the rest of the package asks for. To add one, enter it in `RAW_KERNELS`.
"""

import functools
from typing import Any

from keras_svdtune.hosts.host import Merges
from keras_svdtune.matrix.view import MatrixView

_BANK = "eti,eio->eto"
_MATRIX = "ti,io->to"
_TRANSPOSED = {1: "ti,xoi->txo", 2: "ti,xyoi->txyo", 3: "ti,xyzoi->txyzo"}
_POINTWISE = {1: "txi,xio->to", 2: "txyi,xyio->to"}
_QWEN = ("_expert_feedforward_gate_dense", "_expert_feedforward_output_dense")

# Class of the parent -> attribute -> how it is a matrix, or a bank of them.
RAW_KERNELS: dict[str, dict[str, str]] = {
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


class RawKernel(Merges):
    """One raw kernel of a layer, as if it were a layer itself.

    Args:
        owner: a built layer whose class is in `RAW_KERNELS`.
        attribute: str, where it holds the kernel.
    """

    kernel_name = "variable"
    quantization_mode = None
    lora_enabled = False
    built = True

    def __init__(self, owner: Any, attribute: str):
        self.owner, self.attribute = owner, attribute
        self.equation = _table(type(owner))[attribute]
        self.variable = owner.__dict__[attribute]
        self.name = attribute.strip("_")
        self.path = f"{owner.path or owner.name}/{self.name}"
        self.kernel_constraint = getattr(owner, "kernel_constraint", None)
        self.slot = f"{self.name}_adapter"
        self.dtype_policy = owner.dtype_policy
        self.variable_dtype = owner.variable_dtype
        self.compute_dtype = owner.compute_dtype

    @property
    def adapter(self) -> Any:  # type: ignore[override]
        """Its adapter, a sublayer of the owner."""
        return getattr(self.owner, self.slot)

    def matrix_view(self, _: Any = None) -> MatrixView:
        """How it reads as a matrix, or as a bank of them."""
        bank = self.equation == _BANK
        return MatrixView(self.equation, tuple(self.variable.shape), bank)


class ReadsMerged:
    """Mixin of a layer whose raw kernels may have adapters."""

    plain: type


def raw_kernels(layer: Any) -> list[RawKernel]:
    """The raw kernels of a layer that it has built; none for most layers."""
    return [
        RawKernel(layer, attribute)
        for attribute in _table(type(layer))
        if layer.__dict__.get(attribute) is not None
    ]


def adapted_kernels(layer: Any) -> list[RawKernel]:
    """Those that have an adapter."""
    if not isinstance(layer, ReadsMerged):
        return []
    return [x for x in raw_kernels(layer) if hasattr(layer, x.slot)]


def _table(cls: type) -> dict[str, str]:
    plain = getattr(cls, "plain", cls)
    ours = plain.__module__.startswith(("keras.", "keras_hub."))
    return RAW_KERNELS.get(plain.__name__, {}) if ours else {}


@functools.cache
def reading_merged(plain: Any, mixin: Any) -> type:
    """A class like `plain` that reads W' wherever a kernel has an adapter."""
    namespace: dict[str, Any] = {
        attribute: _merged_or_raw(attribute) for attribute in _table(plain)
    }
    namespace |= {"plain": plain, "__module__": plain.__module__}
    return type(plain.__name__, (mixin, ReadsMerged, plain), namespace)


def _merged_or_raw(attribute: str) -> property:
    def read(layer: Any) -> Any:
        kernel = RawKernel(layer, attribute)
        if not hasattr(layer, kernel.slot):
            return kernel.variable
        return kernel.merged_in_compute_dtype()

    return property(read)
