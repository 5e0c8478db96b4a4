"""What a method is: its settings, the weights it asks for, and two formulas.

A method adapts a frozen linear map x·W. It is a frozen dataclass of settings
that says, for a matrix W (in, out),

- `needs`: which part of the singular value decomposition of W it uses;
- `weights`: which weights it adds, trainable and frozen;
- `initial_values`: their first values, with which nothing changes;
- `call`: the adapted product, from x and the frozen map;
- `merged`: the matrix W' that gives the same product at once.

The other hooks have defaults. A method never sees a layer, an einsum, a
convolution or a batch axis: x is always (tokens, in), and is reached through a
`LinearMap`.

To add a method, copy `svf.py` and decorate the class with `@register`. From
that follow `enable_<name>` on Backbone, Task and the package, the layers, the
page of the documentation, and the rows of the conformance suite, the demo and
the benchmarks.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.picture import Picture
from keras_svdtune.runtime.types import Shape, Tensor

# Labels for `Weight.axes`: the axis of W that a dimension of the weight runs
# along, or the components of a full basis.
IN, OUT, COMPONENTS = "in", "out", "components"


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight that a method adds to a layer.

    Attributes:
        name: str. The variable is called `<method>_<name>`.
        shape: tuple of int.
        trainable: bool. Trainable weights are float32 whatever the dtype
            policy; frozen ones take the layer's variable dtype.
        saved: bool. Whether an adapter file holds the weight. Trainables
            always are in the file; what is not saved is computed from W again.
        dtype: str or None, the dtype of a frozen weight, if not the layer's.
        overwritten: bool. Whether the backward pass computes the weight's
            next value, which Keras' optimizers then assign; float32.
        regularizer: function from the weight to a number that is added to the
            loss, averaged over the adapters of the model; or None.
        drawn: bool. Whether the weight is random, drawn by a seed and the
            layer's path. A full save holds it, since the path may be another
            where the save is loaded.
        axes: the axis of W that each dimension of the weight runs along: `IN`,
            `OUT`, `COMPONENTS` (the n components of a full basis), or None.
            It decides on which devices the weight is where W is on several.
            An empty tuple: on all of them.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = False
    saved: bool = False
    dtype: str | None = None
    overwritten: bool = False
    regularizer: Callable[[Tensor], Tensor] | None = None
    drawn: bool = False
    axes: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if self.trainable:
            object.__setattr__(self, "saved", True)
        if self.trainable or self.overwritten:
            object.__setattr__(self, "dtype", "float32")


class Weights(Protocol):
    """The weights of one adapter, as attributes by their names.

    Attributes:
        shape: (in, out), the matrix they belong to.
    """

    shape: Shape

    def __getattr__(self, name: str) -> Tensor: ...


class WeightValues:
    """`Weights` that are no variables: values to compute with.

    Args:
        shape: (in, out), the matrix they belong to.
        **values: the weights, by name.
    """

    def __init__(self, shape: Shape, **values: Tensor):
        self.shape = shape
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"There is no weight '{name}' among {vars(self)}")


class LinearMap(Protocol):
    """The frozen product x·W of a layer, x (tokens, in) its present input.

    x itself may exist nowhere: for a convolution it is the patches of an
    image.

    Attributes:
        dtype: str, the layer's compute dtype.
    """

    dtype: str

    def __call__(self) -> Tensor:
        """Returns x·W (tokens, out), as the layer computes it."""

    def times(self, a: Tensor) -> Tensor:
        """Returns x·A (tokens, k) for A (in, k)."""

    def moved(self, change: Tensor) -> Tensor:
        """Returns (x + change)·W for a change (tokens, in) of the input."""

    def rows(self, r: Tensor) -> Tensor:
        """Returns r·W (k, out) for any r (k, in)."""


class ReverseMap(LinearMap, Protocol):
    """The product with Wᵀ, x (tokens, out): a tied head reads W backwards.

    It is a `LinearMap` in all, with Wᵀ for W: `base()` is x·Wᵀ.
    """

    def back(self, r: Tensor) -> Tensor:
        """Returns r·W (k, out) for any r (k, in)."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class of the methods.

    Attributes:
        name: str, the method's short name: `"svf"`.
        title: str, the method's name in print: `"SVF"`. Layers are called
            after it: `SVFDense`.
        suggested_learning_rate: float, a rate for Adam to start from.
        formula: str, what it computes, in LaTeX, for the documentation.
        picture: what it trains, for the documentation.
        example: str, the settings that have no default, as code writes them
            behind other arguments: `", rank=8"`.
        linear: bool. Whether ΔW is linear in the trainables, so that adapters
            with equal settings add up by adding these.
        banks: bool. Whether it adapts a bank of matrices, of which only the
            merged kernels are read.
        embeddings: bool. Whether it adapts embeddings.
        has_enable: bool. Whether there is an `enable_<name>`; not where Keras
            has one already.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suggested_learning_rate: ClassVar[float]
    formula: ClassVar[str] = ""
    picture: ClassVar[Picture] = ()
    example: ClassVar[str] = ""
    linear: ClassVar[bool] = False
    banks: ClassVar[bool] = True
    embeddings: ClassVar[bool] = True
    has_enable: ClassVar[bool] = True

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Takes the class that `form_of` names for one of the settings."""
        for option, form in _FORMS.get(cls, {}).items():
            if settings.get(option):
                return object.__new__(form)
        return object.__new__(cls)

    def needs(self, shape: Shape) -> Needs | None:
        """What must be known of W (in, out); None if nothing."""
        return None

    def check(self, shape: Shape) -> None:
        """Raises a ValueError if a setting does not fit W (in, out)."""

    def resolved(self, factors: Factors | None) -> Self:
        """The method with the settings that were decided for one matrix.

        Args:
            factors: what `needs` asked for.
        """
        return self

    def weights(self, shape: Shape) -> list[Weight]:
        """The weights for W (in, out), the method being `resolved`."""
        raise NotImplementedError

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        """First values of the weights, by name. A weight left out is zero.

        Args:
            matrix: W (in, out), float32.
            factors: what `needs` asked for.
            random: a generator seeded by the method and the layer.
        """
        raise NotImplementedError

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        """The adapted product.

        Args:
            weights: the weights as attributes, and `shape` (in, out).
            base: the frozen product x·W.

        Returns:
            (tokens, out). With the first weights it is `base()` to the bit.
        """
        raise NotImplementedError

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        """W' (in, out) in float32, with `call(weights, base) == x·W'`.

        Args:
            weights: as in `call`.
            matrix: W (in, out), float32.
        """
        raise NotImplementedError

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        """The adapted product with Wᵀ: x·W'ᵀ (tokens, in).

        A method that does not define it is refused on tied embeddings.

        Args:
            weights: as in `call`.
            base: the frozen product x·Wᵀ, x (tokens, out).
        """
        raise NotImplementedError

    def neutral(self, weights: Weights) -> dict[str, Tensor]:
        """Values of trainables, by name, with which `call` is `base` again.

        Zero for every one of them, unless a method says otherwise.
        """
        return {
            w.name: ops.zeros(w.shape)
            for w in self.weights(weights.shape)
            if w.trainable
        }

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """W' - W as a product of two thin matrices, for methods that add one.

        Args:
            weights: as in `call`.
            matrix: W (in, out), float32; or None where it is not at hand.

        Returns:
            (a, b), float32 of shapes (in, k) and (k, out), with W' = W + a·b:
            the scale is in them. None if the method has no such form, or has
            one only with `matrix`.
        """
        return None

    def core(self, weights: Weights, s: np.ndarray) -> np.ndarray | None:
        """M of W' = U (diag(s) + M) Vᵀ, for methods that add one there.

        Args:
            weights: as in `call`.
            s: (n,) float64, the singular values of W.

        Returns:
            The diagonal of M (n,), where all else is 0; or M (n, n); or None.
        """
        return None

    def current_rank(self, weights: Weights | None) -> int | float | None:
        """The rank of one adapter now; None for methods without a rank.

        Args:
            weights: as in `call`; None before the method is enabled.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for files and configs.

        Settings that say how a layer computes, and not what, are left out:
        fields with `compare=False`.
        """
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.compare
        }

    def trains_like(self, other: "Method") -> bool:
        """Whether adapters of both hold the same weights with one meaning."""
        return self.name == other.name and self.settings() == other.settings()


def has_reverse(method: Method) -> bool:
    """Whether a method defines `reverse`, which tied embeddings need."""
    return type(method).reverse is not Method.reverse


def small_side(shape: Shape) -> str:
    """Which axis of W (in, out) the basis of the smaller side runs along."""
    rows, columns = shape
    return OUT if columns <= rows else IN


METHODS: dict[str, type[Method]] = {}
_FOLLOWERS: list[Callable[[type[Method]], None]] = []
# Of a class: the class to make instead where an option is set.
_FORMS: dict[type, dict[str, type]] = {}
M = TypeVar("M", bound=Method)


def register(cls: type[M]) -> type[M]:
    """Class decorator: makes a method known under its name, everywhere."""
    METHODS[cls.name] = cls
    for follow in _FOLLOWERS:
        follow(cls)
    return cls


def for_every_method(follow: Callable[[type[Method]], None]) -> None:
    """Calls `follow` with every method, those included that come later."""
    _FOLLOWERS.append(follow)
    for cls in list(METHODS.values()):
        follow(cls)


def form_of(parent: type[Method], option: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: makes this class what `parent(option=...)` returns.

    For an option that changes what a method does to a layer: the user writes
    `PiSSA(rank=8, quantize="int4")` and gets a `QPiSSA`.

    Args:
        parent: a registered method, the base of the class. `option` is among
            its fields, by keyword only.
        option: str. Where it is set to something true, the class is taken.
    """

    def decorate(cls: type[M]) -> type[M]:
        _FORMS.setdefault(parent, {})[option] = cls
        return cls

    return decorate


def nearest(wanted: str, known: Iterable[str]) -> str:
    """The end of an error message: what the user may have meant."""
    known = list(known)
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(x) for x in close)}?"
    return f"There are: {', '.join(repr(x) for x in sorted(set(known))[:12])}."
