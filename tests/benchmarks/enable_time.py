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
3. The components that PiSSA takes, exact and randomised, against NumPy's SVD
   in float64, on `--per-shape` matrices of each shape: the largest principal
   angle between the spans of the left vectors, and of the right ones (sine,
   median and largest), and how much of the energy, the sum of s², theirs
   fall short of the largest possible (relative, the worst).
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
from keras import ops
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_svdtune
from keras_svdtune import svd
from keras_svdtune.hosts import matrix_of
from keras_svdtune.targets import adapted_layers, find_targets

TORCH = "torch.linalg.svd, float32"


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
            trainable[name] = sum(
                int(np.prod(v.shape)) for v in backbone.trainable_variables
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


def by_shape(
    matrices: list[np.ndarray],
) -> dict[tuple[int, ...], list[np.ndarray]]:
    """The matrices of each shape."""
    shapes: dict[tuple[int, ...], list[np.ndarray]] = {}
    for w in matrices:
        shapes.setdefault(w.shape, []).append(w)
    return shapes


def spread(matrices: list[np.ndarray], count: int) -> list[np.ndarray]:
    """At most `count` of them, evenly spread over the model's depth."""
    chosen = np.linspace(0, len(matrices) - 1, min(count, len(matrices)))
    return [matrices[int(i)] for i in chosen]


def subspaces(
    matrices: list[np.ndarray], rank: int, per_shape: int
) -> dict[str, Any]:
    """How near `Needs("top", rank)` come to the largest components."""
    algorithms = {
        "exact": svd.Needs("top", rank),
        "n_iter=4": svd.Needs("top", rank, 4),
    }
    found: dict[str, list[tuple[float, float]]] = {x: [] for x in algorithms}
    sample = [
        w
        for same in by_shape(matrices).values()
        for w in spread(same, per_shape)
    ]
    for w in track(sample, "Comparing subspaces"):
        if rank > min(w.shape):
            continue
        w64 = w.astype("float64")
        u, s, vt = np.linalg.svd(w64, full_matrices=False)
        u, v, energy = u[:, :rank], vt[:rank].T, np.sum(s[:rank] ** 2)
        for name, needs in algorithms.items():
            factors = svd.decompose(w, needs)
            pairs = ((u, factors.u), (v, factors.v))
            sine = max(_sine(exact, basis) for exact, basis in pairs)
            left = np.linalg.qr(factors.u.astype("float64"))[0]
            captured = np.linalg.norm(left.T @ w64) ** 2
            found[name].append((sine, float(1 - captured / energy)))
    results = {}
    for name, pairs in found.items():
        if pairs:
            sines, lost = np.array(pairs).T
            results[name] = {
                "median_sine": float(np.median(sines)),
                "largest_sine": float(sines.max()),
                "largest_energy_lost": float(lost.max()),
            }
    return results


def _sine(exact: np.ndarray, basis: np.ndarray) -> float:
    """Of the largest principal angle between two spans."""
    basis = np.linalg.qr(basis.astype("float64"))[0]
    return float(np.linalg.norm(basis - exact @ (exact.T @ basis), 2))


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


def chosen(w: np.ndarray) -> np.ndarray:
    """The basis that keras_svdtune takes."""
    factors = svd.decompose(w, svd.Needs("small_side"))
    basis = factors.v if factors.u is None else factors.u
    assert basis is not None
    return basis


def numpy_eigh(w: np.ndarray) -> np.ndarray:
    """LAPACK on the host, in float64, of the Gram matrix."""
    wide = w.astype("float64")
    return np.linalg.eigh(_gram(wide, np))[1][:, ::-1]


def torch_eigh(w: np.ndarray) -> np.ndarray:
    """The same by torch: another build of LAPACK."""
    import torch

    gram = torch.from_numpy(_gram(w.astype("float64"), np))
    return torch.linalg.eigh(gram)[1].numpy()[:, ::-1]


def ops_eigh(w: np.ndarray) -> np.ndarray:
    """`keras.ops.eigh` in float32 of the Gram matrix, on the backend."""
    with svd.full_precision():
        basis = ops.eigh(_gram(ops.convert_to_tensor(w), ops))[1]
    return ops.convert_to_numpy(basis)[:, ::-1]


def ops_svd(w: np.ndarray) -> np.ndarray:
    """`keras.ops.svd` in float32, on the backend."""
    with svd.full_precision():
        u, _, vt = ops.svd(ops.convert_to_tensor(w), full_matrices=False)
    return ops.convert_to_numpy(vt).T if _tall(w) else ops.convert_to_numpy(u)


def jax_svd(algorithm: str) -> Callable[[np.ndarray], np.ndarray]:
    """`jax.lax.linalg.svd` in float32 by one of its algorithms.

    Which there are depends on the device: the CPU has no Jacobi and no polar
    decomposition, a GPU no divide and conquer.
    """

    def basis_of(w: np.ndarray) -> np.ndarray:
        if keras.backend.backend() != "jax":
            raise NotImplementedError
        from jax.lax import linalg

        with svd.full_precision():
            u, _, vt = linalg.svd(
                ops.convert_to_tensor(w),
                full_matrices=False,
                algorithm=linalg.SvdAlgorithm[algorithm],
            )
        return np.asarray(vt).T if _tall(w) else np.asarray(u)

    return basis_of


def ops_eigh_of_all(matrices: list[np.ndarray]) -> list[np.ndarray]:
    """`ops_eigh` of matrices of one shape, in one batch."""
    with svd.full_precision():
        grams = [_gram(ops.convert_to_tensor(w), ops) for w in matrices]
        bases = ops.eigh(ops.stack(grams))[1]
    return list(ops.convert_to_numpy(bases)[:, :, ::-1])


def numpy_svd(w: np.ndarray) -> np.ndarray:
    """NumPy's svd, which works in float64 for a float32 `w` too."""
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    return vt.T if _tall(w) else u


def _gram(w: Any, xp: Any) -> Any:
    wt = xp.transpose(w)
    return xp.matmul(wt, w) if _tall(w) else xp.matmul(w, wt)


def _tall(w: Any) -> bool:
    return w.shape[1] <= w.shape[0]


ALTERNATIVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "keras_svdtune": chosen,
    "NumPy eigh, float64": numpy_eigh,
    "torch eigh, float64": torch_eigh,
    "keras.ops.eigh, float32": ops_eigh,
    "keras.ops.svd, float32": ops_svd,
    "JAX's svd, QR": jax_svd("QR"),
    "JAX's svd, Jacobi": jax_svd("JACOBI"),
    "JAX's svd, polar": jax_svd("POLAR"),
    "NumPy svd (in float64)": numpy_svd,
}
IN_ONE_BATCH = "keras.ops.eigh, float32, in one batch"


