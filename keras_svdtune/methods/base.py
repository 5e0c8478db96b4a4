"""What a method is: a config, the weights it asks for, and two formulas.

A method adapts a frozen linear map x·W. It is a frozen dataclass of settings
that says, for a matrix of a given shape,

- `needs`: which part of the singular value decomposition of W it uses;
- `weights`: which weights it adds, trainable and frozen;
- `initial_values`: what the weights are at first, so that nothing changes;
- `call`: the adapted product, from x and the frozen map;
- `merged`: the matrix that would give the same product at once.

It never sees a layer, an einsum, a convolution or a batch axis: x is always
(tokens, in), and is reached through a `LinearMap`.
To add a method, copy `svf.py`, the shortest one, and decorate the class with
`@register`; the `enable_*` method, the layers and the demo follow from it.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs

# What a dim of a weight is of the matrix W (in, out), for `Weight.axes`.
IN, OUT, COMPONENTS = "in", "out", "components"


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight that a method adds to a layer.

    Attributes:
        name: str. The variable is called `<method>_<name>`.
        shape: tuple of int.
        trainable: bool. Trainable weights are float32 whatever the dtype
            policy; frozen ones take the layer's variable dtype.
        saved: bool. Whether an adapter file holds it, as trainables always
            do; what is not saved is computed again from W on loading.
        dtype: str or None, the dtype of a frozen weight, if not the layer's.
        overwritten: bool. Whether the backward pass computes the weight's
            next value, which Keras' optimizers then assign; float32.
        regularizer: function from the weight to a number that is added to the
            loss, averaged over the adapters of the model; or None.
        drawn: bool. Whether it was drawn by a seed and the layer's path. A
            full save holds it, since that path may be another where it loads.
        axes: what each dim is of W: `IN`, `OUT`, `COMPONENTS` (of a full
            basis, n of them), or None. It decides on which devices the weight
            is where W is on several (`layouts.py`). Empty: on all of them.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = False
    saved: bool = False
    dtype: str | None = None
    overwritten: bool = False
    regularizer: Callable[[Any], Any] | None = None
    drawn: bool = False
    axes: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if self.trainable:
            object.__setattr__(self, "saved", True)
        if self.trainable or self.overwritten:
            object.__setattr__(self, "dtype", "float32")


class LinearMap(Protocol):
    """The frozen product x·W of a layer, x (tokens, in) its present input.

    x itself may exist nowhere: for a convolution it is the patches of an
    image.

    Attributes:
        dtype: str, the layer's compute dtype.
    """

    dtype: str

    def __call__(self) -> Any:
        """x·W (tokens, out), as the layer computes it."""

    def times(self, a: Any) -> Any:
        """x·A (tokens, k) for A (in, k)."""

    def moved(self, change: Any) -> Any:
        """(x + change)·W for a change (tokens, in) of the input."""

    def rows(self, r: Any) -> Any:
        """r·W (k, out) for any r (k, in)."""


class ReverseMap(LinearMap, Protocol):
    """The map of Wᵀ, x (tokens, out): a tied head, which reads W backwards.

    It is a `LinearMap` in all, with Wᵀ for W: `base()` is x·Wᵀ.
    """

    def back(self, r: Any) -> Any:
        """r·W (k, out) for any r (k, in): against its direction."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class of the methods.

    Attributes:
        name: str, the method's short name: `"svf"`.
        title: str, the method's name in print: `"SVF"`. Layers are called
            after it: `SVFDense`.
        suggested_learning_rate: float, a rate for Adam to start from.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suggested_learning_rate: ClassVar[float]
    # The settings without a default, as an example writes them.
    example: ClassVar[str] = ""
    # Whether ΔW is linear in the trainables: adapters with the same settings
    # then add up by adding these.
    linear: ClassVar[bool] = False
    # Whether it works where only the merged kernels of a bank are read.
    banks: ClassVar[bool] = True
    # Whether it works in an embedding, which a model may call in both ways.
    embeddings: ClassVar[bool] = True
    # Whether there is an `enable_<name>`; not where Keras has one already.
    has_enable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises a ValueError if a setting fits no matrix at all."""
        if hasattr(self, "rank") and not _may_be_rank(self.rank):
            raise ValueError(
                "`rank` must be an integer, 1 or more, or a float in (0, 1] "
                "for that share of the squared singular values. "
                f"Received: rank={self.rank!r}"
            )
        seed = getattr(self, "seed", 0)
        if type(seed) is not int or seed < 0:
            raise ValueError(
                f"`seed` must be an integer, 0 or more. Received: seed={seed!r}"
            )
        alpha = getattr(self, "alpha", None)
        if alpha is not None and not (
            isinstance(alpha, (int, float))
            and not isinstance(alpha, bool)
            and 0.0 < alpha < float("inf")
        ):
            raise ValueError(
                "`alpha` must be a positive number, or None for a scale of 1. "
                f"Received: alpha={alpha!r}"
            )
        n_iter = getattr(self, "n_iter", None)
        if n_iter is not None and (
            not isinstance(n_iter, int)
            or isinstance(n_iter, bool)
            or not 0 <= n_iter <= 100
        ):
            raise ValueError(
                "`n_iter` must be an integer from 0 to 100, or None for an "
                f"exact decomposition. Received: n_iter={n_iter!r}"
            )

    @property
    def base_mode(self) -> str | None:
        """What the base is quantized to for this method: `"int4"`.

        None, for nearly all: the base stays as it is.
        """
        return getattr(self, "quantize", None)

    @property
    def replaces_base(self) -> bool:
        """Whether the layer's kernel is no longer W under this method.

        But what `residual` makes of it, quantized to `base_mode` if there is
        one. The settings that say so tell how a layer computes, not what; so
        they are not in an adapter file unless the file depends on them.
        """
        return self.base_mode is not None

    def needs(self, shape: tuple[int, int]) -> Needs | None:
        """What must be known of W (in, out); None if nothing."""
        raise NotImplementedError

    def check(self, shape: tuple[int, int]) -> None:
        """Raises a ValueError if a setting does not fit W (in, out)."""
        if hasattr(self, "rank"):
            check_rank(self.rank, shape)

    def weights(self, shape: tuple[int, int]) -> list[Weight]:
        """The weights for W (in, out). A `rank` is an integer here."""
        raise NotImplementedError

    def initial_values(
        self,
        matrix: Any,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Any]:
        """First values of the weights, by name. A weight left out is zero.

        Args:
            matrix: W (in, out), float32.
            factors: what `needs` asked for.
            random: a generator seeded by the method and the layer.
        """
        raise NotImplementedError

    def fitted(
        self,
        matrix: np.ndarray,
        values: dict[str, Any],
        rounded: Callable[[np.ndarray], np.ndarray],
        decomposed: Callable[[np.ndarray], Factors],
    ) -> dict[str, Any]:
        """First values that suit a quantized base, where `base_mode` is set.

        Args:
            matrix: W (in, out), a float32 array.
            values: what `initial_values` returned for it.
            rounded: function from a matrix to what quantization makes of it.
            decomposed: function from a matrix to what `needs` asks for.
        """
        raise NotImplementedError

    def residual(self, matrix: np.ndarray, values: dict[str, Any]) -> Any:
        """What is put into the layer for W, where `replaces_base`.

        Args:
            matrix: W (in, out), a float32 array.
            values: the first values of the weights.

        Returns:
            (in, out), a float32 array.
        """
        raise NotImplementedError

    def call(self, weights: Any, base: LinearMap) -> Any:
        """The adapted product.

        Args:
            weights: holds the weights as attributes, and the matrix's
                `shape` (in, out).
            base: the frozen product x·W.

        Returns:
            (tokens, out). With the initial weights, `base()` to the bit,
            unless `replaces_base`.
        """
        raise NotImplementedError

    def reverse(self, weights: Any, base: ReverseMap) -> Any:
        """The adapted product with Wᵀ: x·W'ᵀ (tokens, in).

        From `low_rank_factors`, unless a method has another form.

        Args:
            weights: as in `call`.
            base: the frozen product x·Wᵀ, x (tokens, out).
        """
        factors = self.low_rank_factors(weights)
        assert factors is not None, "write `reverse` for this method"
        a, b = (ops.cast(x, base.dtype) for x in factors)
        xb = base.times(ops.transpose(b))
        return base() + ops.matmul(xb, ops.transpose(a))

    def merged(self, weights: Any, matrix: Any) -> Any:
        """W' (in, out) in float32, with `call(weights, base) == x·W'`.

        Args:
            weights: as in `call`.
            matrix: W (in, out), float32.
        """
        raise NotImplementedError

    def neutral(self, weights: Any) -> dict[str, Any]:
        """Values of trainables, by name, with which `call` is `base` again.

        Zero for every one of them, unless a method says otherwise.
        """
        return {
            w.name: ops.zeros(w.shape)
            for w in self.weights(weights.shape)
            if w.trainable
        }

    def low_rank_factors(
        self, weights: Any, matrix: Any = None
    ) -> tuple[Any, Any] | None:
        """W' - W as a thin product, for methods that add one.

        Args:
            weights: as in `call`.
            matrix: W (in, out), float32; or None where it is not at hand.

        Returns:
            (a, b), float32 of shapes (in, k) and (k, out), with W' = W + a·b:
            the scale is in them. None if the method has no such form, or has
            one only with `matrix`.
        """
        return None

    def core(self, weights: Any, s: np.ndarray) -> np.ndarray | None:
        """M of W' = U (diag(s) + M) Vᵀ, for methods that add one there.

        Args:
            weights: as in `call`.
            s: (n,) float64, the singular values of W.

        Returns:
            The diagonal of M (n,), where all else is 0; or M (n, n); or None.
        """
        return None

    def dora_factors(self, weights: Any) -> tuple[Any, Any, Any] | None:
        """W' in the form of DoRA, for methods that have it.

        Returns:
            (a, b, m), float32 of shapes (in, k), (k, out) and (out,), with
            W' = (W + a·b)·diag(m / ‖W + a·b‖), norms of columns; or None.
        """
        return None

    def current_rank(self, weights: Any) -> int | None:
        """The rank of one adapter now, for methods that have a rank."""
        return getattr(self, "rank", None)

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for files and configs.

        Without those that methods are not compared by, which say how.
        """
        compared = {f.name for f in dataclasses.fields(self) if f.compare}
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k in compared}


def small_side(shape: tuple[int, int]) -> str:
    """Which side of W (in, out) the basis of the smaller side is of."""
    rows, columns = shape
    return OUT if columns <= rows else IN


def check_rank(rank: Any, shape: tuple[int, int]) -> None:
    """Raises a ValueError unless `rank` is a rank of W (in, out)."""
    n = min(shape)
    if _may_be_rank(rank) and rank <= n:
        return
    raise ValueError(
        f"`rank` must be an integer from 1 to min(in, out) = {n}, or a float "
        "in (0, 1] for that share of the squared singular values. "
        f"Received: rank={rank!r}"
    )


def _may_be_rank(rank: Any) -> bool:
    if isinstance(rank, float):
        return 0.0 < rank <= 1.0
    return type(rank) is int and rank >= 1


METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method known under its name."""
    METHODS[cls.name] = cls
    return cls


def nearest(wanted: str, known: list[str]) -> str:
    """The end of an error message: what the user may have meant."""
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(x) for x in close)}?"
    return f"There are: {', '.join(repr(x) for x in sorted(set(known))[:12])}."
