"""Seconds, FLOPs and memory of one training step, method by method.

    python tests/benchmarks/step_time.py --model gemma3_270m

One step is the forward and backward pass of the backbone (no optimizer, no
logits), compiled by JAX, on the mean square of its output. All candidates
adapt the same layers of the same model: every Dense and EinsumDense of every
block. Two others frame them:

- the frozen floor: nothing trains but one small vector below the first
  block, so that the gradient goes through all activations;
- full fine-tuning.

The candidates take turns: every round runs each of them once, and the table
shows medians over the rounds, so that what else runs on the machine meets all
of them alike. Compare ratios of one run, never seconds of two. CPU seconds
(all threads of the process) are shown too: they hardly depend on the load,
but do not tell how well a step keeps several cores busy.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_svdtune
from keras_svdtune.targets import find_targets

FLOOR = "frozen floor"
LORA = "Keras enable_lora"
FULL = "full fine-tuning"


class Candidate:
    """A compiled step with its arguments; the model may change after it.

    Args:
        name: str.
        backbone: the model, as it is to be trained.
        inputs: what it is called with.
        variables: what trains; None for the model's trainables.
        enable_seconds: how long it took to make the model so.
    """

    def __init__(
        self,
        name: str,
        backbone: Any,
        inputs: Any,
        variables: list[Any] | None = None,
        enable_seconds: float = 0.0,
    ):
        if variables is None:
            variables = backbone.trainable_variables
        self.name = name
        self.enable_seconds = enable_seconds
        self.parameters = sum(int(np.prod(v.shape)) for v in variables)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        trains = {id(v) for v in variables}
        constants = [v for v in backbone.variables if id(v) not in trains]
        self.arguments = (
            [v.value for v in variables],
            [v.value for v in constants],
            inputs,
        )
        step = jax.value_and_grad(_loss(backbone, variables, constants))
        start = time.perf_counter()
        self.step = jax.jit(step).lower(*self.arguments).compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> tuple[float, float]:
        """Runs the step once; returns seconds by the clock and of CPU."""
        cpu, clock = time.process_time(), time.perf_counter()
        jax.block_until_ready(self.step(*self.arguments))
        return time.perf_counter() - clock, time.process_time() - cpu

    def measure(self) -> None:
        """Runs the step once and keeps the seconds."""
        clock, cpu = self.run()
        self.seconds.append(clock)
        self.cpu_seconds.append(cpu)

    def result(self) -> dict[str, Any]:
        """The figures, but for ratios to other candidates."""
        memory = self.step.memory_analysis()
        return {
            "seconds": statistics.median(self.seconds),
            "cpu_seconds": statistics.median(self.cpu_seconds),
            "all_seconds": [round(s, 4) for s in self.seconds],
            "all_cpu_seconds": [round(s, 4) for s in self.cpu_seconds],
            "flops": self.step.cost_analysis()["flops"],
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "trainable_parameters": self.parameters,
            "enable_seconds": self.enable_seconds,
            "compile_seconds": self.compile_seconds,
        }


def _loss(
    backbone: Any, variables: list[Any], constants: list[Any]
) -> Callable[..., Any]:
    order = [id(v) for v in [*variables, *constants]]
    trainables = [order.index(id(v)) for v in backbone.trainable_variables]
    others = [order.index(id(v)) for v in backbone.non_trainable_variables]

    def loss(values: list[Any], constants: list[Any], inputs: Any) -> Any:
        state = [*values, *constants]
        outputs, _, losses = backbone.stateless_call(
            [state[i] for i in trainables],
            [state[i] for i in others],
            inputs,
            training=True,
            return_losses=True,
        )
        return (outputs**2).mean() + sum(losses)

    return loss


def candidates(
    backbone: Any, inputs: Any, methods: dict[str, Any], rank: int
) -> tuple[list[Candidate], dict[str, str]]:
    """Compiles all candidates, one after the other, on one model.

    Returns:
        The candidates, and why a method is left out.
    """
    found = [
        Candidate(FLOOR, backbone, inputs, [_first_vector(backbone)]),
        Candidate(FULL, backbone, inputs),
    ]
    left_out = {}
    for name, method in track(methods.items(), "Enabling and compiling"):
        start = time.perf_counter()
        try:
            keras_svdtune.enable_adapter(backbone, method)
        except ValueError as error:
            left_out[name] = str(error)
            continue
        seconds = time.perf_counter() - start
        label = method.title
        if hasattr(method, "rank"):
            label += f" (rank {method.rank})"
        if ":" in name:
            label += f" {name.partition(':')[2]}"
        found.append(Candidate(label, backbone, inputs, enable_seconds=seconds))
        keras_svdtune.remove_adapter(backbone)
    # Last, since it cannot be taken back.
    layers = find_targets(backbone).values()
    start = time.perf_counter()
    backbone.enable_lora(rank, sorted({x.name for x in layers}))
    seconds = time.perf_counter() - start
    lora = Candidate(
        f"{LORA}({rank})", backbone, inputs, enable_seconds=seconds
    )
    found.insert(1, lora)
    return found, left_out


def _first_vector(backbone: Any) -> Any:
    """The first norm scale (or bias): below every matrix but embeddings."""
    return next(v for v in backbone.trainable_variables if len(v.shape) == 1)


def measure(found: list[Candidate], rounds: int) -> None:
    """Runs every candidate once a round, after one round to warm up."""
    for candidate in found:
        candidate.run()
    for i in track(range(rounds), "Measuring", disable=not rounds):
        # Another order each time: what follows what should not matter.
        for candidate in found[i % len(found) :] + found[: i % len(found)]:
            candidate.measure()


def with_ratios(results: dict[str, dict[str, Any]]) -> None:
    """Adds the ratios to `enable_lora` and to the floor."""
    lora = next(r for name, r in results.items() if name.startswith(LORA))
    for result in results.values():
        for key in ("seconds", "cpu_seconds", "flops", "temp_bytes"):
            result[f"{key}_to_lora"] = result[key] / lora[key]
        result["seconds_to_floor"] = (
            result["seconds"] / results[FLOOR]["seconds"]
        )


def table_of(results: dict[str, dict[str, Any]], title: str, note: str) -> Any:
    """The results as a table."""
    table = Table(title=title, caption=note)
    table.add_column("", no_wrap=True)
    for column in (
        "s / step",
        "min - max",
        "to enable_lora",
        "to floor",
        "CPU s",
        "to enable_lora",
        "GFLOP",
        "temp MB",
        "trainable",
        "s to enable",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['seconds']:.3g}",
            f"{min(r['all_seconds']):.3g} - {max(r['all_seconds']):.3g}",
            f"{r['seconds_to_lora']:.2f}",
            f"{r['seconds_to_floor']:.2f}",
            f"{r['cpu_seconds']:.3g}",
            f"{r['cpu_seconds_to_lora']:.2f}",
            f"{r['flops'] / 1e9:.3g}",
            f"{r['temp_bytes'] / 1e6:.4g}",
            f"{r['trainable_parameters']:,}",
            f"{r['enable_seconds']:.1f}" if r["enable_seconds"] else "-",
        )
    return table


def plot(
    results: dict[str, dict[str, Any]], title: str, note: str, path: Path
) -> None:
    """Draws seconds per step as bars, shortest on top."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted(results, key=lambda name: -results[name]["seconds"])
    floor = results[FLOOR]["seconds"]
    lora = next(r["seconds"] for n, r in results.items() if n.startswith(LORA))
    figure, axes = pyplot.subplots(
        figsize=(8, 1.6 + 0.36 * len(names)), layout="constrained"
    )
    for i, name in enumerate(names):
        r = results[name]
        framed = name in (FLOOR, FULL) or name.startswith(LORA)
        axes.barh(
            i,
            r["seconds"],
            height=0.66,
            color="#b0b7c0" if framed else "#2f6db3",
        )
        low, high = min(r["all_seconds"]), max(r["all_seconds"])
        axes.plot([low, high], [i, i], color="#222222", linewidth=1)
        axes.annotate(
            f"{r['seconds_to_lora']:.2f}",
            (max(high, r["seconds"]), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    for x, text in ((floor, "floor"), (lora, "enable_lora")):
        axes.axvline(x, color="#c0392b", linewidth=1, linestyle="--")
        axes.annotate(
            text,
            (x, len(names) - 0.45),
            xytext=(0, 1),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color="#c0392b",
            fontsize=9,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, max(max(r["all_seconds"]) for r in results.values()) * 1.1)
    axes.set_xlabel(
        "seconds per step: bar = median, line = fastest to slowest,\n"
        f"number = ratio to Keras enable_lora\n{note}",
        fontsize=9,
    )
    axes.set_title(title, pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens each")
    parser.add_argument("--steps", type=int, default=7, help="rounds")
    options = parser.parse_args()
    common.require_jax()
    keras.config.disable_interactive_logging()  # one progress bar is enough
    machine = common.machine()
    methods, left_out = common.methods_for(options.methods, options.rank)
    backbone = common.load_backbone(options.model)
    shape = (options.batch, options.length)
    vocabulary = backbone.token_embedding.input_dim
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape)
    inputs = {
        "token_ids": jax.numpy.asarray(tokens, "int32"),
        "padding_mask": jax.numpy.ones(shape, "int32"),
    }
    n_layers = len(find_targets(backbone))
    found, unfit = candidates(backbone, inputs, methods, options.rank)
    left_out |= unfit
    measure(found, options.steps)
    results = {c.name: c.result() for c in found}
    with_ratios(results)
    machine["load_at_end"] = common.load()
    title = (
        f"One step of {options.model}: {n_layers} matrices, "
        f"{options.batch} x {options.length} tokens, float32"
    )
    note = common.describe(machine)
    common.show(table_of(results, title, f"{note}, {options.steps} rounds"))
    for name, reason in left_out.items():
        Console().print(f"Left out: {name} ({reason})")
    name = f"step_time_{options.model}"
    common.write_json(
        options.results,
        name,
        {
            "model": options.model,
            "matrices": n_layers,
            "batch": options.batch,
            "length": options.length,
            "dtype": backbone.dtype_policy.name,
            "rounds": options.steps,
            "machine": machine,
            "left_out": left_out,
            "results": results,
        },
    )
    plot(results, title, note, options.results / f"{name}.png")


if __name__ == "__main__":
    main()