def alternatives(matrices: list[np.ndarray], per_shape: int) -> dict[str, Any]:
    """Seconds and accuracy of every alternative, by shape.

    Args:
        matrices: all of them.
        per_shape: int. How many of each shape to take, evenly spread over the
            model's depth. Accuracy is that of the worst.
    """
    results: dict[str, Any] = {}
    for shape, found in track(
        by_shape(matrices).items(), "Comparing alternatives"
    ):
        sample = spread(found, per_shape)
        n = min(shape)
        delta = 0.1 * np.random.default_rng(0).standard_normal(n)
        references = [
            _change(w, numpy_svd(w.astype("float64")), delta) for w in sample
        ]
        rows: dict[str, Any] = {}
        for name in [*ALTERNATIVES, IN_ONE_BATCH]:
            try:
                timed = _timed_bases(name, sample)
            except (ImportError, NotImplementedError):
                continue  # not here: another backend, or another device
            seconds, cpu_seconds, bases = timed
            rows[name] = {
                "first_seconds": seconds[0],
                "seconds": min(seconds[1:]),
                "cpu_seconds": min(cpu_seconds[1:]),
                "relative_difference": max(
                    float(
                        np.linalg.norm(_change(w, basis, delta) - reference)
                        / np.linalg.norm(reference)
                    )
                    for w, basis, reference in zip(
                        sample, bases, references, strict=True
                    )
                ),
                "orthogonality": max(_orthogonality(b) for b in bases),
            }
        name = f"{shape[0]} x {shape[1]}"
        results[name] = {"count": len(found), "alternatives": rows}
    return results


