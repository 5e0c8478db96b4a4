"""AdaLoRA: low-rank adapters that share one budget of ranks."""

import dataclasses
from typing import Self

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import (
    IN,
    OUT,
    LinearMap,
    Weight,
    Weights,
    register,
)
from keras_svdtune.methods.dropout import DropsInput
from keras_svdtune.methods.low_rank import RankedMethod, branch
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.settings import (
    check_number,
    check_seed,
    check_whole_number,
)
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Shape, Tensor

# How much further than LoRA's A and B one step of Adam moves them: the branch
# is a product of three that start from 0.02 and 0, so it grows slowly. With
# these AdaLoRA's best rates in the study are LoRA's, within a step of √10, and
# at KerasHub's 2e-5 it learns no less than Keras' `enable_lora`.
_STEPS = {"p": 8.0, "singular_values": 16.0, "q": 8.0}


@register
@dataclasses.dataclass(frozen=True)
class AdaLoRA(DropsInput, RankedMethod):
    """Adaptive budget allocation: ranks go where they matter.

        y = x·W + (alpha / r)·((x·P) ⊙ λ ⊙ mask)·Q

    P (in, r) and Q (r, out) are normal with deviation 0.02, λ (r,) = 0, mask
    (r,) = 1, and r is the initial rank. The loss gets the additional term

        regularization · mean over all P and Q of ‖PᵀP - I‖ (‖QQᵀ - I‖)

    the Frobenius norm itself, as in the authors' code and PEFT; the paper
    squares it.

    Each weight w keeps two smoothed numbers: its sensitivity |w·∂L/∂w|, L
    without that term, and how much this varies. Their product is its
    importance. The callback `RankAllocator` adds it up for each triplet
    (column of P, λ, row of Q), zeroes the λ of the least important triplets
    of the whole model while the budget falls, and at the end fixes the mask
    with exactly `rank` triplets a layer on average:

    ```python
    gemma.backbone.enable_adalora(rank=8)
    gemma.fit(data, callbacks=[keras_svdtune.RankAllocator()])
    ```

    Trainable: r·(in + out + 1) a matrix; for the importance, twice as many
    frozen. The variables that train hold P / 8, λ / 16 and Q / 8, so that
    AdaLoRA learns at rates that suit LoRA (`tests/benchmarks/study.py`). The
    authors, in longer runs, used 5e-4 to 2.2e-3 for P, λ and Q.

    Args:
        rank: int, 1 or more, the average rank at the end. A layer with a
            smaller min(in, out) counts with that.
        initial_rank: int or None, the rank of every layer at first, at most
            its min(in, out); None means 1.5 times `rank`, as the authors
            advise.
        alpha: float or None. The scale is alpha / initial_rank; None is a
            scale of 1.
        regularization: float, 0 or more, the weight of the additional term.
        smoothing: float in [0, 1), of sensitivity and variation (the paper's
            β₁ = β₂).
        seed: int. Seed of P and Q.
        dropout: by keyword only, float, 0 or more and below 1: as for `LoRA`.

    Reference: Zhang et al. 2023, https://arxiv.org/abs/2303.10512. The
    budget falls as in its code, cut to an integer; the equation that it
    prints jumps.
    """

    name = "adalora"
    title = "AdaLoRA"
    shares_ranks = True
    example = ", rank=8"
    banks = False  # one rank for each expert would be needed
    embeddings = False  # two calls in a step would count twice
    formula = (
        r"W' = W + \frac{\alpha}{r} P"
        r" \operatorname{diag}(\lambda \odot \mathrm{mask}) Q,"
        r" \qquad P, \lambda, Q \text{ train}"
    )
    picture = (
        Block("W", "in", "out"),
        "+",
        Block("P", "in", "2r", trains="all"),
        Block("λ ⊙ mask", "2r", "2r", trains="some"),
        Block("Q", "2r", "out", trains="all"),
    )

    rank: int
    initial_rank: int | None = None
    alpha: float | None = None
    regularization: float = 0.1
    smoothing: float = 0.85
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_rank is not None:
            check_whole_number("initial_rank", self.initial_rank, 1)
            if self.initial_rank < self.rank:
                raise ValueError(
                    "`initial_rank` must not be below `rank`. Received: "
                    f"initial_rank={self.initial_rank}, rank={self.rank}"
                )
        check_number("smoothing", self.smoothing, 0.0, 1.0)
        check_number("regularization", self.regularization, 0.0)
        check_seed(self.seed)

    @property
    def first_rank(self) -> int:
        """The initial rank of every layer."""
        return self.initial_rank or -(-3 * self.rank // 2)

    @property
    def scale(self) -> float:
        """The factor alpha / initial rank of the branch; 1 if alpha is None."""
        return 1.0 if self.alpha is None else self.alpha / self.first_rank

    def for_shape(self, shape: Shape) -> Self:
        n = min(shape)
        if self.first_rank <= n:
            return self
        rank = min(self.rank, n)
        return dataclasses.replace(self, rank=rank, initial_rank=n)

    def weights(self, shape: Shape) -> list[Weight]:
        rows, columns = shape
        r = self.first_rank
        shapes = {"p": (rows, r), "singular_values": (r,), "q": (r, columns)}
        penalties = {
            "p": lambda p: self.regularization / 2 * orthogonality(p),
            "q": lambda q: (
                self.regularization / 2 * orthogonality(ops.transpose(q))
            ),
        }
        axes: dict[str, tuple[str | None, ...]]
        axes = {"p": (IN, None), "singular_values": (None,), "q": (None, OUT)}
        found = [
            Weight(
                x,
                shapes[x],
                trainable=True,
                step=_STEPS[x],
                regularizer=penalties.get(x),
                axes=axes[x],
            )
            for x in shapes
        ]
        found.append(Weight("mask", (r,), saved=True, dtype="float32"))
        found.append(Weight("calls", (1,), overwritten=True))
        found += [
            Weight(f"{x}_{what}", shapes[x], overwritten=True, axes=axes[x])
            for x in shapes
            for what in ("sensitivity", "variation")
        ]
        return found

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        rows, columns = matrix.shape
        return {
            "p": random.normal(0.0, 0.02, (rows, self.first_rank)),
            "q": random.normal(0.0, 0.02, (self.first_rank, columns)),
            "mask": np.ones(self.first_rank),
        }

    def neutral(self, weights: Weights) -> dict[str, Tensor]:
        return {"singular_values": ops.zeros((self.first_rank,))}

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        p = self._sensed(weights, "p")
        q = self._sensed(weights, "q")
        values = self._sensed(weights, "singular_values") * weights.mask
        return base() + branch(base, p * values, q, self.scale)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        # `_sensed` here too: some layers compute with the merged kernel.
        p, q = self._sensed(weights, "p"), self._sensed(weights, "q")
        values = self._sensed(weights, "singular_values") * weights.mask
        return matrix + self.scale * ops.matmul(p * values, q)

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns factors of the current rank: masked triplets are left out."""
        mask = ops.convert_to_tensor(weights.mask)
        (kept,) = np.nonzero(ops.convert_to_numpy(mask))
        a = weights.p * (weights.singular_values * self.scale)
        return ops.take(a, kept, axis=1), ops.take(weights.q, kept, axis=0)

    def current_rank(self, weights: Weights | None) -> int:
        if weights is None:  # not enabled yet
            return self.first_rank
        return int(ops.sum(weights.mask))

    def importance(self, weights: Weights) -> np.ndarray:
        """Computes the importance of each triplet (r,); 0 for masked ones."""
        scores = {
            x: to_numpy(getattr(weights, f"{x}_sensitivity").value)
            * to_numpy(getattr(weights, f"{x}_variation").value)
            for x in ("p", "singular_values", "q")
        }
        total = scores["p"].mean(axis=0) + scores["q"].mean(axis=1)
        mask = to_numpy(weights.mask.value)
        return np.asarray((total + scores["singular_values"]) * mask)

    def _sensed(self, weights: Weights, name: str) -> Tensor:
        """Returns the weight `name`; its backward pass updates its importance.

        Keras assigns to a variable marked `overwrite_with_gradient` what the
        backward pass returns for it. So the new averages are computed where the
        gradient is known, within the compiled step of any backend. Where a
        model calls the layer several times in a step, these results are added
        up: `calls`, to which each adds 1, says how many share the old average.
        """
        beta = self.smoothing

        @ops.custom_gradient  # type: ignore[untyped-decorator]
        def sensed(
            w: Tensor, sensitivity: Tensor, variation: Tensor, calls: Tensor
        ) -> Tensor:
            def grad(*args: Tensor, upstream: Tensor = None) -> Tensor:
                g = args[0] if upstream is None else upstream
                share = beta / ops.maximum(calls, 1.0)  # 0 in the first step
                now = ops.absolute(w * g)
                mean = share * sensitivity + (1.0 - beta) * now
                spread = ops.absolute(now - mean)
                return (
                    g,
                    mean,
                    share * variation + (1.0 - beta) * spread,
                    ops.ones_like(calls) * (1.0 if name == "p" else 0.0),
                )

            # Not w itself: torch would return the input unchanged.
            return w * 1.0, grad

        # `* 1.0` makes tensors: TensorFlow wants no variables in there.
        return sensed(
            getattr(weights, name) * 1.0,
            getattr(weights, f"{name}_sensitivity") * 1.0,
            getattr(weights, f"{name}_variation") * 1.0,
            weights.calls * 1.0,
        )


def orthogonality(p: Tensor) -> Tensor:
    """Computes ‖PᵀP - I‖, the Frobenius norm, for P (in, r)."""
    gram = ops.matmul(ops.transpose(p), p)
    identity = ops.eye(gram.shape[0], dtype=gram.dtype)
    squares = ops.sum(ops.square(gram - identity))
    # At exactly 0 the root has no gradient: 0 · inf would be NaN. There the
    # root of 1 is taken instead, and not used, so that the gradient is 0.
    apart = squares > 0.0
    return ops.where(apart, ops.sqrt(ops.where(apart, squares, 1.0)), 0.0)
