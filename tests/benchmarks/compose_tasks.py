"""Two adapters trained on two tasks, and their sum, measured on both.

    python tests/benchmarks/compose_tasks.py --method svf

Task one is the demo's: English small talk, answered by a pirate. Task two is
small talk in Spanish. One adapter is trained on each; `compose` adds the files
up. The table has the loss per answer token on held-out pairs of both tasks, for
the base model, each adapter, and sums of different weights.
"""

import argparse
from pathlib import Path
from typing import Any

import common
import keras
import rich.box
from rich.table import Table

from keras_svdtune import METHODS, compose
from keras_svdtune.demo import chat, fit, pirate, show, train
from keras_svdtune.demo.weights.weights import MODELS, load_model

WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.7, 0.7), (1.0, 1.0)]


def spanish_pairs() -> list[pirate.Pair]:
    """The usable pairs of the Spanish corpus."""
    pairs = []
    for question, answer in dict.fromkeys(pirate.corpus("spanish")):
        question, answer = pirate.tidy(question), pirate.tidy(answer)
        if 3 <= len(answer.split()) <= pirate.LONGEST_ANSWER:
            pairs.append(pirate.Pair(question, answer, answer))
    return pairs


def tasks_for(
    task: Any, name: str, seed: int
) -> dict[str, tuple[chat.Arrays, chat.Arrays]]:
    """Training and held-out arrays of each task."""
    style = chat.format_for(task, name)
    found = {}
    for label, pairs in (
        ("pirate", pirate.pirate_pairs(seed)),
        ("spanish", spanish_pairs()),
    ):
        split = pirate.split(pairs, train.HELD_OUT, seed)
        learnt, held_out = (
            chat.encode(task, style, part, train.LENGTH) for part in split
        )
        found[label] = learnt, held_out
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=[*MODELS], default="smollm2_135m")
    parser.add_argument("--method", choices=[*METHODS], default="svf")
    parser.add_argument("--steps", type=int, default=120, help="a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results"
    )
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    options.results.mkdir(parents=True, exist_ok=True)
    task = load_model(options.model)
    method = train.make_method(options.method)
    rate = method.suggested_learning_rate
    tasks = tasks_for(task, options.model, options.seed)
    fit.prepare(task, rate, options.steps)

    def measure() -> dict[str, float]:
        return {k: fit.evaluate(task, v[1]) for k, v in tasks.items()}

    show.step("Measuring the base model")
    rows = {"base model": measure()}
    files = {}
    for label, (learnt, _) in tasks.items():
        task.backbone.enable_adapter(method)
        fit.prepare(task, rate, options.steps)
        show.step(f"Training {label} on {len(learnt)} pairs")
        fit.train(task, learnt, options.steps, options.seed)
        files[label] = options.results / f"{label}.safetensors"
        task.backbone.save_adapter(files[label])
        task.backbone.remove_adapter()
        fit.prepare(task, rate, options.steps)
    for weights in WEIGHTS:
        parts = dict(zip(files, weights, strict=True))
        label = " + ".join(f"{w:g} {k}" for k, w in parts.items() if w)
        show.step(f"Measuring {label}")
        task.backbone.load_adapter(
            compose({files[k]: w for k, w in parts.items() if w})
        )
        rows[label] = measure()
        task.backbone.remove_adapter()
        fit.prepare(task, rate, options.steps)
    for file in files.values():
        file.unlink()
    machine["load_at_end"] = common.load()
    common.show(table_of(rows, f"{method} on {options.model}", machine))
    common.write_json(
        options.results,
        f"compose_{options.model}_{options.method}",
        {
            "model": options.model,
            "method": str(method),
            "steps": options.steps,
            "learning_rate": rate,
            "machine": machine,
            "held_out_loss": rows,
        },
    )


def table_of(
    rows: dict[str, dict[str, float]], title: str, machine: Any
) -> Table:
    """Loss on both tasks."""
    table = Table(
        title=f"Loss per answer token on held-out pairs: {title}",
        caption=common.describe(machine),
        box=rich.box.HEAVY_HEAD,
    )
    table.add_column("adapter")
    columns = list(rows["base model"])
    for name in columns:
        table.add_column(name, justify="right")
    for label, losses in rows.items():
        table.add_row(label, *(f"{losses[name]:.3f}" for name in columns))
    return table


if __name__ == "__main__":
    main()
