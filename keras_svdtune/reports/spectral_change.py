"""Measures how an adapter changed the singular values of one matrix.

W' = W + dW, W (in, out), n = min(in, out). Everything is computed in the
singular vectors of W, where W is diag(s), the Gram matrix of W' has n² numbers,
and its eigenvectors hold the cosines with the singular vectors of W:

| what the method adds | what is computed |
|---|---|
| M between U and Vᵀ, diagonal: SVF, SVFT plain | n numbers are sorted |
| M between U and Vᵀ: SVFT | the Gram matrix of diag(s) + M |
| a·b of low rank | that of diag(s) with a rank 2k added; dW by its QR |
| anything else: DoRA, a replaced base | that of W', and of dW, formed |

Of SVF and SVFT, M is between the singular vectors of W rounded to bfloat16, if
the adapter's basis is (`matrix/rounding.py`): the singular values are those of
the rounded W too, and what is measured is the change of that matrix.
"""

import contextlib
import dataclasses

import keras
import numpy as np
from keras import ops

from keras_svdtune.hosts.target import Target
from keras_svdtune.matrix import float64
from keras_svdtune.matrix.decompose import decompose, singular_values
from keras_svdtune.matrix.factors import Needs
from keras_svdtune.matrix.rounding import rounded
from keras_svdtune.reports.matrices import (
    base_matrix,
    kernel_matrix,
    merged_matrix,
    weight_values,
)
from keras_svdtune.reports.spectrum import effective_rank
from keras_svdtune.runtime.precision import full_precision, on_host
from keras_svdtune.runtime.types import Array, Tensor


@dataclasses.dataclass(frozen=True)
class SpectralChange:
    """The difference between W' = W + dW and W for one matrix.

    Attributes:
        path: str, the layer.
        drift: float, ‖s' - s‖ / ‖s‖, the singular values of W' and W.
        effective_rank: float, of dW: exp of the entropy of its normalised
            singular values; 0 where dW is 0.
        top_energy: float, the share of ‖dW‖² that its largest components
            hold; 0 where dW is 0.
        intruders: int, how many of the largest singular vectors of W' are far
            from every singular vector of W.
    """

    path: str
    drift: float
    effective_rank: float
    top_energy: float
    intruders: int


@dataclasses.dataclass(frozen=True)
class Measures:
    """The settings of `SpectralMonitor`: `rank`, `top` and `threshold`."""

    rank: int
    top: int
    threshold: float


@dataclasses.dataclass(frozen=True)
class Base:
    """The singular values s (n,) of W, float64, and one basis (n, n), float32.

    The basis has the singular vectors of the smaller side; it is None where
    the method needs none.
    """

    s: np.ndarray
    basis: np.ndarray | None


def base_of(target: Target) -> Base:
    """Decomposes W, or reads the decomposition from the cache."""
    w = base_matrix(target)
    ones = np.ones(min(target.view.shape))
    adapter = target.adapted
    if adapter.method.core(weight_values(target), ones) is not None:
        if adapter.rounds:
            w = rounded(w)
        s = singular_values(w, target.path)
        return Base(s.astype("float64"), None)
    found = decompose(w, Needs("small_side"), target.path)
    basis = found.v if found.u is None else found.u
    return Base(found.s.astype("float64"), basis)


def change_of(target: Target, base: Base, measures: Measures) -> SpectralChange:
    """Compares W' as it is now with W.

    Raises a ValueError if the adapter holds NaN or infinity.
    """
    with _precisely():
        found = _compared(target, base)
    new, update, vectors = found
    if not (np.isfinite(new).all() and np.isfinite(update).all()):
        raise ValueError(
            f"The adapter of layer '{target.path}' holds NaN or infinity."
        )
    norm = float(np.linalg.norm(base.s)) or 1.0
    energy = np.sort(update**2)[::-1]
    near = np.ones(0) if vectors is None else np.abs(vectors).max(axis=0)
    return SpectralChange(
        target.path,
        float(np.linalg.norm(np.sort(new)[::-1] - base.s)) / norm,
        effective_rank(update),
        float(energy[: measures.rank].sum() / (energy.sum() or 1.0)),
        int((near[: measures.top] < measures.threshold).sum()),
    )


# Each of the following returns the singular values of W' and of dW, in any
# order, and the singular vectors of W', the largest first, in terms of those
# of W: (n, n), or None where they are the same ones.
_Found = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _compared(target: Target, base: Base) -> _Found:
    method, weights = target.adapted.method, weight_values(target)
    core = method.core(weights, base.s)
    if core is not None:
        return _from_core(core, base.s, target.view.shape)
    if target.replaced:
        return _from_dense(target, base)
    kernel = kernel_matrix(target)
    factors = method.low_rank_factors(weights, kernel)
    if factors is None:
        return _from_dense(target, base)
    return _from_thin(kernel, *factors, base)


def _precisely() -> contextlib.AbstractContextManager[None]:
    """Asks for products in full float32, which a CPU always computes.

    On a CPU it asks for nothing: several threads come here and would undo
    each other's setting, which TensorFlow and torch have once a process.
    """
    if on_host() and keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    return full_precision()


def _from_core(
    core: np.ndarray, s: np.ndarray, shape: tuple[int, int]
) -> _Found:
    if core.ndim == 1:
        return np.abs(s + core), np.abs(core), None
    new = np.diag(s) + core
    tall = shape[1] <= shape[0]
    values, vectors = _eigen(new.T @ new if tall else new @ new.T)
    return values, _singular_values(core), vectors


def _from_thin(kernel: Array, a: Tensor, b: Tensor, base: Base) -> _Found:
    """Compares W' = W + a·b with W; a (in, k), b (k, out)."""
    assert base.basis is not None
    w, along, across = kernel, a, b
    if kernel.shape[1] > kernel.shape[0]:
        w, along, across = map(ops.transpose, (kernel, b, a))
    # W is (long, n) now, and W·basis = (other vectors)·diag(s).
    wa = _float64(ops.matmul(ops.transpose(w), along))
    along, across = _float64(along), _float64(across)
    basis = base.basis.astype("float64")
    left = np.asarray(np.linalg.qr(along, mode="r"))
    right = np.asarray(np.linalg.qr(across.T, mode="r"))
    update = _singular_values(left @ right.T)
    across = across @ basis
    mixed = (basis.T @ wa) @ across
    gram = mixed + mixed.T + across.T @ (along.T @ along) @ across
    gram[np.diag_indices_from(gram)] += base.s**2
    values, vectors = _eigen(gram)
    return values, update, vectors


def _from_dense(target: Target, base: Base) -> _Found:
    assert base.basis is not None
    old, new = (
        ops.convert_to_numpy(x)
        for x in (base_matrix(target), merged_matrix(target))
    )
    update = new.astype("float64") - old
    if new.shape[1] > new.shape[0]:
        new, update = new.T, update.T
    values, vectors = _eigen(float64.gram(new))
    squares = np.linalg.eigvalsh(float64.gram(update))
    # What only rounding errors add up to is no component.
    squares[squares < 1e-12 * squares[-1]] = 0.0
    return values, np.sqrt(squares), base.basis.T @ vectors


def _float64(x: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(x).astype("float64")


def _eigen(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns roots of the eigenvalues and eigenvectors, the largest first."""
    if not np.isfinite(gram).all():
        return np.full(len(gram), np.nan), gram
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(np.maximum(values, 0.0))[::-1], vectors[:, ::-1]


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    if not np.isfinite(matrix).all():
        return np.full(1, np.nan)
    return np.linalg.svd(matrix, compute_uv=False)
