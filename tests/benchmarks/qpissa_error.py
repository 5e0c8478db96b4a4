"""How much quantization error QPiSSA leaves, against plain quantization.

    python tests/benchmarks/qpissa_error.py --model gemma3_270m --ranks 128

For every Dense and EinsumDense matrix W of a model, quantized by Keras:

    reduction = 1 - ‖W - W̃‖ / ‖W - quant(W)‖

with W̃ = Q + A·B what the model computes with just after enabling. In the
nuclear norm (the sum of the singular values), as in the paper's table, and in
the Frobenius norm. "In all" is the paper's average over layers, and beside it
the reduction of the sums over all layers.
"""

import argparse
import concurrent.futures
import itertools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import common
import keras
import numpy as np
import rich.box
from keras import ops
from rich.table import Table

import keras_svdtune
from keras_svdtune.model.targets import find_targets

MODES = ("int4", "int8")
ITERATIONS = (1, 5)


def norms(matrix: np.ndarray) -> np.ndarray:
    """(nuclear, Frobenius), from the Gram matrix of the smaller side."""
    wide = matrix.astype("float64")
    gram = wide @ wide.T if wide.shape[0] < wide.shape[1] else wide.T @ wide
    s = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    return np.array([s.sum(), np.sqrt(np.sum(s * s))])


def each(
    paths: Iterable[str], function: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """A function of each path, on all cores."""
    paths = list(paths)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(function, paths), strict=True))


def matrices_of(backbone: keras.Model) -> dict[str, np.ndarray]:
    """What every layer multiplies by, adapter and all, by path."""
    return {
        path: ops.convert_to_numpy(
            target.matrix()
            if target.adapter is None
            else target.adapter.merged(target.matrix())
        ).copy()
        for path, target in find_targets(backbone, adapted=True).items()
    }


def quantized(name: str, mode: str) -> dict[str, np.ndarray]:
    """The matrices as Keras quantizes them, read back."""
    backbone = common.load_backbone(name)
    backbone.quantize(mode)
    return matrices_of(backbone)


def enabled(
    name: str, method: keras_svdtune.Method
) -> tuple[dict[str, np.ndarray], float]:
    """The matrices just after enabling, and the seconds that it took."""
    backbone = common.load_backbone(name)
    start = time.perf_counter()
    keras_svdtune.enable_adapter(backbone, method)
    seconds = time.perf_counter() - start
    return matrices_of(backbone), seconds


def summary(
    plain: dict[str, np.ndarray], left: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Reductions in both norms, of some layers."""
    before = np.stack([plain[path] for path in left])
    after = np.stack([left[path] for path in left])
    means = 1.0 - np.mean(after / before, axis=0)
    # The Frobenius norm of all layers as one is the root of a sum of squares.
    total = [
        1.0 - after[:, 0].sum() / before[:, 0].sum(),
        1.0 - np.linalg.norm(after[:, 1]) / np.linalg.norm(before[:, 1]),
    ]
    return {
        "layers": len(left),
        "nuclear": float(means[0]),
        "frobenius": float(means[1]),
        "nuclear_of_sums": float(total[0]),
        "frobenius_of_sums": float(total[1]),
    }


def kinds_of(matrices: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Paths of the layers of equal name and shape."""
    found: dict[str, list[str]] = {}
    for path, w in matrices.items():
        kind = f"{path.rsplit('/', 1)[-1]} {w.shape[0]} x {w.shape[1]}"
        found.setdefault(kind, []).append(path)
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_model(parser)
    common.add_results(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[128])
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    matrices = matrices_of(common.load_backbone(options.model))
    kinds = kinds_of(matrices)

    def distances(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return each(matrices, lambda path: norms(matrices[path] - found[path]))

    plain = {mode: distances(quantized(options.model, mode)) for mode in MODES}
    results: list[dict[str, Any]] = []
    settings = itertools.product(options.ranks, MODES, ITERATIONS)
    for rank, mode, iterations in settings:
        method = keras_svdtune.PiSSA(rank, quantize=mode, iterations=iterations)
        found, seconds = enabled(options.model, method)
        left = distances(found)
        results.append(
            {
                "rank": rank,
                "quantize": mode,
                "iterations": iterations,
                "enable_seconds": round(seconds, 1),
                "all": summary(plain[mode], left),
                "kinds": {
                    kind: summary(plain[mode], {p: left[p] for p in paths})
                    for kind, paths in kinds.items()
                },
            }
        )
        machine["load_at_end"] = common.load()
        # It takes long: what there is is kept.
        common.write_json(
            options.results,
            f"qpissa_error_{options.model}_{machine['backend']}",
            {
                "model": options.model,
                "machine": machine,
                "results": results,
            },
        )
    common.show(table_of(results, options.model, common.describe(machine)))


def table_of(results: list[dict[str, Any]], model: str, note: str) -> Table:
    """Reductions by kind of layer, a column for each setting."""
    table = Table(
        title=f"Quantization error left out by QPiSSA: {model}, nuclear norm",
        caption=f"Average over layers. {note}",
        box=rich.box.HEAVY_HEAD,
    )
    table.add_column("layers", no_wrap=True)
    for r in results:
        heading = f"{r['quantize']}\nrank {r['rank']}\nT = {r['iterations']}"
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in results[0]["kinds"]:
        each = [r["kinds"][kind] for r in results]
        label = f"{each[0]['layers']} of {kind}"
        table.add_row(label, *(f"{x['nuclear']:.1%}" for x in each))
    table.add_section()
    for label, key in (
        ("all, average", "nuclear"),
        ("all, of the sums", "nuclear_of_sums"),
        ("all, Frobenius, average", "frobenius"),
        ("all, Frobenius, of the sums", "frobenius_of_sums"),
    ):
        table.add_row(label, *(f"{r['all'][key]:.1%}" for r in results))
    table.add_row(
        "enabling, seconds", *(f"{r['enable_seconds']:.0f}" for r in results)
    )
    return table


if __name__ == "__main__":
    main()
