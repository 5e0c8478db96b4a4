"""Seconds and memory of enabling a method, and of what svd.py chose between.

    python tests/benchmarks/enable_time.py --model gemma3_270m

Four tables:

1. Enabling, on every Dense and EinsumDense matrix of the model: the median
   seconds, the bytes that an adapter keeps, and the peak of resident memory
   above what there was before, which should not exceed what is kept and the
   matrices of one shape in float32 (`limit`). CPU seconds (all threads) suffer
   less from what else runs on the machine. Beside it `torch.linalg.svd` of all
   these matrices in float32, which is what a PEFT user waits for. All take
   turns. The cache of decompositions is off.
2. The same once more with the cache, empty at first: the first time and the
   second, and whether all that the adapters hold is the same to the bit.
3. The components that PiSSA takes, exact and randomised, and torch's, against
   NumPy's SVD in float64, on `--per-shape` matrices of each shape: the largest
   principal angle between the spans of the left vectors, and of the right
   ones (sine, median and largest), and how much of the energy, the sum of s²,
   theirs fall short of the largest possible (relative, the worst).
4. The ways to an orthonormal basis of a matrix's smaller side, for each
   shape: seconds (the first call, which may compile, and the best of the
   others), and how well the basis does. For one random δ ~ N(0, 0.1²) it
   compares SVF's change of W with the change made from NumPy's SVD in
   float64: the relative difference in the Frobenius norm. That is by how
   much an adapter that was trained with one basis differs when it is loaded
   with another.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
import keras
import numpy as np
from enable_alternatives import TORCH, alternatives, by_shape, subspaces
from enable_tables import (
    alternatives_table,
    cache_table,
    enabling_table,
    plot,
    subspace_table,
)
from keras import ops
from rich.console import Console
from rich.progress import track

import keras_svdtune
from keras_svdtune.hosts.host import matrix_of
from keras_svdtune.model.targets import adapted_layers, find_targets


def enabling(
    backbone: Any,
    matrices: list[np.ndarray],
    methods: dict[str, Any],
    rounds: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Times every method, and torch's svd, `rounds` times in turn.

    Returns:
        The results, and why a method is left out.
    """
    seconds: dict[str, list[float]] = {}
    cpu_seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[int]] = {}
    kept: dict[str, int] = {}
    trainable: dict[str, int] = {}
    left_out: dict[str, str] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        before = common.rss_bytes()
        common.restart_peak()
        cpu, start = time.process_time(), time.perf_counter()
        work()
        taken = time.perf_counter() - start
        seconds.setdefault(name, []).append(taken)
        cpu_seconds.setdefault(name, []).append(time.process_time() - cpu)
        peak = common.peak_bytes()
        if before is not None and peak is not None:
            peaks.setdefault(name, []).append(max(peak - before, 0))

    torch_svd = torch_svds(matrices)
    for _ in track(range(rounds), "Enabling"):
        for name, method in methods.items():
            if name in left_out:
                continue
            try:
                timed(
                    name,
                    lambda method=method: keras_svdtune.enable_adapter(
                        backbone, method
                    ),
                )
            except ValueError as error:
                left_out[name] = str(error)
                continue
            kept[name] = sum(
                variable.value.nbytes
                for layer in adapted_layers(backbone).values()
                for variable in layer.adapter.variables
            )
            trainable[name] = common.trained_numbers(
                backbone.trainable_variables
            )
            keras_svdtune.remove_adapter(backbone)
        if torch_svd is not None:
            timed(TORCH, torch_svd)
    if torch_svd is None:
        left_out[TORCH] = "torch is not installed"
    results = {
        name: {
            "seconds": statistics.median(s),
            "cpu_seconds": statistics.median(cpu_seconds[name]),
            "all_seconds": [round(x, 4) for x in s],
            "all_cpu_seconds": [round(x, 4) for x in cpu_seconds[name]],
            "trainable_parameters": trainable.get(name),
            "kept_bytes": kept.get(name),
            "peak_extra_bytes": max(peaks[name]) if name in peaks else None,
            "all_peak_extra_bytes": peaks.get(name),
            "limit_bytes": kept[name] + group_bytes(matrices)
            if name in kept
            else None,
        }
        for name, s in seconds.items()
    }
    if TORCH in results:
        for result in results.values():
            for key in ("seconds", "cpu_seconds"):
                result[f"{key}_to_torch"] = result[key] / results[TORCH][key]
    return results, left_out


