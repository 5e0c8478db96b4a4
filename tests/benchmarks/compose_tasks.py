"""Two adapters trained on two tasks, and their sums, measured on both.

    python tests/benchmarks/compose_tasks.py --method svf

The tasks are two of `study.py`: small talk answered by a pirate, and who of
three people likes what. One adapter is trained on each, as the study does it;
`compose` adds the files up. The table has the test loss of both tasks, and the
share of right names, for the base model, each adapter, and sums of different
weights.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import common
import keras
import rich.box
import study
import study_tasks
from rich.table import Table

from keras_svdtune import compose
from keras_svdtune.demo import chat, show

MODEL = "smollm2_135m"
TASKS = ("pirate", "names")
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.7, 0.7), (1.0, 1.0)]


def measure(
    network: keras.Model, tests: dict[str, chat.Arrays]
) -> dict[str, dict[str, float | None]]:
    """The test loss of each task, and the share of exact answers."""
    found = {}
    for task, examples in tests.items():
        sums, tokens, right = study.scores(network, examples)
        found[task] = {
            "loss": study.rounded(sums.sum() / tokens.sum()),
            "exact": study.rounded(right.mean()),
        }
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--method", default="svf", help="as in study.py; SVF, SVFT, LoRA-XS"
    )
    parser.add_argument("--steps", type=int, default=120, help="a task")
    parser.add_argument("--rate", type=float, default=1.25e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results"
    )
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    tests = {task: study_tasks.data_for(MODEL, task).test for task in TASKS}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for task in TASKS:
            session = study.Session(MODEL, task, options.method, options.seed)
            network = session.network
            if not rows:
                show.step("Measuring the base model")
                rows["base model"] = measure(network, tests)
            show.step(f"Training {task}")
            session.train(options.steps, options.rate)
            files[task] = Path(folder) / f"{task}.safetensors"
            network.backbone.save_adapter(files[task])
        for weights in WEIGHTS:
            parts = dict(zip(files, weights, strict=True))
            label = " + ".join(f"{w:g} {k}" for k, w in parts.items() if w)
            show.step(f"Measuring {label}")
            network.backbone.load_adapter(
                compose({files[k]: w for k, w in parts.items() if w})
            )
            rows[label] = measure(network, tests)
    machine["load_at_end"] = common.load()
    common.show(table_of(rows, f"{options.method} on {MODEL}", machine))
    options.results.mkdir(parents=True, exist_ok=True)
    common.write_json(
        options.results,
        f"compose_{MODEL}_{re.sub('[^a-z0-9]+', '_', options.method)}",
        {
            "model": MODEL,
            "method": options.method,
            "steps": options.steps,
            "learning_rate": options.rate,
            "seed": options.seed,
            "machine": machine,
            "rows": rows,
        },
    )


def table_of(rows: dict[str, Any], title: str, machine: Any) -> Table:
    """Loss and right names of both tasks."""
    table = Table(
        title=f"Held-out loss a token: {title}",
        caption=common.describe(machine),
        box=rich.box.HEAVY_HEAD,
    )
    table.add_column("adapter")
    for name in ("pirate", "names", "right names"):
        table.add_column(name, justify="right")
    for label, tasks in rows.items():
        cells = [f"{tasks[task]['loss']:.3f}" for task in TASKS]
        table.add_row(label, *cells, f"{tasks['names']['exact']:.0%}")
    return table


if __name__ == "__main__":
    main()
