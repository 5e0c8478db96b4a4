"""PSOFT: turns W's largest components into each other."""

import dataclasses

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.base import (
    IN,
    OUT,
    Weight,
    Weights,
    register,
)
from keras_svdtune.methods.low_rank import ProductMethod
from keras_svdtune.methods.picture import Block
from keras_svdtune.runtime.types import Shape, Tensor


@register
@dataclasses.dataclass(frozen=True)
class PSOFT(ProductMethod):
    """Orthogonal fine-tuning in the principal subspace of W.

    With the r largest components of W = U diag(s) Vᵀ:

        y = x·W + (x·A)·(diag(α)·R·diag(β) - I)·B,
        A = U_r (in, r) and B = diag(s_r)·V_rᵀ (r, out) frozen,
        R (r, r) orthogonal, I at first; α, β (r,), 1 at first; trainable

    R turns the components into each other and keeps their lengths and angles,
    which α and β may change a little. It is Cayley's (I + Q)·(I - Q)⁻¹ of a
    skew matrix Q, of which the entries above the diagonal train, from 0. What
    trains of α and β are their distances from 1: these stay exact where
    numbers near 1 do not, and R - I is computed as 2·(I - Q)⁻¹·Q, so that the
    start is exactly x·W. The inverse is solved for and not approximated by a
    series, in float32.

    A and B are those of W rounded to bfloat16 (`Method.rebuilds_basis`), where
    the authors and PEFT take W as it is. There is no `alpha`: PEFT divides B by
    the scale that it multiplies by.

    Trainable: r·(r + 3)/2 a matrix; frozen beside W: r·(in + out). A component
    with s = 0 stays as it is.

    PEFT's documentation advises learning rates of 1e-4 to 5e-3, and ranks of 32
    to 256. Not swept.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.

    Example:

    ```python
    gemma.backbone.enable_psoft(rank=64)
    ```

    Reference: Wu et al. 2025, https://arxiv.org/abs/2505.11235.
    """

    name = "psoft"
    title = "PSOFT"
    rebuilds_basis = True
    example = ", rank=8"
    formula = (
        r"W' = W + U_r \bigl(\operatorname{diag}(\alpha) R"
        r" \operatorname{diag}(\beta) - I\bigr) \operatorname{diag}(s_r)"
        r" V_r^\top, \qquad R^\top R = I, \qquad R, \alpha, \beta"
        r" \text{ train}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("Uᵣ", "in", "r"),
        Block("αRβ - I", "r", "r", trains="all"),
        Block("sᵣ·Vᵣᵀ", "r", "out"),
    )

    rank: int

    def needs(self, shape: Shape) -> Needs:
        return Needs("top", self.rank)

    def weights(self, shape: Shape) -> list[Weight]:
        rows, columns = shape
        r = self.rank
        found = [
            Weight("a", (rows, r), axes=(IN, None)),
            Weight("b", (r, columns), axes=(None, OUT)),
            Weight("alpha_change", (r,), trainable=True),
            Weight("beta_change", (r,), trainable=True),
        ]
        if r > 1:  # a matrix of one component has no other to turn it into
            found.append(Weight("skew", (r * (r - 1) // 2,), trainable=True))
        return found

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        assert factors is not None and factors.v is not None
        return {"a": factors.u, "b": factors.s[:, None] * factors.v.T}

    def core(self, weights: Weights, s: np.ndarray) -> np.ndarray:
        found = np.zeros((len(s), len(s)))
        turn = ops.convert_to_numpy(self._turn(weights))
        found[: self.rank, : self.rank] = turn * s[: self.rank]
        return found

    def factors(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Returns (in, r) and (r, out), whose product is added to W."""
        turn = self._turn(weights)
        a, b = (ops.cast(x, turn.dtype) for x in (weights.a, weights.b))
        return ops.matmul(a, turn), b

    def _turn(self, weights: Weights) -> Tensor:
        """Computes diag(α)·R·diag(β) - I (r, r), exactly 0 at the start."""
        alpha, beta = weights.alpha_change, weights.beta_change
        identity = ops.eye(self.rank, dtype=alpha.dtype)
        turn = identity * (alpha + beta + alpha * beta)
        if self.rank == 1:
            return turn
        q = skew_matrix(weights.skew, self.rank)
        r_change = ops.solve(identity - q, 2.0 * q)
        rows = ops.expand_dims(1.0 + alpha, 1)
        return turn + rows * r_change * (1.0 + beta)


def skew_matrix(above: Tensor, size: int) -> Tensor:
    """Returns Q = -Qᵀ (size, size), given its rows above the diagonal."""
    # Each place takes its entry, or the zero that is put after the last one.
    place = np.full((size, size), size * (size - 1) // 2, "int32")
    place[np.triu_indices(size, 1)] = np.arange(size * (size - 1) // 2)
    above = ops.convert_to_tensor(above)
    padded = ops.concatenate([above, ops.zeros((1,), above.dtype)])
    upper = ops.take(padded, place, axis=0)
    return upper - ops.transpose(upper)
