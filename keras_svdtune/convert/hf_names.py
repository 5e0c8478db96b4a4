"""The names that transformers gives to the layers of a KerasHub backbone."""

import dataclasses
import re

from keras_svdtune.runtime.types import Model

_ATTENTION = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Backbones whose layers have the same names in transformers.

    Attributes:
        block: str, the name of a KerasHub block, before its number.
        prefix: str, the name of transformers' block, before the same number.
        modules: the name of a layer in a block -> the name of its module.
            Layers of one module stand side by side in it, in this order.
        transposed: bool, whether a module holds (out, in).
    """

    block: str
    prefix: str
    modules: dict[str, str]
    transposed: bool = True


_GEMMA = Family(
    "decoder_block",
    "model.layers",
    _ATTENTION
    | {
        "ffw_gating": "mlp.gate_proj",
        "ffw_gating_2": "mlp.up_proj",
        "ffw_linear": "mlp.down_proj",
    },
)
_LLAMA = Family(
    "transformer_layer",
    "model.layers",
    _ATTENTION
    | {
        "feedforward_gate_dense": "mlp.gate_proj",
        "feedforward_intermediate_dense": "mlp.up_proj",
        "feedforward_output_dense": "mlp.down_proj",
    },
)
_GPT2 = Family(
    "transformer_layer",
    "transformer.h",
    {
        "query": "attn.c_attn",
        "key": "attn.c_attn",
        "value": "attn.c_attn",
        "attention_output": "attn.c_proj",
        "feedforward_intermediate_dense": "mlp.c_fc",
        "feedforward_output_dense": "mlp.c_proj",
    },
    transposed=False,
)
# By the exact name of the class: a subclass may compute something else.
FAMILIES = {
    "GemmaBackbone": _GEMMA,
    "Gemma3Backbone": _GEMMA,
    "LlamaBackbone": _LLAMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "QwenBackbone": _LLAMA,
    "Qwen3Backbone": _LLAMA,
    "GPT2Backbone": _GPT2,
}


def family_of(root: Model) -> Family:
    """Returns the family of a backbone, or raises a ValueError."""
    kind = type(root).__name__
    if kind not in FAMILIES:
        raise ValueError(
            "PEFT's folders name layers as transformers does, and its names "
            f"are known for these backbones: {', '.join(FAMILIES)}. Received: "
            f"a {kind}. `to_lora`, `save_adapter` and its files take any model."
        )
    family = FAMILIES[kind]
    if getattr(root, "vision_encoder", None) is not None:
        # The text half of a vision-language model.
        return dataclasses.replace(family, prefix="model.language_model.layers")
    return family


def module_of(path: str, family: Family) -> tuple[str, str]:
    """Returns the module that a layer is in, and the layer's own name."""
    found = re.fullmatch(rf"(?:.*/)?{family.block}_(\d+)/(?:.*/)?(\w+)", path)
    if found is None or found[2] not in family.modules:
        raise ValueError(
            f"Layer '{path}' is adapted, and has no known counterpart in "
            f"transformers. Those of '{family.block}_0' that have one: "
            f"{', '.join(family.modules)}. Name them, or some of them, in "
            "`target_layer_names` when enabling."
        )
    return f"{family.prefix}.{found[1]}.{family.modules[found[2]]}", found[2]


def paths_in(module: str, paths: dict[str, str], family: Family) -> list[str]:
    """Returns the paths of all layers of a module in order, adapted or not."""
    block = next(iter(paths.values())).rsplit("/", 1)[0]
    return [
        f"{block}/{name}"
        for name, suffix in family.modules.items()
        if module.endswith(f".{suffix}")
    ]
