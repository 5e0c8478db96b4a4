"""SVFT: a sparse trainable matrix between U and Vᵀ."""

import dataclasses
import functools
import itertools
import warnings
from typing import Self

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.banded import banded_product, diagonals
from keras_svdtune.methods.base import (
    COMPONENTS,
    LinearMap,
    Method,
    ReverseMap,
    Weight,
    Weights,
    nearest,
    register,
    small_side,
)
from keras_svdtune.methods.picture import Block
from keras_svdtune.methods.settings import check_seed, check_whole_number
from keras_svdtune.runtime.placement import whole_rows
from keras_svdtune.runtime.types import Shape, Tensor

PATTERNS = ("plain", "banded", "random", "top_k")


# A component trains if its s is so many times what rounding makes of a zero:
# then rounding turns W·V / s by less than a quarter.
_NOISE = 4.0

# How much further than LoRA's A and B one step of Adam moves M: by the study,
# best rates of M are ten times LoRA's, and this is the power of two next to it.
_STEP = 8.0


@register
@dataclasses.dataclass(frozen=True)
class SVFT(Method):
    """Singular vectors guided fine-tuning.

    With W = U diag(s) Vᵀ of shape (in, out) and n = min(in, out), a sparse
    matrix M (n, n) with a fixed pattern trains between the singular vectors:

        y = x·U (diag(s) + M) Vᵀ = x·W + x·U·M·Vᵀ,        M = 0 at first

    As for SVF, only the singular vectors of the smaller side are kept, n²
    numbers, because x·U = ((x·W)·V) / s and Vᵀ = (Uᵀ·W) / s:

        out <= in:  h = x·W,  y = h + (h·V)·(M / s, by rows)·Vᵀ
        in < out:   y = (x + (x·U)·(M / s, by columns)·Uᵀ)·W

    | pattern | trains | parameters, with d off-diagonals |
    |---|---|---|
    | `"plain"` | the diagonal | n |
    | `"banded"` | d diagonals on each side of it too | n(2d+1) - d(d+1) |
    | `"random"` | distinct random entries | as many as banded |
    | `"top_k"` | the entries with the largest \\|uᵢᵀvⱼ\\| | as many as banded |

    u and v have equal lengths only where W is square: elsewhere top_k is
    banded, and a warning says so. W is never truncated.

    U, s and V are those of W rounded to bfloat16 (`Method.rebuilds_basis`); W
    itself stays as it is, and in both formulas stands for U diag(s) Vᵀ, from
    which rounding may make it differ. What trains is then W·V / s in place of
    U (Uᵀ·W / s in place of Vᵀ): in a component as large as the others 0.2 %
    away, in a small one more, by s_rms / s times as much. A component that this
    turns by more than a quarter does not train: s below 2⁻⁷ of the root mean
    square of s (0.4 % of the components of SmolLM2-135M, none of Gemma 3's), or
    below 1e-30.
    In bfloat16 x·W is rounded as W was, so that there too the small components
    are the less exact ones.

    The variable that trains holds M / 8, so that SVFT learns at rates that suit
    LoRA (`tests/benchmarks/study.py`): the authors use 1e-3 to 8e-2 for M.
    Files and formulas have M.

    Args:
        pattern: `"banded"` (the authors' advice), `"plain"`, `"random"` or
            `"top_k"`.
        off_diagonals: int, d above, 0 or more; at most n - 1 in each layer,
            where all of M trains. No effect on plain.
        seed: int. Seed of the random entries.

    Example:

    ```python
    gemma.backbone.enable_svft(pattern="banded", off_diagonals=2)
    ```

    Reference: Lingam et al. 2024, https://arxiv.org/abs/2405.19597. Its code
    starts M from noise behind a trained gate, draws random entries with
    repetition, and ranks U·V for top_k; this is the form of the paper.
    """

    name = "svft"
    title = "SVFT"
    linear = True
    rebuilds_basis = True
    formula = (
        r"W' = U \bigl(\operatorname{diag}(s) + M\bigr) V^\top,"
        r" \qquad M \text{ sparse trains, } 0 \text{ at first}"
    )
    picture = (
        Block("U", "in", "n"),
        Block("diag(s) + M", "n", "n", trains="band"),
        Block("Vᵀ", "n", "out"),
    )

    pattern: str = "banded"
    off_diagonals: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in PATTERNS:
            raise ValueError(
                f"`pattern` must be one of {', '.join(map(repr, PATTERNS))}. "
                f"Received: pattern={self.pattern!r}. "
                f"{nearest(str(self.pattern), list(PATTERNS))}"
            )
        check_whole_number("off_diagonals", self.off_diagonals, 0)
        check_seed(self.seed)

    def for_shape(self, shape: Shape) -> Self:
        n = min(shape)
        if self._width() < n:
            return self
        # All n diagonals on each side: M is full, whatever the pattern.
        return dataclasses.replace(self, off_diagonals=n - 1)

    def needs(self, shape: Shape) -> Needs:
        if self._pattern(shape) == "top_k":  # both sides, to align them
            return Needs("top", min(shape))
        return Needs("small_side")

    def weights(self, shape: Shape) -> list[Weight]:
        n, d = min(shape), self._width()
        count = n * (2 * d + 1) - d * (d + 1)
        found = [
            Weight("basis", (n, n), axes=(small_side(shape), COMPONENTS)),
            # 1 / s, in float32: bfloat16 would distort M.
            Weight("inverse_s", (n,), dtype="float32"),
            Weight("m", (count,), trainable=True, step=_STEP),
        ]
        if self._pattern(shape) in ("random", "top_k"):
            # The positions in M of the entries of m, as row·n + column.
            drawn = self._pattern(shape) == "random"
            found.append(
                Weight("positions", (count,), dtype="int32", drawn=drawn)
            )
        return found

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        assert factors is not None
        rows, columns = shape = tuple(matrix.shape)
        s, n = factors.s, min(shape)
        alive = s > max(1e-6 * s[0], _NOISE * factors.noise, 1e-30)
        values = {
            "basis": factors.v if columns <= rows else factors.u,
            "inverse_s": np.where(alive, 1.0 / np.where(alive, s, 1.0), 0.0),
        }
        count = self.weights(shape)[2].shape[0]
        pattern = self._pattern(shape)
        if pattern == "random":
            values["positions"] = _distinct(n * n, count, random)
        elif pattern == "top_k":
            assert factors.u is not None and factors.v is not None
            alignment = np.abs(factors.u.T @ factors.v).ravel()
            largest = np.argsort(-alignment, kind="stable")[:count]
            values["positions"] = np.sort(largest)
        elif self.pattern == "top_k":
            _say_once_that_top_k_is_banded()
        return values

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        rows, columns = weights.shape
        return self._product(weights, base, columns <= rows, False)

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        rows, columns = weights.shape
        return self._product(weights, base, columns > rows, True)

    def _product(
        self, weights: Weights, base: LinearMap, after: bool, transposed: bool
    ) -> Tensor:
        """Computes x·W' (or x·W'ᵀ), the basis applied after W or before it."""
        basis = weights.basis
        components = (
            ops.matmul(h := base(), basis) if after else (base.times(basis))
        )
        change = self._change(weights, components, basis, transposed)
        return h + change if after else base.moved(change)

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        rows, columns = weights.shape
        basis = ops.cast(weights.basis, weights.m.dtype)
        if columns <= rows:
            components = ops.matmul(matrix, basis)
            return matrix + self._change(weights, components, basis)
        # The components of the identity are the basis itself.
        return matrix + ops.matmul(self._change(weights, basis, basis), matrix)

    def core(self, weights: Weights, s: np.ndarray) -> np.ndarray:
        entries = ops.convert_to_numpy(weights.m).astype("float64")
        alive = ops.convert_to_numpy(weights.inverse_s) > 0.0
        if self.pattern == "plain":
            return np.asarray(entries * alive)
        n = len(s)
        m = np.zeros((n, n))
        if self._pattern(weights.shape) in ("random", "top_k"):
            m.flat[ops.convert_to_numpy(weights.positions)] = entries
        else:
            start = 0
            for k, i, j in diagonals(n, self._width()):
                m[np.arange(i, j), np.arange(i + k, j + k)] = entries[
                    start : start + j - i
                ]
                start += j - i
        by_rows = weights.shape[1] <= weights.shape[0]
        return np.asarray(m * (alive[:, None] if by_rows else alive))

    def _change(
        self,
        weights: Weights,
        components: Tensor,
        basis: Tensor,
        transposed: bool = False,
    ) -> Tensor:
        """Computes components·N·basisᵀ, N = M scaled by 1 / s; or with Nᵀ."""
        rows, columns = weights.shape
        by_rows = columns <= rows
        if self._pattern(weights.shape) in ("random", "top_k"):
            # Dense, for this one product: it is faster than to gather
            # (tokens, entries) and add them up again by columns.
            n = min(rows, columns)
            index = ops.expand_dims(weights.positions, 1)
            # Not `ops.scatter`, which is a loop over the entries on torch.
            m = ops.scatter_update(
                ops.zeros((n * n,)), index, weights.m, reduction="add"
            )
            s = ops.reshape(weights.inverse_s, (n, 1) if by_rows else (1, n))
            m = ops.cast(ops.reshape(m, (n, n)) * s, components.dtype)
            m = ops.transpose(m) if transposed else m
            mixed = ops.matmul(components, m)
        else:
            components = whole_rows(components, weights.basis)
            mixed = self._banded(weights, components, by_rows, transposed)
            mixed = whole_rows(mixed, weights.basis)
        mixed = ops.cast(mixed, components.dtype)
        return ops.matmul(mixed, ops.transpose(basis))

    def _banded(
        self,
        weights: Weights,
        components: Tensor,
        by_rows: bool,
        transposed: bool,
    ) -> Tensor:
        """Computes components·N, N = M scaled by 1 / s, banded; or with Nᵀ."""
        n, d = min(weights.shape), self._width()
        inverse_s = ops.convert_to_tensor(weights.inverse_s)
        scale = [
            inverse_s[i:j] if by_rows else inverse_s[i + k : j + k]
            for k, i, j in diagonals(n, d)
        ]
        entries = weights.m * ops.concatenate(scale)
        if transposed:  # diagonal k is diagonal -k of N
            ends = np.cumsum([0, *(j - i for _, i, j in diagonals(n, d))])
            parts = [entries[a:b] for a, b in itertools.pairwise(ends)]
            entries = ops.concatenate(parts[::-1])
        return banded_product(components, entries, n, d)

    def _width(self) -> int:
        return 0 if self.pattern == "plain" else self.off_diagonals

    def _pattern(self, shape: Shape) -> str:
        """Returns the pattern for W (in, out): top_k only for a square W."""
        square = shape[0] == shape[1]
        return (
            "banded" if self.pattern == "top_k" and not square else self.pattern
        )


def _distinct(n: int, count: int, random: np.random.RandomState) -> np.ndarray:
    """Draws `count` distinct integers below n; returns them sorted."""
    if 2 * count > n:  # fewer are left out; the last ones are hard to hit
        left_out = _distinct(n, n - count, random)
        return np.setdiff1d(np.arange(n), left_out)
    chosen = np.unique(random.randint(0, n, count))
    while len(chosen) < count:
        more = random.randint(0, n, count - len(chosen))
        chosen = np.unique(np.concatenate([chosen, more]))
    return chosen


@functools.cache
def _say_once_that_top_k_is_banded() -> None:
    warnings.warn(
        "SVFT's top_k pattern is defined for square matrices only; the "
        "others get the banded pattern with as many parameters.",
        stacklevel=2,
    )
