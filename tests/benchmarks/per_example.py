"""What an adapter for each row of a batch costs, against one for all rows.

    python tests/benchmarks/per_example.py --model smollm2_135m

A model has as many named adapters as a batch has rows. `predict` runs with the
first of them set, and with another one for each row (`adapter_per_example`),
in turns: the table shows medians over the rounds, and their ratio.
"""

import statistics
import time
from typing import Any

import common
import keras
from generation import perturb
from rich.progress import track
from rich.table import Table
from steps import random_tokens

import keras_svdtune

LENGTH = 64  # tokens of a row
METHODS = ["svf", "svft", "lora_xs", "lora", "pissa", "milora"]


def measure(
    backbone: Any, method: keras_svdtune.Method, rows: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of `predict` with one adapter and with one for each row."""
    names = [f"adapter_{i}" for i in range(rows)]
    for seed, name in enumerate(names):
        backbone.enable_adapter(method, name=name)
        perturb(backbone, seed)
    inputs = random_tokens(backbone.vocabulary_size, rows, LENGTH)

    def run() -> float:
        start = time.perf_counter()
        backbone.predict(inputs, batch_size=rows, verbose=0)
        return time.perf_counter() - start

    found: dict[str, list[float]] = {"one": [], "each": []}
    for number in range(rounds + 1):
        backbone.set_adapter(names[0])
        run()  # after a change of functions
        one = [run(), run()]
        with keras_svdtune.adapter_per_example(backbone, names):
            run()
            each = [run(), run()]
        if number:
            found["one"] += one
            found["each"] += each
    backbone.remove_adapter()
    return found


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.set_defaults(model="smollm2_135m")
    parser.add_argument("--rows", type=int, default=8, help="and adapters")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    methods, left_out = common.methods_for(
        options.methods or METHODS, options.rank
    )
    if left_out:
        raise SystemExit(str(left_out))
    backbone = common.load_backbone(options.model)
    results = {}
    for spec, method in track(methods.items(), "Methods"):
        seconds = measure(backbone, method, options.rows, options.rounds)
        medians = {k: statistics.median(v) for k, v in seconds.items()}
        results[common.label_of(spec, method)] = {
            "ratio": medians["each"] / medians["one"],
            "seconds": medians,
            "all_seconds": {
                k: [round(x, 4) for x in v] for k, v in seconds.items()
            },
        }
    machine["load_at_end"] = common.load()
    table = Table(title=f"predict, {options.rows} rows of {LENGTH} tokens")
    for column in ("", "one for all, s", "one for each, s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for label, row in results.items():
        table.add_row(
            label,
            f"{row['seconds']['one']:.3f}",
            f"{row['seconds']['each']:.3f}",
            f"{row['ratio']:.2f}",
        )
    common.show(table)
    print(common.describe(machine))
    common.write_json(
        options.results,
        f"per_example_{options.model}_{keras.backend.backend()}",
        {
            "model": options.model,
            "rows": options.rows,
            "tokens": LENGTH,
            "machine": machine,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
