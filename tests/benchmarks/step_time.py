"""Seconds, FLOPs and memory of one training step, method by method.

    python tests/benchmarks/step_time.py --model gemma3_270m

All candidates adapt the same layers of the same model: every Dense and
EinsumDense of every block. Others frame them:

- the frozen floor: nothing trains but one small vector below the first
  block, so that the gradient goes through all activations;
- Keras' `enable_lora` and full fine-tuning;
- with `--peft` (on torch), PEFT's methods on the same weights in transformers,
  with a frozen floor of their own.

`--model 2048x16384` is a single Dense layer of that shape, with random weights,
on a norm. `steps.py` says what a step is. `compare.py` runs this for several
models and backends.

The candidates take turns: every round runs each of them once, and the table
shows medians over the rounds, so that what else runs on the machine meets all
of them alike. Compare ratios of one run, never seconds of two. CPU seconds
(all threads of the process) are shown too: they hardly depend on the load,
but do not tell how well a step keeps several cores busy. `peak` is the most
resident memory during a step, above what there was before it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import keras
import numpy as np
import peft_rows
from compare import COLUMNS, cell
from rich.console import Console
from rich.progress import track
from rich.table import Table
from steps import random_tokens, step_of

import keras_svdtune

FLOOR = "frozen floor"
LORA = "Keras enable_lora"
FULL = "full fine-tuning"
RATIOS = ("seconds", "cpu_seconds", "flops", "temp_bytes", "peak_bytes")


class Candidate:
    """A step with its figures; the model may change after it is made.

    Args:
        name: str.
        make_step: function that gives the step, a function without arguments
            that has `figures()`.
        enable_seconds: how long it took to make the model so; None if nothing
            was done.
        parameters: how many numbers train.
        file_bytes: the size of the file that keeps them.
    """

    def __init__(
        self,
        name: str,
        make_step: Callable[[], Any],
        enable_seconds: float | None = None,
        parameters: int | None = None,
        file_bytes: int | None = None,
    ):
        self.name = name
        start = time.perf_counter()
        self.step = make_step()
        self.known = {
            "compile_seconds": time.perf_counter() - start,
            "enable_seconds": enable_seconds,
            "trainable_parameters": parameters,
            "file_bytes": file_bytes,
            **self.step.figures(),
        }
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peaks: list[int] = []

    def measure(self) -> None:
        """Runs the step once and keeps the figures."""
        before = common.rss_bytes()
        common.restart_peak()
        cpu, clock = time.process_time(), time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - clock)
        self.cpu_seconds.append(time.process_time() - cpu)
        peak = common.peak_bytes()
        if before is not None and peak is not None:
            self.peaks.append(max(peak - before, 0))

    def result(self) -> dict[str, Any]:
        """The figures, but for ratios to other candidates."""
        return {
            "seconds": statistics.median(self.seconds),
            "cpu_seconds": statistics.median(self.cpu_seconds),
            "all_seconds": [round(s, 4) for s in self.seconds],
            "all_cpu_seconds": [round(s, 4) for s in self.cpu_seconds],
            "peak_bytes": statistics.median(self.peaks) if self.peaks else None,
            **self.known,
        }


def candidate(
    name: str,
    model: Any,
    inputs: Any,
    variables: list[Any] | None = None,
    **known: Any,
) -> Candidate:
    """A candidate of Keras, as the model is now.

    Args:
        variables: what trains; None for the model's trainables.
        **known: what is known of it, see `Candidate`.
    """
    if variables is None:
        variables = model.trainable_variables
    known["parameters"] = common.trained_numbers(variables)
    return Candidate(name, lambda: step_of(model, inputs, variables), **known)


def candidates(
    load: Callable[[], Any],
    inputs: Any,
    methods: dict[str, Any],
    rank: int,
) -> tuple[list[Candidate], dict[str, str]]:
    """Builds all candidates, one after the other.

    Args:
        load: gives the model. On torch, where a step is the model itself and
            nothing compiled, it is called for every candidate.

    Returns:
        The candidates, and why a method is left out.
    """
    shared = load()
    fresh = keras.backend.backend() == "torch"
    left_out = {}

    def model() -> Any:
        if not fresh:
            return shared
        one = load()
        # No step changes a weight, so all can have the same.
        for ours, theirs in zip(one.variables, shared.variables, strict=True):
            ours.value.data = theirs.value.data
        return one

    found = [candidate(FLOOR, one := model(), inputs, [_first_vector(one)])]
    for name, method in track(methods.items(), "Enabling and compiling"):
        one = model()
        start = time.perf_counter()
        try:
            keras_svdtune.enable_adapter(one, method)
        except ValueError as error:
            left_out[name] = str(error)
            continue
        seconds = time.perf_counter() - start
        size = _file_bytes(lambda path: keras_svdtune.save_adapter(one, path))  # noqa: B023
        found.append(
            candidate(
                common.label_of(name, method),
                one,
                inputs,
                enable_seconds=seconds,
                file_bytes=size,
            )
        )
        if not fresh:
            keras_svdtune.remove_adapter(one)
    one = model()
    size = _file_bytes(one.save_weights, ".weights.h5")
    found.insert(1, candidate(FULL, one, inputs, file_bytes=size))
    # Last, since it cannot be taken back.
    one = model()
    start = time.perf_counter()
    saves = _enable_lora(one, rank)
    seconds = time.perf_counter() - start
    lora = candidate(
        f"{LORA}({rank})",
        one,
        inputs,
        enable_seconds=seconds,
        file_bytes=_file_bytes(one.save_lora_weights, ".lora.h5")
        if saves
        else None,
    )
    found.insert(1, lora)
    return found, left_out


def _targets(model: Any) -> list[str]:
    """The name of the layer of every matrix."""
    layers = keras_svdtune.estimate(model, keras_svdtune.LoRA(rank=1)).layers
    return [x.path.rpartition("/")[2] for x in layers]


def _enable_lora(model: Any, rank: int) -> bool:
    """Keras' LoRA on every target; whether the model can save it."""
    names = _targets(model)
    if hasattr(model, "enable_lora"):
        model.enable_lora(rank, sorted(set(names)))
        return True
    for layer in model.layers:
        layer.trainable = layer.name in names
        if layer.trainable:
            layer.enable_lora(rank)
    return False


