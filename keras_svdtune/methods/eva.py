"""EVA: a LoRA that starts from the directions in which inputs vary most."""

import dataclasses

import numpy as np

from keras_svdtune.matrix.decompose import top_eigenvectors
from keras_svdtune.methods.base import register
from keras_svdtune.methods.data_method import DataMethod, Inputs, Seen
from keras_svdtune.methods.low_rank import TwoFactors, random_a
from keras_svdtune.methods.picture import Block
from keras_svdtune.runtime.types import Array


@register
@dataclasses.dataclass(frozen=True)
class EVA(DataMethod, TwoFactors):
    """Explained variance adaptation: LoRA, and A starts from the data.

        y = x·W + (alpha / rank)·x·A·B,
        A (in, r) = the first r principal components of x, B (r, out) = 0

    The components are eigenvectors of the covariance of the x that come into
    the layer, about their mean, as in the authors' code: the directions in
    which they vary most. Take it where LoRA is used, to learn more in the first
    steps, as its authors claim.

    Where the data has fewer rows than the rank, the directions beyond are
    arbitrary. All layers have the same rank: the authors' sharing of ranks
    among layers is not here (it is theirs with rho = 1). Layers that are
    declared (`EVADense`) see no data, and start as LoRA does.

    Trainable: r·(in + out) a matrix. What is trained is a LoRA: a file holds A
    and B, and is loaded without data. The learning rate is LoRA's; not swept.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.
        alpha: float or None. The branch is scaled by alpha / rank; None
            means rank, a scale of 1.
        data: by keyword only, what `fit` takes: for a Task with a preprocessor
            texts, for any other model arrays or a dict of them; `(x, y)` and
            `(x, y, sample_weight)` as a tuple; or a `tf.data.Dataset`, a
            `PyDataset` or another iterable of batches. Only x counts.
        examples: by keyword only, int. How many of them are read; of ready
            batches, whole ones.

    Example:

    ```python
    gemma.enable_eva(rank=8, data=texts)
    ```

    Reference: Paischer et al. 2024, https://arxiv.org/abs/2410.07170.
    """

    name = "eva"
    title = "EVA"
    statistic = "inputs"
    banks = False
    embeddings = False
    example = ", rank=8"
    formula = (
        r"W' = W + \frac{\alpha}{r} A B, \qquad A, B \text{ train,}"
        r" \quad A = \text{eigenvectors}_r(\text{Cov}(x)),"
        r" \; B = 0 \text{ at first}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("A from Cov(x)", "in", "r", trains="all"),
        Block("B", "r", "out", trains="all"),
    )

    rank: int
    alpha: float | None = None

    def start(
        self,
        matrix: np.ndarray,
        seen: Seen | None,
        random: np.random.RandomState,
    ) -> dict[str, Array]:
        if seen is None:
            return {"a": random_a(len(matrix), self.rank, random)}
        assert isinstance(seen, Inputs)
        return {"a": top_eigenvectors(seen.covariance, self.rank)}
