"""The tokenizer inside a GGUF file, in Hugging Face's layout.

A GGUF file lists a tokenizer's tokens in order, with a type each, and either
the merges of a byte-pair tokenizer or the scores of a SentencePiece one. What
else a tokenizer needs is the same for every model of the family.
"""

import json
from pathlib import Path

from keras_svdtune.demo.optional import require
from keras_svdtune.runtime.types import Json

# The hyper-parameters and the tokenizer of a GGUF file, by their keys.
Fields = Json

SPACE = "\u2581"  # what SentencePiece writes for a space


def write_bpe_tokenizer(fields: Fields, folder: Path) -> None:
    """Writes `tokenizer.json` of a byte-pair tokenizer."""
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    control = int(require("gguf").TokenType.CONTROL)
    special = [i for i, kind in enumerate(types) if kind == control]
    tokenizer = {
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True} for i in special
        ],
    }
    write_json(folder / "tokenizer.json", tokenizer)
    names = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
    }
    write_json(folder / "tokenizer_config.json", names)


def write_sentencepiece_tokenizer(fields: Fields, folder: Path) -> None:
    """Writes `tokenizer.model` of a SentencePiece tokenizer."""
    proto = require("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto()
    unknown = fields["tokenizer.ggml.unknown_token_id"]
    listed = zip(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.scores"],
        fields["tokenizer.ggml.token_type"],
        strict=True,
    )
    for i, (token, score, kind) in enumerate(listed):
        # The numbers of the types are SentencePiece's own, but llama.cpp calls
        # the unknown token a control token. It also writes runs of spaces as
        # real spaces.
        kind = proto.ModelProto.SentencePiece.UNKNOWN if i == unknown else kind
        piece = token.replace(" ", SPACE)
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.unk_id = unknown
    trainer.bos_id = fields["tokenizer.ggml.bos_token_id"]
    trainer.eos_id = fields["tokenizer.ggml.eos_token_id"]
    trainer.pad_id = fields["tokenizer.ggml.padding_token_id"]
    for name in ("unk", "bos", "eos", "pad"):
        piece = model.pieces[getattr(trainer, f"{name}_id")].piece
        setattr(trainer, f"{name}_piece", piece)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def write_json(path: Path, content: Json) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