def group_bytes(matrices: list[np.ndarray]) -> int:
    """The largest group of matrices of equal shape, in float32."""
    return max(sum(4 * w.size for w in x) for x in by_shape(matrices).values())


def caching(backbone: Any, methods: dict[str, Any]) -> dict[str, Any]:
    """Every method twice, with an empty cache and with a full one."""
    results = {}
    for name, method in track(methods.items(), "Caching"):
        with tempfile.TemporaryDirectory() as folder:
            keras_svdtune.set_decomposition_cache(folder)
            seconds, cpu_seconds, values = [], [], []
            try:
                for _ in range(2):
                    cpu, start = time.process_time(), time.perf_counter()
                    keras_svdtune.enable_adapter(backbone, method)
                    seconds.append(time.perf_counter() - start)
                    cpu_seconds.append(time.process_time() - cpu)
                    values.append(
                        [
                            ops.convert_to_numpy(variable.value).copy()
                            for layer in adapted_layers(backbone).values()
                            for variable in layer.adapter.variables
                        ]
                    )
                    keras_svdtune.remove_adapter(backbone)
            except ValueError:
                continue  # `enabling` says why
            finally:
                keras_svdtune.set_decomposition_cache(False)
        results[name] = {
            "first_seconds": seconds[0],
            "second_seconds": seconds[1],
            "first_cpu_seconds": cpu_seconds[0],
            "second_cpu_seconds": cpu_seconds[1],
            "equal_bits": all(map(np.array_equal, *values)),
        }
    return results


def torch_svds(matrices: list[np.ndarray]) -> Callable[[], None] | None:
    """A function that decomposes all matrices with torch, if it is there."""
    try:
        import torch
    except ImportError:
        return None

    def work() -> None:
        for w in matrices:
            torch.linalg.svd(torch.from_numpy(w), full_matrices=False)

    return work


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="of enabling; 0: skip it"
    )
    parser.add_argument(
        "--per-shape",
        type=int,
        default=3,
        help="matrices to compare on; 0: skip it",
    )
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    keras_svdtune.set_decomposition_cache(False)
    machine = common.machine()
    methods, left_out = common.methods_for(options.methods, options.rank)
    backbone = common.load_backbone(options.model)
    matrices = [
        ops.convert_to_numpy(matrix_of(layer)).copy()
        for layer in find_targets(backbone).values()
    ]
    results, unfit = enabling(backbone, matrices, methods, options.rounds)
    left_out |= unfit
    fitting = {k: m for k, m in methods.items() if k not in left_out}
    cached = caching(backbone, fitting) if options.rounds else {}
    spans, compared = {}, {}
    if options.per_shape:
        spans = subspaces(matrices, options.rank, options.per_shape)
        compared = alternatives(matrices, options.per_shape)
    machine["load_at_end"] = common.load()
    note = common.describe(machine)
    title = f"Enabling on {options.model}: {len(matrices)} matrices"
    if options.rounds:
        common.show(enabling_table(results, title, note))
        common.show(cache_table(cached))
    if options.per_shape:
        common.show(subspace_table(spans, options.rank))
        common.show(alternatives_table(compared, note))
    for name, reason in left_out.items():
        Console().print(f"Left out: {name} ({reason})")
    name = f"enable_time_{options.model}_{machine['backend']}"
    if options.rank != 8:
        name += f"_rank{options.rank}"
    if results:
        path = options.results / f"{name}.png"
        plot(results, f"{title}, rank {options.rank}", note, path)
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
            "subspaces": spans,
            "alternatives": compared,
        },
    )


if __name__ == "__main__":
    main()
