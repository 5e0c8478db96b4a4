"""What SpectralMonitor costs: seconds at the start of `fit`, and an epoch.

    python tests/benchmarks/monitor_cost.py --model gemma3_270m

For each method, enabled on every Dense and EinsumDense matrix, its trainables
moved by noise: the seconds to prepare (the decompositions; once with the cache
of decompositions as enabling left it) and the median seconds of an epoch's end
after the first, of `--matrices` matrices and of all.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
import keras
import numpy as np
from rich.progress import track
from rich.table import Table

import keras_svdtune
from keras_svdtune.model.targets import adapted_layers


def measured(
    backbone: Any, matrices: int | None, rounds: int
) -> dict[str, Any]:
    """Seconds of one monitor on an adapted backbone."""
    monitor = keras_svdtune.SpectralMonitor(matrices=matrices)
    monitor.set_model(backbone)
    start = _timed(monitor.on_train_begin)[0]
    logs: dict[str, float] = {}
    # The first one compiles.
    epochs = [
        _timed(lambda: monitor.on_epoch_end(0, logs)) for _ in range(rounds + 1)
    ][1:]
    return {
        "matrices": len(monitor.changes),
        "prepare_seconds": start,
        "epoch_seconds": statistics.median(x for x, _ in epochs),
        "epoch_cpu_seconds": statistics.median(x for _, x in epochs),
        "all_epoch_seconds": [round(x, 4) for x, _ in epochs],
        "logs": logs,
    }


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and CPU seconds, which suffer less from what else runs."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def moved(backbone: Any, size: float) -> None:
    """Noise in every trainable, as training would leave something there."""
    random = np.random.RandomState(0)
    for layer in adapted_layers(backbone).values():
        for variable in layer.adapter.variables_by_name(True).values():
            noise = random.normal(0.0, size, tuple(variable.shape))
            variable.assign_add(noise.astype("float32"))


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--matrices", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    methods, left_out = common.methods_for(options.methods, options.rank)
    backbone = common.load_backbone(options.model)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        keras_svdtune.set_decomposition_cache(folder)
        for name, method in track(methods.items(), "Monitoring"):
            try:
                keras_svdtune.enable_adapter(backbone, method)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            moved(backbone, 0.01)
            results[name] = [
                measured(backbone, count, options.rounds)
                for count in (options.matrices, None)
            ]
            keras_svdtune.remove_adapter(backbone)
        keras_svdtune.set_decomposition_cache(False)
    machine["load_at_end"] = common.load()
    table = Table(
        title=f"SpectralMonitor on {options.model}",
        caption=common.describe(machine),
    )
    for column in ("", "matrices", "prepare s", "epoch s", "CPU s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, rows in results.items():
        for row in rows:
            table.add_row(
                name,
                str(row["matrices"]),
                f"{row['prepare_seconds']:.2f}",
                f"{row['epoch_seconds']:.3f}",
                f"{row['epoch_cpu_seconds']:.3f}",
            )
    common.show(table)
    for name, reason in left_out.items():
        print(f"Left out: {name} ({reason})")
    common.write_json(
        options.results,
        f"monitor_cost_{options.model}_{machine['backend']}",
        {
            "model": options.model,
            "rank": options.rank,
            "rounds": options.rounds,
            "machine": machine,
            "left_out": left_out,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