def _file_bytes(save: Callable[[str], None], ending: str = "") -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (
            f"file{ending}" if ending else "file.safetensors"
        )
        save(str(path))
        return path.stat().st_size


def _first_vector(model: Any) -> Any:
    """The first norm scale (or bias): below every matrix but embeddings."""
    return next(v for v in model.trainable_variables if len(v.shape) == 1)


def measure(found: list[Candidate], rounds: int) -> None:
    """Runs every candidate once a round, after one round to warm up."""
    for one in found:
        one.step()
    for i in track(range(rounds), "Measuring", disable=not rounds):
        # Another order each time: what follows what should not matter.
        for one in found[i % len(found) :] + found[: i % len(found)]:
            one.measure()


def with_ratios(results: dict[str, dict[str, Any]]) -> None:
    """Adds the ratios to `enable_lora` and to the floor."""
    lora = next(r for name, r in results.items() if name.startswith(LORA))
    for name, result in results.items():
        for key in RATIOS:
            if result.get(key) and lora.get(key):
                result[f"{key}_to_lora"] = result[key] / lora[key]
        theirs = name.startswith(peft_rows.PREFIX)
        floor = results[peft_rows.FLOOR if theirs else FLOOR]
        result["seconds_to_floor"] = result["seconds"] / floor["seconds"]


def table_of(results: dict[str, dict[str, Any]], title: str, note: str) -> Any:
    """The results as a table."""
    table = Table(title=title, caption=note)
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, row in results.items():
        table.add_row(name, *(cell(row, column) for column in COLUMNS))
    return table


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens each")
    parser.add_argument("--steps", type=int, default=7, help="rounds")
    parser.add_argument("--peft", action="store_true", help="PEFT too (torch)")
    options = parser.parse_args()
    keras.config.disable_interactive_logging()  # one progress bar is enough
    keras_svdtune.set_decomposition_cache(False)  # every enabling from nothing
    machine = common.machine()
    methods, left_out = common.methods_for(options.methods, options.rank)
    model = common.load_backbone(options.model)
    shape = (options.batch, options.length)
    if isinstance(model, keras.Sequential):
        random = np.random.default_rng(0)
        inputs = random.standard_normal((*shape, model.input_shape[-1]))
        inputs = inputs.astype("float32")
    else:
        inputs = random_tokens(model.token_embedding.input_dim, *shape)
    n_layers, dtype = len(_targets(model)), model.dtype_policy.name
    del model
    found, unfit = candidates(
        lambda: common.load_backbone(options.model),
        inputs,
        methods,
        options.rank,
    )
    left_out |= unfit
    if options.peft:
        found += peft_rows.candidates(options.model, inputs, options.rank)
    measure(found, options.steps)
    results = {c.name: c.result() for c in found}
    with_ratios(results)
    machine["load_at_end"] = common.load()
    title = (
        f"One step of {options.model}: {n_layers} matrices, "
        f"{options.batch} x {options.length} tokens, {dtype}"
    )
    note = common.describe(machine)
    common.show(table_of(results, title, f"{note}, {options.steps} rounds"))
    for name, reason in left_out.items():
        Console().print(f"Left out: {name} ({reason})")
    name = f"step_time_{options.model}_{machine['backend']}"
    if isinstance(inputs, np.ndarray):
        name += f"_{options.batch * options.length}"
    common.write_json(
        options.results,
        name,
        {
            "model": options.model,
            "title": title,
            "matrices": n_layers,
            "batch": options.batch,
            "length": options.length,
            "dtype": dtype,
            "rounds": options.steps,
            "machine": machine,
            "left_out": left_out,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
