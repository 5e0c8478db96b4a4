"""Seconds and memory of enabling each method on a whole model.

    python tests/benchmarks/enable_time.py --model gemma3_270m

Two tables:

1. Enabling, on every Dense and EinsumDense matrix of the model: the median
   seconds, the bytes that an adapter keeps, and the peak of resident memory
   above what there was before. CPU seconds (all threads) suffer less from what
   else runs on the machine. Beside it `torch.linalg.svd` of all these matrices
   in float32, which is what a PEFT user waits for. All take turns. The cache of
   decompositions is off.
2. The same once more with the cache, empty at first: the first time and the
   second, and whether all that the adapters hold is the same to the bit.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
import keras
import numpy as np
from keras import ops
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_svdtune
from keras_svdtune.model.targets import find_targets

TORCH = "torch.linalg.svd"


class Timed:
    """The seconds and peaks of one row, over its rounds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peaks: list[int] = []

    def run(self, work: Callable[[], Any]) -> None:
        """Runs `work` once and keeps the figures."""
        before = common.rss_bytes()
        common.restart_peak()
        cpu, start = time.process_time(), time.perf_counter()
        work()
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu)
        peak = common.peak_bytes()
        if before is not None and peak is not None:
            self.peaks.append(max(peak - before, 0))

    def result(self) -> dict[str, Any]:
        """The figures, but for ratios."""
        return {
            "seconds": statistics.median(self.seconds),
            "cpu_seconds": statistics.median(self.cpu_seconds),
            "all_seconds": [round(x, 4) for x in self.seconds],
            "all_cpu_seconds": [round(x, 4) for x in self.cpu_seconds],
            "peak_extra_bytes": max(self.peaks, default=None),
        }


def enabling(
    backbone: Any,
    matrices: list[np.ndarray],
    methods: dict[str, Any],
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Times every method, and torch's svd, `rounds` times in turn."""
    rows = {name: Timed() for name in (*methods, TORCH)}
    for _ in track(range(rounds), "Enabling"):
        for name, method in methods.items():
            rows[name].run(
                lambda method=method: keras_svdtune.enable_adapter(
                    backbone, method
                )
            )
            keras_svdtune.remove_adapter(backbone)
        rows[TORCH].run(lambda: torch_svds(matrices))
    results = {name: row.result() for name, row in rows.items()}
    for name, method in methods.items():
        cost = keras_svdtune.estimate(backbone, method)
        results[name]["trainable_parameters"] = cost.trainable
        results[name]["kept_bytes"] = cost.bytes
    for result in results.values():
        for key in ("seconds", "cpu_seconds"):
            result[f"{key}_to_torch"] = result[key] / results[TORCH][key]
    return results


def torch_svds(matrices: list[np.ndarray]) -> None:
    """Decomposes all matrices with torch."""
    import torch

    for w in matrices:
        torch.linalg.svd(torch.from_numpy(w), full_matrices=False)


def caching(backbone: Any, methods: dict[str, Any]) -> dict[str, Any]:
    """Every method twice, with an empty cache and with a full one."""
    base = {id(v) for v in backbone.variables}
    results = {}
    for name, method in track(methods.items(), "Caching"):
        times, values = [Timed(), Timed()], []
        with tempfile.TemporaryDirectory() as folder:
            keras_svdtune.set_decomposition_cache(folder)
            for timed in times:
                timed.run(
                    lambda method=method: keras_svdtune.enable_adapter(
                        backbone, method
                    )
                )
                values.append(
                    [
                        ops.convert_to_numpy(v.value).copy()
                        for v in backbone.variables
                        if id(v) not in base
                    ]
                )
                keras_svdtune.remove_adapter(backbone)
            keras_svdtune.set_decomposition_cache(False)
        results[name] = {
            "first_seconds": times[0].seconds[0],
            "second_seconds": times[1].seconds[0],
            "first_cpu_seconds": times[0].cpu_seconds[0],
            "second_cpu_seconds": times[1].cpu_seconds[0],
            "equal_bits": all(map(np.array_equal, *values)),
        }
    return results


def enabling_table(results: dict[str, Any], title: str, note: str) -> Table:
    """The first table."""
    table = Table(title=title, caption=note)
    for column in (
        *("", "seconds", "min - max", "to torch svd", "CPU s", "to torch svd"),
        *("trainable", "kept MB", "peak extra MB"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['seconds']:.2f}",
            f"{min(r['all_seconds']):.2f} - {max(r['all_seconds']):.2f}",
            f"{r['seconds_to_torch']:.2f}",
            f"{r['cpu_seconds']:.2f}",
            f"{r['cpu_seconds_to_torch']:.2f}",
            _or_dash(r.get("trainable_parameters"), 1),
            _or_dash(r.get("kept_bytes"), 1e6),
            _or_dash(r["peak_extra_bytes"], 1e6),
        )
    return table


def _or_dash(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def cache_table(results: dict[str, Any]) -> Table:
    """The second table."""
    table = Table(title="With the cache of decompositions")
    for column in (
        *("", "first s", "second s", "ratio", "first CPU s"),
        *("second CPU s", "ratio", "equal to the bit"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        row = [name]
        for unit in ("seconds", "cpu_seconds"):
            first, second = r[f"first_{unit}"], r[f"second_{unit}"]
            row += [f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}"]
        table.add_row(*row, "yes" if r["equal_bits"] else "NO")
    return table


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    keras_svdtune.set_decomposition_cache(False)
    machine = common.machine()
    methods, left_out = common.methods_for(options.methods, options.rank)
    backbone = common.load_backbone(options.model)
    for name, method in list(methods.items()):
        try:
            keras_svdtune.estimate(backbone, method)
        except ValueError as error:
            left_out[name] = str(error)
            del methods[name]
    matrices = [
        ops.convert_to_numpy(target.matrix()).copy()
        for target in find_targets(backbone).values()
    ]
    results = enabling(backbone, matrices, methods, options.rounds)
    cached = caching(backbone, methods)
    machine["load_at_end"] = common.load()
    title = f"Enabling on {options.model}: {len(matrices)} matrices"
    common.show(enabling_table(results, title, common.describe(machine)))
    common.show(cache_table(cached))
    for name, reason in left_out.items():
        Console().print(f"Left out: {name} ({reason})")
    name = f"enable_time_{options.model}_{machine['backend']}"
    if options.rank != 8:
        name += f"_rank{options.rank}"
    common.write_json(
        options.results,
        name,
        {
            "model": options.model,
            "matrices": len(matrices),
            "rank": options.rank,
            "rounds": options.rounds,
            "machine": machine,
            "left_out": left_out,
            "enabling": results,
            "cache": cached,
        },
    )


if __name__ == "__main__":
    main()
