"""LoRA-GA: a low-rank adapter that starts along the first gradient."""

import dataclasses

import numpy as np

from keras_svdtune.matrix.decompose import computed
from keras_svdtune.matrix.factors import Needs
from keras_svdtune.methods.base import register
from keras_svdtune.methods.data_method import DataMethod, Seen
from keras_svdtune.methods.low_rank import random_a
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.pissa import StartedLoRA
from keras_svdtune.methods.settings import check_number
from keras_svdtune.runtime.types import Array


@register
@dataclasses.dataclass(frozen=True)
class LoRAGA(DataMethod, StartedLoRA):
    """Low-rank adaptation with gradient approximation.

    With G = ∂L/∂W = U diag(s) Vᵀ, averaged over some batches, A and B start
    from its singular vectors, A from the r largest and B from the r after them:

        y = x·W + (alpha / rank)·(x·A·B - x·A₀·B₀),
        A₀ = c·U[:, :r] (in, r),  B₀ = c·V[:, r:2r]ᵀ (r, out),
        c = out^(1/4) / √gamma

    So the first step changes W much as a step of full fine-tuning would. Take
    it where LoRA is used, to need fewer steps, as its authors claim. A matrix
    of fewer than 2r components has B from the last r of them. W is never
    changed.

    PEFT multiplies V by its singular values and by c, and U by neither. The
    authors' scale is that of rsLoRA: give alpha·√rank. Layers that are declared
    (`LoRAGADense`) see no data, and start as LoRA does.

    Trainable: r·(in + out) a matrix, and as many frozen, which are in the file
    too. The learning rate is LoRA's; not swept.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.
        alpha: float or None. The scale is alpha / rank; None means rank,
            a scale of 1.
        gamma: float above 0; the larger it is, the smaller is the start.
        data: by keyword only, as for `EVA`, with what the loss needs: texts for
            a causal language model, `(x, y)` for others. The model is a Task,
            or another one that was compiled with a loss, not a Backbone.
        examples: by keyword only, int. How many of them are read; of ready
            batches, whole ones.

    Example:

    ```python
    gemma.enable_lora_ga(rank=8, data=texts)
    ```

    Reference: Wang, Yu, Li 2024, https://arxiv.org/abs/2407.05000.
    """

    name = "lora_ga"
    title = "LoRA-GA"
    statistic = "gradient"
    example = ", rank=8"
    formula = (
        r"W' = W + \frac{\alpha}{r} (A B - A_0 B_0), \qquad"
        r" \frac{\partial L}{\partial W} = U S V^\top, \quad"
        r" A_0 = c U_{1..r}, \; B_0 = c V_{r+1..2r}^\top,"
        r" \; c = \frac{\sqrt[4]{\text{out}}}{\sqrt{\gamma}},"
        r" \qquad A, B \text{ train}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("A from U of ∂L/∂W", "in", "r", trains="all"),
        Block("B from V of ∂L/∂W", "r", "out", trains="all"),
    )

    rank: int
    alpha: float | None = None
    gamma: float = 16.0
    examples: int = dataclasses.field(default=64, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 1e-6)

    def start(
        self,
        matrix: np.ndarray,
        seen: Seen | None,
        random: np.random.RandomState,
    ) -> dict[str, Array]:
        if seen is None:  # b0 is 0
            return {"a0": random_a(len(matrix), self.rank, random)}
        assert isinstance(seen, np.ndarray)
        gradient = seen / np.abs(seen).max()
        wanted = min(2 * self.rank, *gradient.shape)
        factors = computed(gradient, Needs("top", wanted))
        assert factors.u is not None and factors.v is not None
        c = gradient.shape[1] ** 0.25 / np.sqrt(self.gamma)
        return {
            "a0": c * factors.u[:, : self.rank],
            "b0": c * factors.v[:, -self.rank :].T,
        }
