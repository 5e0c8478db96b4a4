"""What an adapter on a bank of experts costs in a training step.

    python tests/benchmarks/bank_cost.py

One layer of experts as Mixtral has it (KerasHub's, which computes every
expert for every token) on a norm, forward and backward, compiled by JAX.
Experts compute with the merged kernel. Forming it costs the same whatever the
number of tokens; its gradient, which a frozen layer does not need, is a third
product of the size of the layer's own, and grows with them. Every
candidate trains the norm's scale too, so that the gradient goes through the
layer in all of them; the frozen floor trains nothing else.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import common
import keras
import numpy as np
import step_time
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts
from rich.progress import track
from rich.table import Table

import keras_svdtune

FLOOR = "frozen floor"


def experts(hidden: int, intermediate: int, count: int) -> keras.Model:
    """A norm and one layer of experts, on tokens."""
    x = keras.Input((hidden,))
    y = keras.layers.LayerNormalization(center=False, name="norm")(x)
    y = MixtralMoeExperts(count, hidden, intermediate, name="experts")(y)
    return keras.Model(x, y, name="bank")


def measure(
    model: keras.Model, tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """All candidates on so many tokens."""
    random = np.random.default_rng(0)
    shape = (tokens, model.input_shape[-1])
    inputs = random.standard_normal(shape).astype("float32")
    scale = model.get_layer("norm").gamma
    found = [step_time.candidate(FLOOR, model, inputs, [scale])]
    for method in (
        keras_svdtune.LoRA(rank=options.rank),
        keras_svdtune.PiSSA(rank=options.rank),
        keras_svdtune.SVF(),
    ):
        keras_svdtune.enable_adapter(model, method)
        variables = [*model.trainable_variables, scale]
        label = common.label_of("", method)
        found.append(step_time.candidate(label, model, inputs, variables))
        keras_svdtune.remove_adapter(model)
    for candidate in found:
        candidate.step()
    for i in track(range(options.steps), f"{tokens} tokens"):
        for candidate in found[i % len(found) :] + found[: i % len(found)]:
            candidate.measure()
    results = {c.name: c.result() for c in found}
    floor = results[FLOOR]
    for result in results.values():
        for key in ("seconds", "cpu_seconds", "flops", "temp_bytes"):
            result[f"{key}_to_floor"] = result[key] / floor[key]
    gc.collect()
    return results


def table_of(results: dict[int, Any], title: str, note: str) -> Table:
    """The results as a table."""
    table = Table(title=title, caption=note)
    table.add_column("tokens", justify="right")
    table.add_column("", no_wrap=True)
    for column in (
        *("s / step", "to floor", "CPU s", "to floor"),
        *("GFLOP", "to floor", "temp MB", "to floor"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for tokens, rows in results.items():
        for i, (name, r) in enumerate(rows.items()):
            table.add_row(
                f"{tokens:,}" if i == 0 else "",
                name,
                f"{r['seconds']:.3g}",
                f"{r['seconds_to_floor']:.2f}",
                f"{r['cpu_seconds']:.3g}",
                f"{r['cpu_seconds_to_floor']:.2f}",
                f"{r['flops'] / 1e9:.4g}",
                f"{r['flops_to_floor']:.2f}",
                f"{r['temp_bytes'] / 1e6:.4g}",
                f"{r['temp_bytes_to_floor']:.2f}",
            )
        table.add_section()
    return table


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="rounds")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results"
    )
    options = parser.parse_args()
    common.require_jax()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    size = (options.hidden, options.intermediate, options.experts)
    model = experts(*size)
    results = {n: measure(model, n, options) for n in options.tokens}
    machine["load_at_end"] = common.load()
    title = (
        f"One step of {options.experts} experts of {options.hidden} x "
        f"{options.intermediate}, float32"
    )
    note = f"{common.describe(machine)}, {options.steps} rounds"
    common.show(table_of(results, title, note))
    common.write_json(
        options.results,
        "bank_cost",
        {
            "hidden": options.hidden,
            "intermediate": options.intermediate,
            "experts": options.experts,
            "rank": options.rank,
            "rounds": options.steps,
            "machine": machine,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
