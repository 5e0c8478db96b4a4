"""What the low-rank methods share: the branch x·A·B beside the base."""

from typing import Any

from keras import ops


def branch(x: Any, a: Any, b: Any, scale: float) -> Any:
    """scale·(x·A)·B for x (tokens, in), A (in, r), B (r, out), in x's dtype.

    A·B is never formed: with it the backward pass would form dW.
    """
    if scale != 1.0:
        b = b * scale  # r·out numbers, not tokens·out
    return ops.matmul(ops.matmul(x, ops.cast(a, x.dtype)), ops.cast(b, x.dtype))


def scale_of(alpha: float | None, rank: int | float) -> float:
    """alpha / rank; alpha defaults to the rank, that is a scale of 1."""
    return 1.0 if alpha is None else alpha / rank
