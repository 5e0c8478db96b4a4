"""Writes a Llama model with random weights as a GGUF file of 100 KB."""

import gguf
import numpy as np

HEADS, KEY_HEADS, HEAD_DIM, HIDDEN, FORWARD = 4, 2, 8, 32, 64


def byte_letters():
    """The letters that byte-level tokenizers write for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = printable + [256 + i for i in range(len(others))]
    return [chr(letter) for letter in letters]


def write_tiny_llama(file):
    """Writes the file, and returns its tensors as llama.cpp orders them."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *byte_letters(), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k": (KEY_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v": (KEY_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (FORWARD, HIDDEN),
        "blk.0.ffn_up": (FORWARD, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FORWARD),
        "output_norm": (HIDDEN,),
    }
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(size=shape).astype("float32")
        for name, shape in shapes.items()
    }
    for name, array in tensors.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
