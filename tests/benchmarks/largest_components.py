"""What the largest components cost, by ARPACK, by LAPACK, and with all others.

    python tests/benchmarks/largest_components.py \
        --models smollm2_135m gemma3_270m --sides 2048

Prints a row for each shape of a model's kernels, or each spectrum of a random
matrix, and each rank: the median seconds and CPU seconds of one matrix by
`lanczos.largest` with its proof, by `lapack.eigh_part`, and by `small_side`,
which is NumPy's `eigh`, all from W in float64; how many results of the first
were proved, the largest sine of an angle between their span and that of the
last, and how long the main thread had to wait for Python's lock meanwhile. A
worker thread does the work with one BLAS thread, as `run_all` does.
"""

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import threadpoolctl
from keras import ops

from keras_svdtune.demo.weights.weights import load_model
from keras_svdtune.matrix import float64, lanczos, lapack
from keras_svdtune.matrix.algorithms import HOST, small_side
from keras_svdtune.model.targets import find_targets

SPECTRA: dict[str, Callable[[int], np.ndarray]] = {
    "1 / sqrt(i)": lambda n: np.arange(1, n + 1) ** -0.5,
    "1 / i": lambda n: 1 / np.arange(1, n + 1),
    "clusters": lambda n: (
        np.repeat(np.linspace(3, 1, n // 8), 8) + np.linspace(1e-4, 0, n)
    ),
    "flat": lambda n: np.linspace(1.01, 1, n),
    "pairs": lambda n: np.repeat(np.linspace(2, 1, n // 2) ** (n / 75), 2),
}


def matrices(models: list[str], sides: list[int]) -> Iterator[Any]:
    """Names, and the matrices (in, out) under each."""
    for model in models:
        shapes: dict[tuple[int, ...], list[np.ndarray]] = {}
        for target in find_targets(load_model(model).backbone).values():
            w = ops.convert_to_numpy(target.matrix()).astype("float32")
            shapes.setdefault(w.shape, []).append(w)
        for shape, found in shapes.items():
            yield f"{model} {shape[0]} x {shape[1]}", found
    for n in sides:
        random = np.random.default_rng(0).standard_normal((2, n, n))
        u, v = np.linalg.qr(random)[0]
        for name, spectrum in SPECTRA.items():
            yield f"{n}: {name}", [((u * spectrum(n)) @ v).astype("float32")]
        yield f"{n}: Gaussian", [random[0].astype("float32")]


def timed(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The result, seconds, CPU seconds, and the main thread's longest wait."""
    found: list[Any] = []

    def measure() -> None:
        cpu, start = time.thread_time(), time.perf_counter()
        result, end = work(*arguments), time.perf_counter()
        found.extend([result, end - start, time.thread_time() - cpu])

    worker = threading.Thread(target=measure)
    worker.start()
    waits, last = [0.0], time.perf_counter()
    while worker.is_alive():
        time.sleep(0.001)
        waits.append(time.perf_counter() - last)
        last += waits[-1]
    return [*found, max(waits)]


def by_lapack(w: np.ndarray, rank: int) -> Any:
    return lapack.eigh_part(float64.gram(w), w.shape[1] - rank, w.shape[1])


def row(found: list[np.ndarray], rank: int) -> list[str]:
    times, waits, sines = [], [], []
    for w in (x if x.shape[1] <= x.shape[0] else x.T for x in found):
        ours = timed(lambda w: lanczos.largest(float64.gram(w), rank), w)
        some = timed(by_lapack, w, rank)
        everything = timed(small_side, w, HOST)
        times.append([*ours[1:3], *some[1:3], *everything[1:3]])
        waits.append(ours[3])
        if ours[0] is not None:
            v, exact = ours[0][1], everything[0][2][:, :rank]
            sines.append(np.linalg.norm(v - exact @ (exact.T @ v), 2))
    seconds = [f"{x:.3f}" for x in np.median(times, 0)]
    sine, wait = f"{max(sines, default=0):.0e}", f"{max(waits):.3f}"
    return [*seconds, f"{len(sines)}/{len(found)}", sine, wait]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--sides", nargs="*", type=int, default=[2048])
    options = parser.parse_args()
    columns = ["eigsh s", "CPU s", "LAPACK s", "CPU s", "all s", "CPU s"]
    print("matrices", "rank", *columns, "proved", "sine", "wait s", sep=" | ")
    with threadpoolctl.threadpool_limits(1, "blas"):
        for name, found in matrices(options.models, options.sides):
            for rank in (8, 16):
                print(name, rank, *row(found, rank), sep=" | ", flush=True)
