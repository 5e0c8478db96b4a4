"""What the low-rank methods share: the branch x·A·B beside the base."""

from typing import Any

from keras import ops

from keras_svdtune.methods.base import LinearMap


def branch(base: LinearMap, a: Any, b: Any, scale: float) -> Any:
    """scale·(x·A)·B for the x of `base`, A (in, r), B (r, out), in its dtype.

    A·B is never formed: with it the backward pass would form dW.
    """
    if scale != 1.0:
        b = b * scale  # r·out numbers, not tokens·out
    xa = base.times(ops.cast(a, base.dtype))
    return ops.matmul(xa, ops.cast(b, base.dtype))


def scale_of(alpha: float | None, rank: int | float) -> float:
    """alpha / rank; alpha defaults to the rank, that is a scale of 1."""
    return 1.0 if alpha is None else alpha / rank
