"""MiCA: a low-rank branch whose outputs stay in W's minor directions."""

import dataclasses
from typing import Literal

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
from keras_svdtune.methods.dropout import DropsInput
from keras_svdtune.methods.low_rank import ProductMethod
from keras_svdtune.methods.picture import Block
from keras_svdtune.runtime.types import Shape, Tensor


@register
@dataclasses.dataclass(frozen=True)
class MiCA(DropsInput, ProductMethod):
    """Minor component adaptation: LoRA with half of it frozen.

    With the r smallest components of W = U diag(s) Vᵀ, of the n = min(in, out)
    that it has:

        y = x·W + (alpha / rank)·(x·A)·V₋ᵣᵀ,
        A (in, r) trainable, 0 at first; V₋ᵣ (out, r) frozen

    W itself reaches these directions of the output least, so what is learned
    there disturbs little of what W computes. `part="top"` takes the r largest
    components instead: this is the projection of PiCa, without that method's
    sharing of A among layers.

    V₋ᵣ is that of W rounded to bfloat16 (`Method.rebuilds_basis`), where the
    authors and PEFT take W as it is. The two are the same for weights that came
    in bfloat16; elsewhere directions that W reaches by less than the rounding
    are not told apart.

    Trainable: r·in a matrix; frozen beside W: r·out. Adapters add up exactly.

    The authors advise half of LoRA's rank and twice its learning rate: the
    variable that trains holds A / 2, so that LoRA's rate is right. Not swept.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.
        alpha: float or None. The scale is alpha / rank; None means rank,
            a scale of 1.
        part: `"bottom"` for the smallest components, `"top"` for the largest.
        dropout: by keyword only, float, 0 or more and below 1: as for `LoRA`.

    Example:

    ```python
    gemma.backbone.enable_mica(rank=8)
    ```

    References:
        Rüdiger, Raschka 2026, https://arxiv.org/abs/2604.01694;
        for `part="top"`: PiCa, 2025, https://arxiv.org/abs/2505.20211.
    """

    name = "mica"
    title = "MiCA"
    linear = True
    rebuilds_basis = True
    example = ", rank=8"
    formula = (
        r"W' = W + \frac{\alpha}{r} A V_{-r}^\top, \qquad"
        r" A \in \mathbb{R}^{\text{in} \times r} \text{ trains, }"
        r" 0 \text{ at first}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("A", "in", "r", trains="all"),
        Block("V₋ᵣᵀ", "r", "out"),
    )

    rank: int
    alpha: float | None = None
    part: Literal["bottom", "top"] = "bottom"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in ("bottom", "top"):
            raise ValueError(
                "`part` must be 'bottom', for the smallest components, or "
                f"'top', for the largest. Received: part={self.part!r}"
            )

    def needs(self, shape: Shape) -> Needs:
        return Needs(self.part, self.rank)

    def weights(self, shape: Shape) -> list[Weight]:
        rows, columns = shape
        return [
            Weight("v", (columns, self.rank), axes=(OUT, None)),
            Weight(
                "a",
                (rows, self.rank),
                trainable=True,
                step=2.0,
                axes=(IN, None),
            ),
        ]

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        assert factors is not None
        return {"v": factors.v}

    def factors(self, weights: Weights) -> tuple[Tensor, Tensor]:
        a = weights.a * self.scale
        return a, ops.transpose(ops.cast(weights.v, a.dtype))