def _timed_bases(
    name: str, sample: list[np.ndarray]
) -> tuple[list[float], list[float], list[np.ndarray]]:
    """Seconds and CPU seconds for a matrix, the first to warm up; the bases."""
    if name == IN_ONE_BATCH:
        calls: list[Callable[[], Any]] = [lambda: ops_eigh_of_all(sample)] * 2
        share = len(sample)
    else:
        # The first may compile.
        calls = [
            lambda w=w: [ALTERNATIVES[name](w)] for w in (sample[0], *sample)
        ]
        share = 1
    seconds, cpu_seconds, bases = [], [], []
    for call in calls:
        cpu, start = time.process_time(), time.perf_counter()
        bases += call()
        seconds.append((time.perf_counter() - start) / share)
        cpu_seconds.append((time.process_time() - cpu) / share)
    return seconds, cpu_seconds, bases[share:]


def _change(w: np.ndarray, basis: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """SVF's change of W in float64, for a basis of its smaller side."""
    w, basis = w.astype("float64"), basis.astype("float64")
    if _tall(w):
        return (w @ basis * delta) @ basis.T
    return (basis * delta) @ (basis.T @ w)


def _orthogonality(basis: np.ndarray) -> float:
    """The largest entry of BᵀB - I."""
    basis = basis.astype("float64")
    return float(np.abs(basis.T @ basis - np.eye(len(basis))).max())


def enabling_table(results: dict[str, Any], title: str, note: str) -> Table:
    """The first table."""
    table = Table(title=title, caption=note)
    table.add_column("", no_wrap=True)
    for column in (
        "seconds",
        "min - max",
        "to torch svd",
        "CPU s",
        "to torch svd",
        "trainable",
        "kept MB",
        "peak extra MB",
        "limit MB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['seconds']:.2f}",
            f"{min(r['all_seconds']):.2f} - {max(r['all_seconds']):.2f}",
            _ratio(r.get("seconds_to_torch")),
            f"{r['cpu_seconds']:.2f}",
            _ratio(r.get("cpu_seconds_to_torch")),
            _or_dash(r["trainable_parameters"], 1),
            _or_dash(r["kept_bytes"], 1e6),
            _or_dash(r["peak_extra_bytes"], 1e6),
            _or_dash(r["limit_bytes"], 1e6),
        )
    return table


def cache_table(results: dict[str, Any]) -> Table:
    """The second table."""
    table = Table(title="With the cache of decompositions")
    for column in ("", "first s", "second s", "ratio", "first CPU s"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("second CPU s", "ratio", "equal to the bit"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        row = [name]
        for unit in ("seconds", "cpu_seconds"):
            first, second = r[f"first_{unit}"], r[f"second_{unit}"]
            row += [f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}"]
        table.add_row(*row, "yes" if r["equal_bits"] else "NO")
    return table


def subspace_table(results: dict[str, Any], rank: int) -> Table:
    """The third table."""
    table = Table(title=f"The {rank} largest components")
    table.add_column("")
    for column in ("median sine", "largest sine", "energy lost, at most"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        table.add_row(name, *(f"{x:.1e}" for x in r.values()))
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _or_dash(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def alternatives_table(results: dict[str, Any], note: str) -> Table:
    """The fourth table."""
    table = Table(title="A basis of the smaller side, by shape", caption=note)
    for column in ("matrix", "algorithm"):
        table.add_column(column, no_wrap=True)
    for column in (
        "first call s",
        "seconds",
        "CPU s",
        "all of this shape, s",
        "ΔW differs by",
        "|BᵀB - I|",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for shape, result in results.items():
        for i, (name, r) in enumerate(result["alternatives"].items()):
            table.add_row(
                f"{result['count']} of {shape}" if i == 0 else "",
                name,
                f"{r['first_seconds']:.3f}",
                f"{r['seconds']:.3f}",
                f"{r['cpu_seconds']:.3f}",
                f"{r['seconds'] * result['count']:.2f}",
                f"{r['relative_difference']:.1e}",
                f"{r['orthogonality']:.1e}",
            )
        table.add_section()
    return table


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
    common.write_json(
        options.results,
        f"enable_time_{options.model}_{machine['backend']}",
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
