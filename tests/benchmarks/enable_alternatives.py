"""The matrices of a model decomposed otherwise, for `enable_time.py`.

Its tables 3 and 4: how near the components that PiSSA takes come to NumPy's in
float64, and the ways to an orthonormal basis of the smaller side.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.progress import track

from keras_svdtune import svd

TORCH = "torch.linalg.svd, float32"


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
    found: dict[str, list[tuple[float, float]]] = {}
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
        pairs = {}
        for name, needs in algorithms.items():
            factors = svd.decompose(w, needs)
            pairs[name] = (factors.u, factors.v)
        with contextlib.suppress(ImportError):
            pairs[TORCH] = _torch_top(w, rank)
        for name, (left, right) in pairs.items():
            sine = max(_sine(u, left), _sine(v, right))
            left = np.linalg.qr(left.astype("float64"))[0]
            captured = np.linalg.norm(left.T @ w64) ** 2
            found.setdefault(name, []).append(
                (sine, float(1 - captured / energy))
            )
    results = {}
    for name, errors in found.items():
        sines, lost = np.array(errors).T
        results[name] = {
            "median_sine": float(np.median(sines)),
            "largest_sine": float(sines.max()),
            "largest_energy_lost": float(lost.max()),
        }
    return results


def _torch_top(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest components as a PEFT user gets them."""
    import torch

    u, _, vt = torch.linalg.svd(torch.from_numpy(w), full_matrices=False)
    return u.numpy()[:, :rank], vt.numpy()[:rank].T


def _sine(exact: np.ndarray, basis: np.ndarray) -> float:
    """Of the largest principal angle between two spans."""
    basis = np.linalg.qr(basis.astype("float64"))[0]
    return float(np.linalg.norm(basis - exact @ (exact.T @ basis), 2))


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
