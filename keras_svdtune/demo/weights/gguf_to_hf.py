"""From a GGUF file to a model that KerasHub loads.

A GGUF file holds quantised matrices, a tokenizer and hyper-parameters, all in
llama.cpp's own conventions. KerasHub reads folders in Hugging Face's layout.
So the file is first rewritten as such a folder, undoing what llama.cpp did:

- matrices are dequantised to float32;
- Llama: the rows of the query and key matrices are put back from llama.cpp's
  order of rotary pairs to Hugging Face's (`unpermute_rope`);
- Gemma: norms are stored as 1 + w, and Hugging Face keeps w;
- the tokenizer is rebuilt from its list of tokens.

KerasHub then converts the weights, and the result is saved as a KerasHub
preset, which loads twice as fast:

    <folder>/backbone/      a KerasHub preset
    <folder>/tokenizer/     the Hugging Face folder, without its weights

(The tokenizer stays in Hugging Face's layout because a KerasHub preset of a
Llama 3 tokenizer does not keep the names of its special tokens.)
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import keras_hub
import numpy as np
from keras_hub.models import CausalLM
from rich.progress import track

from keras_svdtune.demo.optional import require
from keras_svdtune.demo.weights.gguf_tokenizers import (
    Fields,
    write_bpe_tokenizer,
    write_json,
    write_sentencepiece_tokenizer,
)
from keras_svdtune.runtime.types import Json

if TYPE_CHECKING:
    from gguf import ReaderTensor

# GGUF tensor name -> Hugging Face tensor name, inside a block ("blk.3.").
LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_BLOCK = LLAMA_BLOCK | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def convert(file: Path, folder: Path) -> None:
    """Converts a GGUF file into the folder that `load` reads.

    Args:
        file: a GGUF file of the architecture `llama` or `gemma3`.
        folder: is created; it appears only once it is complete.
    """
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    hf = unfinished / "tokenizer"
    hf.mkdir(parents=True)
    config = write_hf_folder(file, hf)
    backbone = keras_hub.models.Backbone.from_preset(
        str(hf),
        # KerasHub's converter of Llama 3 overlooks this value in the config,
        # and its own default is ten times smaller.
        layer_norm_epsilon=config["rms_norm_eps"],
        dtype="float32",
    )
    backbone.save_to_preset(str(unfinished / "backbone"))
    if config["model_type"] == "llama":
        # Nor does a saved Llama backbone say that its embeddings are tied.
        path = unfinished / "backbone" / "config.json"
        preset = json.loads(path.read_text(encoding="utf-8"))
        preset["config"]["tie_word_embeddings"] = True
        write_json(path, preset)
    (hf / "model.safetensors").unlink()
    unfinished.replace(folder)


def load(folder: Path) -> CausalLM:
    """The `keras_hub.models.CausalLM` in a folder that `convert` wrote."""
    models = keras_hub.models
    preprocessor = models.CausalLMPreprocessor.from_preset(
        str(folder / "tokenizer")
    )
    backbone = models.Backbone.from_preset(
        str(folder / "backbone"), dtype="float32"
    )
    for task in (models.Llama3CausalLM, models.Gemma3CausalLM):
        if isinstance(backbone, task.backbone_cls):
            return task(backbone=backbone, preprocessor=preprocessor)
    raise ValueError(f"No CausalLM for {type(backbone).__name__} in {folder}.")


def write_hf_folder(file: Path, folder: Path) -> Json:
    """Rewrites a GGUF file in Hugging Face's layout.

    Args:
        file: the GGUF file.
        folder: gets the config, the tokenizer and the weights.

    Returns:
        The config that was written to `config.json`.
    """
    reader = require("gguf").GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    if architecture == "llama":
        config = llama_config(fields)
        write_bpe_tokenizer(fields, folder)
    elif architecture == "gemma3":
        config = gemma_config(fields)
        write_sentencepiece_tokenizer(fields, folder)
    else:
        raise ValueError(
            "Only GGUF files of the architectures 'llama' and 'gemma3' can be "
            f"converted. Received: {file} of the architecture {architecture!r}."
        )
    write_json(folder / "config.json", config)
    tensors = {}
    for tensor in track(reader.tensors, description="Converting the weights"):
        name, array = hf_tensor(tensor, config)
        tensors[name] = np.ascontiguousarray(array, dtype="float32")
    require("safetensors.numpy").save_file(
        tensors, folder / "model.safetensors", metadata={"format": "np"}
    )
    return config


def hf_tensor(tensor: "ReaderTensor", config: Json) -> tuple[str, np.ndarray]:
    """A tensor of the GGUF file as Hugging Face would store it."""
    gguf = require("gguf")
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    # GGUF lists the innermost dimension first.
    array = array.reshape([int(n) for n in reversed(tensor.shape)])
    gemma = config["model_type"] == "gemma3_text"
    parts = tensor.name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        _, layer, name = parts
        names = GEMMA_BLOCK if gemma else LLAMA_BLOCK
        hf_name = f"model.layers.{layer}.{names[name]}.weight"
    else:
        (name,) = parts
        hf_name = f"{TOP[name]}.weight"
    if gemma and name.endswith("norm"):
        array = array - 1.0
    if not gemma and name in ("attn_q", "attn_k"):
        of = "attention" if name == "attn_q" else "key_value"
        array = unpermute_rope(array, config[f"num_{of}_heads"])
    return hf_name, array


def unpermute_rope(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of a query or key matrix back into Hugging Face's order.

    Rotary embeddings turn pairs of the d numbers of a head. llama.cpp pairs
    neighbours (0, 1), (2, 3), ...; Hugging Face pairs the first half with the
    second, (0, d/2), (1, d/2 + 1), ... So row 2i goes to i, and row 2i + 1 to
    d/2 + i.

    Args:
        matrix: array of shape (heads * d, in).
        heads: int.

    Returns:
        Array of the same shape.
    """
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def llama_config(fields: Fields) -> Json:
    """Hugging Face's config of a Llama model."""
    return _config(fields, "llama") | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
    }


def gemma_config(fields: Fields) -> Json:
    """Hugging Face's config of a Gemma 3 text model."""
    head_dim = fields["gemma3.attention.key_length"]
    layers = fields["gemma3.block_count"]
    return _config(fields, "gemma3") | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": fields["gemma3.attention.sliding_window"],
        # GGUF leaves out what is the same in every Gemma 3: five layers with
        # a sliding window, then one that sees everything.
        "layer_types": [
            "full_attention" if i % 6 == 5 else "sliding_attention"
            for i in range(layers)
        ],
        "rope_theta": fields["gemma3.rope.freq_base"],
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _config(fields: Fields, prefix: str) -> Json:
    epsilon = fields[f"{prefix}.attention.layer_norm_rms_epsilon"]
    return {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields[f"{prefix}.embedding_length"],
        "intermediate_size": fields[f"{prefix}.feed_forward_length"],
        "num_hidden_layers": fields[f"{prefix}.block_count"],
        "num_attention_heads": fields[f"{prefix}.attention.head_count"],
        "num_key_value_heads": fields[f"{prefix}.attention.head_count_kv"],
        "max_position_embeddings": fields[f"{prefix}.context_length"],
        # GGUF keeps a float32, and 9.999999747378752e-06 is 1e-05.
        "rms_norm_eps": float(np.format_float_scientific(np.float32(epsilon))),
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
