"""LoRA: a trainable low-rank branch beside W, the baseline."""

import dataclasses

import numpy as np

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import register
from keras_svdtune.methods.dropout import DropsInput
from keras_svdtune.methods.low_rank import TwoFactors, random_a
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.settings import check_seed
from keras_svdtune.runtime.types import Tensor


@register
@dataclasses.dataclass(frozen=True)
class LoRA(DropsInput, TwoFactors):
    """Low-rank adaptation: two thin trainable matrices beside W.

        y = x·W + (alpha / rank)·x·A·B,     A (in, r) random, B (r, out) = 0

    in and out are those of the flattened matrix, as in the paper. Keras'
    `enable_lora` factorises the last kernel axis only, with more parameters for
    a query kernel (heads, in, head_dim), and merges the kernel on every step.

    Trainable: r·(in + out) a matrix.

    `suggested_learning_rate` is 1e-3. Short runs on small models want that and
    more (3e-3 for a style on SmolLM2-135M, `tests/benchmarks/study.py`), long
    ones on large models less: 2e-4 was the best for Qwen3-0.6B at rank 128
    (https://arxiv.org/abs/2602.04998).

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.
        alpha: float or None. The branch is scaled by alpha / rank; None
            means rank, a scale of 1. (For rsLoRA's scale, alpha / sqrt(rank),
            give alpha·sqrt(rank).)
        seed: int. Seed of A.
        dropout: by keyword only, float, 0 or more and below 1: the probability
            with which the branch sees a zero in place of a number of x, in
            training alone: x·W + (alpha / rank)·x̃·A·B, with x̃ the rest of x
            over 1 - dropout. Embeddings have none, as in PEFT.

    Example:

    ```python
    gemma.backbone.enable_adapter(keras_svdtune.LoRA(rank=8))
    ```

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """

    name = "lora"
    title = "LoRA"
    example = ", rank=8"
    has_enable = False
    formula = (
        r"W' = W + \frac{\alpha}{r} A B, \qquad A, B \text{ train, }"
        r" B = 0 \text{ at first}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("A", "in", "r", trains="all"),
        Block("B", "r", "out", trains="all"),
    )

    rank: int
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        return {"a": random_a(matrix.shape[0], self.rank, random)}
