"""The converter, on a GGUF file of a few kilobytes."""

import json

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from tiny_llama_gguf import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    write_tiny_llama,
)

from keras_svdtune.demo.weights import gguf_to_hf  # noqa: E402


def rotated(head, position, pairs):
    """A head's numbers, turned in `pairs` as rotary embeddings do."""
    out = head.copy()
    for i, (a, b) in enumerate(pairs):
        angle = position / 10000 ** (2 * i / len(head))
        out[a] = head[a] * np.cos(angle) - head[b] * np.sin(angle)
        out[b] = head[b] * np.cos(angle) + head[a] * np.sin(angle)
    return out


def test_unpermuted_queries_and_keys_score_the_same():
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, HEADS * HEAD_DIM, HIDDEN))
    x = random.normal(size=HIDDEN)
    half = HEAD_DIM // 2
    neighbours = [(2 * i, 2 * i + 1) for i in range(half)]
    halves = [(i, half + i) for i in range(half)]

    def scores(query, key, pairs):
        q, k = ((m @ x).reshape(HEADS, HEAD_DIM) for m in (query, key))
        return [
            rotated(a, 5, pairs) @ rotated(b, 2, pairs)
            for a, b in zip(q, k, strict=True)
        ]

    np.testing.assert_allclose(
        scores(
            gguf_to_hf.unpermute_rope(query, HEADS),
            gguf_to_hf.unpermute_rope(key, HEADS),
            halves,
        ),
        scores(query, key, neighbours),
    )


def test_unpermute_moves_whole_rows():
    rows = np.arange(16.0)[:, None]
    moved = gguf_to_hf.unpermute_rope(rows, heads=2)[:, 0]
    assert moved.tolist() == [
        0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A GGUF file, and the tensors in it as llama.cpp orders them."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_tiny_llama(file)


def test_tiny_llama_in_kerashub(tiny_llama, tmp_path):
    file, tensors = tiny_llama
    gguf_to_hf.convert(file, tmp_path / "converted")
    task = gguf_to_hf.load(tmp_path / "converted")
    backbone = task.backbone
    # What KerasHub's own converter and its presets lose.
    assert backbone.layer_norm_epsilon == 1e-5
    assert backbone.tie_word_embeddings
    assert not list(tmp_path.rglob("model.safetensors"))

    layer = backbone.get_layer("transformer_layer_0")
    gate = np.asarray(layer._feedforward_gate_dense.kernel)
    np.testing.assert_array_equal(gate, tensors["blk.0.ffn_gate"].T)
    query = np.asarray(layer._self_attention_layer._query_dense.kernel)
    np.testing.assert_array_equal(
        query.reshape(HIDDEN, -1).T,
        gguf_to_hf.unpermute_rope(tensors["blk.0.attn_q"], HEADS),
    )
    tokenizer = task.preprocessor.tokenizer
    assert np.asarray(tokenizer("ab<|im_end|>a")).tolist() == [
        259,
        2,
        ord("a") - 30,
    ]
    assert (tokenizer.start_token_id, tokenizer.end_token_id) == (1, 2)


def test_an_interrupted_conversion_starts_over(tiny_llama, tmp_path):
    file, _ = tiny_llama
    (tmp_path / "converted.part" / "tokenizer").mkdir(parents=True)
    (tmp_path / "converted.part" / "rubbish").touch()
    gguf_to_hf.convert(file, tmp_path / "converted")
    assert sorted(p.name for p in (tmp_path / "converted").iterdir()) == [
        "backbone",
        "tokenizer",
    ]


def test_another_architecture_is_refused(tmp_path):
    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'mamba'"):
        gguf_to_hf.write_hf_folder(file, tmp_path)


def test_gemma_norms_and_layer_pattern():
    class Tensor:
        name = "blk.5.post_ffw_norm.weight"
        tensor_type = gguf.GGMLQuantizationType.F32
        shape = (3,)
        data = np.array([1.0, 1.5, 0.0], "float32")

    name, array = gguf_to_hf.hf_tensor(Tensor, {"model_type": "gemma3_text"})
    assert name == "model.layers.5.post_feedforward_layernorm.weight"
    assert array.tolist() == [0.0, 0.5, -1.0]


def test_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "  ",
        "\u2581",
        "a",
        "\u2581a",
    ]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    fields = {
        "tokenizer.ggml.tokens": tokens + raw,
        "tokenizer.ggml.scores": [0] * 5 + [-3.0, -2.0, -1.0] + [0] * 256,
        "tokenizer.ggml.token_type": [3] * 4 + [4, 1, 1, 1] + [6] * 256,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    gguf_to_hf.write_sentencepiece_tokenizer(fields, tmp_path)
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizer.model")
    )
    assert model.encode("a a  a") == [6, 7, 4, 6]
    assert model.decode([6, 7, 4, 6]) == "a a  a"
    assert model.encode("z") == [len(tokens) + ord("z")]  # a byte
    assert (model.pad_id(), model.eos_id(), model.bos_id()) == (0, 1, 2)


def test_configs_are_json(tiny_llama, tmp_path):
    config = gguf_to_hf.write_hf_folder(tiny_llama[0], tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert config["rms_norm_eps"] == 1e-5
    assert config["num_key_value_heads"] == KEY_HEADS
