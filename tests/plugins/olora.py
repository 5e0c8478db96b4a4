"""OLoRA, a method that is no part of the package: all of it is in this file."""

import dataclasses

import numpy as np
from keras import ops

from keras_svdtune.methods.base import IN, OUT, Weight, register
from keras_svdtune.methods.low_rank import RankedMethod, branch
from keras_svdtune.methods.picture import Block


@register
@dataclasses.dataclass(frozen=True)
class OLoRA(RankedMethod):
    """Orthonormal low-rank adaptation: A·B starts from the QR factors of W.

    With W = Q·R, whose Q has orthonormal columns and whose R has no negative
    number on its diagonal:

        y = x·W + (alpha / rank)·(x·A·B - x·A₀·B₀),
        A₀ = Q[:, :r] (in, r),  B₀ = R[:r, :] (r, out)

    W stays as it is, and ΔA = A - A₀ and ΔB = B - B₀ train, from zero. (PEFT
    decomposes Wᵀ, and so has other A₀ and B₀.)

    Trainable: r·(in + out) a matrix, and as many frozen.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.
        alpha: float or None. The scale is alpha / rank; None means rank,
            a scale of 1.

    Reference: Büyükakyüz 2024, https://arxiv.org/abs/2406.01775.
    """

    name = "olora"
    title = "OLoRA"
    example = ", rank=8"
    formula = (
        r"W' = W + \frac{\alpha}{r} (A B - A_0 B_0), \qquad W = Q R, \quad"
        r" A_0 = Q_r, \quad B_0 = R_r, \qquad A, B \text{ train}"
    )
    picture = (
        Block("W", "in", "out"),
        "=",
        Block("A from Q", "in", "n", trains="first"),
        Block("B from R", "n", "out", trains="first"),
    )

    rank: int
    alpha: float | None = None

    def weights(self, shape):
        rows, columns = shape
        a, b = (rows, self.rank), (self.rank, columns)
        return [
            Weight("delta_a", a, trainable=True, axes=(IN, None)),
            Weight("delta_b", b, trainable=True, axes=(None, OUT)),
            # Saved: a file then gives the same function on every machine.
            Weight("a0", a, saved=True, axes=(IN, None)),
            Weight("b0", b, saved=True, axes=(None, OUT)),
        ]

    def initial_values(self, matrix, factors, random):
        q, r = np.linalg.qr(ops.convert_to_numpy(matrix).astype("float64"))
        signs = np.where(np.diagonal(r) < 0, -1.0, 1.0)
        a0, b0 = q * signs, signs[:, None] * r
        return {"a0": a0[:, : self.rank], "b0": b0[: self.rank]}

    def low_rank_factors(self, weights, matrix=None):
        # A·B - A₀·B₀ = ΔA·B + A₀·ΔB = [ΔA A₀]·[B; ΔB], exactly 0 at first.
        a0, b0 = (ops.cast(x, "float32") for x in (weights.a0, weights.b0))
        b = weights.delta_b + b0
        return (
            ops.concatenate([weights.delta_a, a0], axis=1),
            ops.concatenate([b, weights.delta_b], axis=0) * self.scale,
        )

    def call(self, weights, base):
        return base() + branch(base, *self.low_rank_factors(weights), 1.0)

    def merged(self, weights, matrix):
        return matrix + ops.matmul(*self.low_rank_factors(weights))
