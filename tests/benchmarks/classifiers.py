"""A race of ways to fine-tune one classifier, through `compile` and `fit`.

Every row starts from the same weights and head, sees the same batches in the
same order for as many epochs, and trains its head beside its adapter, at one
learning rate for both. Each rate of a row is tried; the one with the best
accuracy on the validation part is measured, once, on the test part. Then the
file that was saved is loaded into a fresh model with the same head, which is
measured too.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import keras
import numpy as np
from rich.progress import track
from rich.table import Table

import keras_svdtune


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to fine-tune.

    Attributes:
        name: str.
        enable: makes a fresh task trainable in this way.
        rates: the learning rates to try.
        save: writes what was learned, but for the head; None if nothing.
        load: enables it on a fresh task, from the folder that `save` wrote to.
    """

    name: str
    enable: Callable[[Any], None]
    rates: tuple[float, ...]
    save: Callable[[Any, Path], None] | None = None
    load: Callable[[Any, Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Inputs and labels of a training, validation or test part."""

    x: Any
    y: np.ndarray


def adapter_row(method: keras_svdtune.Method, rates: tuple[float, ...]) -> Row:
    """A row for a method of ours, on every matrix of the backbone."""
    rank = f", rank {method.rank}" if hasattr(method, "rank") else ""
    return Row(
        f"{method.title}{rank}",
        lambda task: task.backbone.enable_adapter(method),
        rates,
        lambda task, folder: task.backbone.save_adapter(
            folder / "adapter.safetensors"
        ),
        lambda task, folder: task.backbone.load_adapter(
            folder / "adapter.safetensors"
        ),
    )


def head_only(task: Any) -> None:
    """Freezes the backbone, as Keras does it."""
    task.backbone.trainable = False


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch, and the mean loss of each."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.losses.append(float(logs["loss"]))


def run_row(
    row: Row,
    build: Callable[[], Any],
    parts: dict[str, Part],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Trains a row at each of its rates, and measures the best."""
    keras.utils.set_random_seed(options.seed)
    task = build()
    row.enable(task)
    compile_task(task)
    task.optimizer.build(task.trainable_variables)
    state = [*task.variables, *task.optimizer.variables]
    start = values_of(state)
    tried: dict[str, Any] = {}
    best: tuple[float, float] | None = None
    for rate in track(row.rates, row.name):
        restore(state, start)
        task.optimizer.learning_rate = rate
        keras.utils.set_random_seed(options.seed)
        clock = Clock()
        task.fit(
            parts["train"].x,
            parts["train"].y,
            batch_size=options.batch,
            epochs=options.epochs,
            callbacks=[clock],
            verbose=0,
        )
        loss, accuracy = measure(task, parts["validation"], options.batch)
        tried[f"{rate:g}"] = {
            "training_losses": clock.losses,
            "seconds": clock.seconds,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
        }
        # Of two rates with the same accuracy, the one with the lower loss.
        score = (accuracy, -loss)
        if best is None or score > best:
            best, best_rate, learned = score, rate, values_of(state)
    restore(state, learned)
    loss, accuracy = measure(task, parts["test"], options.batch)
    size, reloaded = None, None
    if row.save is not None and row.load is not None:
        with tempfile.TemporaryDirectory() as folder:
            row.save(task, Path(folder))
            size = sum(x.stat().st_size for x in Path(folder).iterdir())
            head = [keras.ops.copy(v.value) for v in head_of(task)]
            keras.backend.clear_session(free_memory=False)
            keras.utils.set_random_seed(options.seed)
            fresh = build()
            row.load(fresh, Path(folder))
        restore(head_of(fresh), head)
        compile_task(fresh)
        _, reloaded = measure(fresh, parts["test"], options.batch)
    adapter = count(task.backbone.trainable_variables)
    # The first epoch compiles.
    later = [s for x in tried.values() for s in x["seconds"][1:]]
    return {
        "adapter_parameters": adapter,
        "head_parameters": count(task.trainable_variables) - adapter,
        "best_rate": best_rate,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "test_accuracy_reloaded": reloaded,
        "seconds_per_epoch": float(np.median(later)) if later else None,
        "file_bytes": size,
        "tried": tried,
    }


def compile_task(task: Any) -> None:
    """Compiles it; the learning rate is set later."""
    task.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def head_of(task: Any) -> list[Any]:
    """What the task has beside its backbone."""
    inside = {id(v) for v in task.backbone.variables}
    return [v for v in task.weights if id(v) not in inside]


def measure(task: Any, part: Part, batch: int) -> tuple[float, float]:
    """Loss and accuracy on a part."""
    found = task.evaluate(
        part.x, part.y, batch_size=batch, verbose=0, return_dict=True
    )
    return float(found["loss"]), float(found["accuracy"])


def count(variables: Any) -> int:
    """How many numbers they hold."""
    return sum(int(np.prod(v.shape)) for v in variables)


def values_of(variables: list[Any]) -> list[np.ndarray]:
    """A copy of each value."""
    return [keras.ops.convert_to_numpy(v.value).copy() for v in variables]


def restore(variables: list[Any], values: list[np.ndarray]) -> None:
    """Gives each variable its value."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def split(n: int, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Disjoint random indices below `n`, of these sizes."""
    if sum(sizes.values()) > n:
        raise SystemExit(f"There are only {n} examples, not {sizes}.")
    order = np.random.default_rng(seed).permutation(n)
    ends = np.cumsum(list(sizes.values()))
    return dict(zip(sizes, np.split(order, ends)[:-1], strict=True))


def parser(description: str, epochs: int, batch: int) -> Any:
    """A command line with the options that both classifiers have."""
    found = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument(
        "--tiny", action="store_true", help="random weights, few data"
    )
    found.add_argument("--epochs", type=int, default=epochs)
    found.add_argument("--batch", type=int, default=batch)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for what is written",
    )
    return found


def race(
    name: str,
    title: str,
    rows: list[Row],
    build: Callable[[], Any],
    parts: dict[str, Part],
    options: argparse.Namespace,
    **more: Any,
) -> None:
    """Runs all rows, shows the table and writes the JSON file.

    Args:
        name: str, of the file.
        title: str, of the table.
        rows: what to compare.
        build: makes the task; the weights may be random, the seed is set.
        parts: `train`, `validation` and `test`.
        options: of the command line.
        **more: what else goes into the file.
    """
    keras.config.disable_interactive_logging()
    machine = common.machine()
    results = {x.name: run_row(x, build, parts, options) for x in rows}
    machine["load_at_end"] = common.load()
    sizes = {k: len(v.y) for k, v in parts.items()}
    common.show(table_of(results, title, machine, sizes, options))
    common.write_json(
        options.results,
        f"{name}_tiny" if options.tiny else name,
        {
            "title": title,
            "examples": sizes,
            "epochs": options.epochs,
            "batch": options.batch,
            "seed": options.seed,
            "machine": machine,
            "rows": results,
            **more,
        },
    )


def table_of(
    results: dict[str, Any],
    title: str,
    machine: dict[str, Any],
    sizes: dict[str, int],
    options: argparse.Namespace,
) -> Table:
    """The results as a table."""
    parts = ", ".join(f"{n:,} {k}" for k, n in sizes.items())
    table = Table(
        title=title,
        caption=f"{parts}, {options.epochs} epochs of batches of "
        f"{options.batch}, seed {options.seed}; {common.describe(machine)}",
    )
    table.add_column("", no_wrap=True)
    for column in (
        *("adapter", "head", "best rate", "of", "validation"),
        *("test", "reloaded", "s / epoch", "file, KiB"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        best = r["tried"][f"{r['best_rate']:g}"]
        table.add_row(
            name,
            f"{r['adapter_parameters']:,}",
            f"{r['head_parameters']:,}",
            f"{r['best_rate']:g}",
            " ".join(r["tried"]),
            f"{best['validation_accuracy']:.1%}",
            f"{r['test_accuracy']:.1%}",
            _or_dash(r["test_accuracy_reloaded"], ".1%"),
            _or_dash(r["seconds_per_epoch"], ".1f"),
            _or_dash(r["file_bytes"] and r["file_bytes"] / 1024, ",.0f"),
        )
    return table


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
