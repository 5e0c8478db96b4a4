"""CorDA: PiSSA by the components that matter to the inputs of a layer."""

import dataclasses
from typing import Literal

import numpy as np

from keras_svdtune.matrix.decompose import computed
from keras_svdtune.matrix.factors import Needs
from keras_svdtune.methods.base import register
from keras_svdtune.methods.data_method import DataMethod, Inputs, Seen
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.pissa import StartedLoRA
from keras_svdtune.runtime.types import Array

# What the authors add to the diagonal of C, as a share of its mean.
_DAMPING = 0.01


@register
@dataclasses.dataclass(frozen=True)
class CorDA(DataMethod, StartedLoRA):
    """Context-oriented decomposition adaptation: PiSSA of C·W.

    With C = XᵀX of the x that come into the layer, and C·W = U diag(s) Vᵀ, A
    and B start from r components of it:

        y = x·W + (alpha / rank)·(x·A·B - x·A₀·B₀),
        A₀ = C⁻¹·U_r·√s_r (in, r),  B₀ = √s_r·V_rᵀ (r, out)

    The largest components are those of W that the data uses most, the smallest
    those that it can do without. Which of them train says `goal`:

    - `"learn"`: the data is of the task, and the largest train. Take it to
      learn faster than PiSSA does, as its authors claim (their
      instruction-previewed mode).
    - `"keep"`: the data is of what the model is to keep, and the smallest
      train. Take it to forget less than LoRA does, as its authors claim (their
      knowledge-preserved mode).

    C is divided by the mean of its diagonal, on which the product A₀·B₀ does
    not depend, and 0.01 is added to that, as in the authors' code. Since C⁻¹·U
    = W·V / s, C is never inverted. W is never changed. Layers that are declared
    (`CorDADense`) see no data: C is the identity there, and the start that of
    PiSSA or MiLoRA.

    Trainable: r·(in + out) a matrix, and as many frozen, which are in the file
    too. The variables that train hold 4·ΔA and 4·ΔB, as for PiSSA; not swept.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer.
        alpha: float or None. The scale is alpha / rank; None means rank,
            a scale of 1.
        goal: `"learn"` or `"keep"`.
        data: by keyword only, as for `EVA`.
        examples: by keyword only, int. How many of them are read; the authors
            take 256 of 2048 tokens.

    Example:

    ```python
    gemma.enable_corda(rank=16, data=texts)
    gemma.enable_corda(rank=16, goal="keep", data=questions_of_the_world)
    ```

    Reference: Yang et al. 2024, https://arxiv.org/abs/2406.05223.
    """

    name = "corda"
    title = "CorDA"
    statistic = "inputs"
    step = 0.25
    banks = False
    embeddings = False
    example = ", rank=8"
    formula = (
        r"W' = W + \frac{\alpha}{r} (A B - A_0 B_0), \qquad"
        r" C W = U S V^\top, \; C = X^\top X, \quad"
        r" A_0 = C^{-1} U_r \sqrt{s_r}, \; B_0 = \sqrt{s_r} V_r^\top,"
        r" \qquad A, B \text{ train}"
    )
    picture = (
        Block("A from C⁻¹·U·√s", "in", "n", trains="first"),
        Block("diag(s) of C·W", "n", "n", trains="frozen"),
        Block("B from √s·Vᵀ", "n", "out", trains="first"),
    )

    rank: int
    alpha: float | None = None
    goal: Literal["learn", "keep"] = "learn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goal not in ("learn", "keep"):
            raise ValueError(
                "`goal` must be 'learn', for data of what is to be learned, "
                "or 'keep', for data of what is not to be forgotten. "
                f"Received: goal={self.goal!r}"
            )

    def start(
        self,
        matrix: np.ndarray,
        seen: Seen | None,
        random: np.random.RandomState,
    ) -> dict[str, Array]:
        w = matrix.astype("float64")
        product = w
        if seen is not None:
            assert isinstance(seen, Inputs)
            c = seen.gram / np.mean(np.diagonal(seen.gram))
            c[np.diag_indices(len(c))] += _DAMPING
            product = c @ w
        part: Literal["top", "bottom"]
        part = "top" if self.goal == "learn" else "bottom"
        factors = computed(product, Needs(part, self.rank))
        assert factors.v is not None
        v = factors.v.astype("float64")
        # Of this v, which is rounded: where s is rounding alone, so is W·v, and
        # A₀ stays small, since no |C·W·v| is below 0.01·|W·v|.
        s = np.linalg.norm(product @ v, axis=0) / self.scale
        # A component with s = 0 has A₀ = B₀ = 0 and stays as it is.
        nonzero = s > 0.0
        root = np.sqrt(np.where(nonzero, s, 1.0))
        a0 = np.where(nonzero, (w @ v) / root / self.scale, 0.0)
        return {"a0": a0, "b0": np.where(nonzero, v * root, 0.0).T}
