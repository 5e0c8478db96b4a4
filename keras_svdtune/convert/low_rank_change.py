"""The change dW = W' - W by an adapter, as a product of two thin matrices A·B.

Low-rank methods give A and B themselves (`Method.low_rank_factors`): PiSSA and
MiLoRA at twice their rank, A·B - A₀·B₀ = [A A₀]·[B; -B₀]. For any other dW the
truncated singular value decomposition is the best approximation at a given rank
(Eckart and Young). The error is measured, layer by layer, in float64.
"""

import dataclasses
import functools

import numpy as np

from keras_svdtune.hosts.target import Target
from keras_svdtune.matrix.decompose import top_on_host
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.methods.settings import check_whole_number
from keras_svdtune.runtime.parallel import run_all
from keras_svdtune.runtime.placement import placement_of
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Tensor


@dataclasses.dataclass(frozen=True)
class LayerConversion:
    """The error of the product A·B of one layer against its dW = W' - W.

    Attributes:
        path: str, the layer.
        matrix: (in, out), its kernel as a matrix.
        rank: int, of A·B.
        change: float, ‖dW‖, the Frobenius norm.
        error: float, ‖dW - A·B‖ / ‖dW‖, measured; 0 where dW is 0.
    """

    path: str
    matrix: tuple[int, int]
    rank: int
    change: float
    error: float


@dataclasses.dataclass(frozen=True)
class LowRankProduct:
    """dW of one layer as A·B: a (in, k), b (k, out), float32 arrays."""

    a: np.ndarray
    b: np.ndarray
    measured: LayerConversion


def low_rank_products(
    targets: dict[str, Target], rank: int | None
) -> dict[str, LowRankProduct]:
    """Computes A·B for every adapted matrix; changes nothing.

    `targets` are adapted matrices by path; `rank` is as for `to_lora`.
    """
    if rank is not None:
        rank = check_whole_number("rank", rank, 1)
    jobs = {
        path: functools.partial(thin_product, path, target, rank)
        for path, target in targets.items()
    }
    return run_all("LoRA: converting", jobs)


def thin_product(path: str, target: Target, rank: int | None) -> LowRankProduct:
    """Computes A·B for one adapted matrix, by `to_lora`'s rules."""
    adapter = target.adapted
    method = adapter.method
    matrix, change = weight_and_change(path, target)
    if rank is not None:
        rank = min(rank, *change.shape)
    if rank is None or (isinstance(method, LoRA) and method.rank == rank):
        factors = method.low_rank_factors(adapter.current, matrix)
        if factors is None:
            raise ValueError(
                f"{method.title} adds no matrix of low rank to a kernel, so "
                "the rank of its approximation must be given, such as "
                "`rank=16`. Received: rank=None"
            )
        a, b = (to_numpy(x) for x in factors)
        if 1 <= a.shape[1] <= min(change.shape):
            return _with_error(path, change, a, b)
        # PiSSA's 2r may exceed min(in, out); AdaLoRA's rank may be 0.
        rank = min(max(a.shape[1], 1), *change.shape)
    assert rank is not None
    top = top_on_host(change, rank)
    assert top.u is not None and top.v is not None
    # B holds all of s, as B holds LoRA's zeros at first: A has its full
    # size, so that B trains even where dW is zero.
    return _with_error(path, change, top.u, top.s[:, None] * top.v.T)


def _with_error(
    path: str, change: np.ndarray, a: np.ndarray, b: np.ndarray
) -> LowRankProduct:
    found = a.astype("float64") @ b.astype("float64")
    return LowRankProduct(a, b, measure(path, change, found, a.shape[1]))


def weight_and_change(path: str, target: Target) -> tuple[Tensor, np.ndarray]:
    """Returns W of an adapted matrix, and its dW = W' - W in float64."""
    adapter = target.adapted
    if adapter.replaced is not None:
        raise ValueError(
            f"Layer '{path}' has a base that was made for its adapter "
            f"({adapter.method}): without the adapter that base is no "
            "model, so nothing can be added to it. "
            "Merge the adapter instead."
        )
    place = placement_of(target.kernel)
    if place is not None and place.mesh.size > 1:
        raise ValueError(
            f"Layer '{path}' is on {place.mesh.size} devices, where an adapter "
            "is not converted. Save it by `save_adapter`, and load it into "
            "the model on one device."
        )
    if target.view.count is not None:
        raise ValueError(
            f"Layer '{path}' is a bank of matrices, of which no single A·B is "
            "made. Merge the adapter instead."
        )
    matrix = target.matrix()
    merged = to_numpy(adapter.merged(matrix))
    change = merged.astype("float64") - to_numpy(matrix)
    if not np.isfinite(change).all():
        raise ValueError(
            f"The adapter of layer '{path}' holds NaN or infinity. Load or "
            "train it again."
        )
    return matrix, change


def measure(
    path: str, change: np.ndarray, found: np.ndarray, rank: int
) -> LayerConversion:
    """Measures the error of `found`; both matrices (in, out), float64."""
    norm = float(np.linalg.norm(change))
    error = float(np.linalg.norm(change - found)) / norm if norm else 0.0
    return LayerConversion(path, change.shape, rank, norm, error)
