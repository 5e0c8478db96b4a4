"""The base class of the methods: settings, weights and two formulas.

A method adapts a frozen linear map x·W. It is a frozen dataclass of settings,
and defines five hooks (`needs`, `weights`, `initial_values`, `call` and
`merged`); the others have defaults. It never sees a layer, an einsum, a
convolution or a batch axis: x is always (tokens, in), and is reached through a
`LinearMap`.

To add a method, copy `lora.py` and decorate the class with `@register`. This
gives it `enable_<name>` on Backbone, Task and the package, its layers, a page
of the documentation, and rows in the conformance suite, the demo and the
benchmarks.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.methods.picture import Picture
from keras_svdtune.methods.settings import plain
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
        saved: bool. Whether an adapter file holds the weight, as it does all
            trainable ones; the others are computed from W again.
        dtype: str or None, the dtype of a frozen weight, if not the layer's.
        step: float, a power of two. The variable that trains holds the weight
            divided by it, so that at one learning rate a weight of step 4
            moves four times as far as one of step 1. Everything else, methods
            and files too, sees the weight itself.
        overwritten: bool. Whether the backward pass computes the weight's
            next value, which Keras' optimizers then assign; float32.
        regularizer: function from the weight to a number that is added to the
            loss, averaged over the adapters of the model; or None.
        drawn: bool. Whether the weight is drawn at random, by a seed and the
            layer's path. A full save holds it: the path may change on loading.
        axes: the axis of W that each dimension of the weight runs along: `IN`,
            `OUT`, `COMPONENTS` (the n components of a full basis), or None.
            Where W is on several devices, this decides where the weight is;
            an empty tuple puts it on all of them.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = False
    saved: bool = False
    dtype: str | None = None
    step: float = 1.0
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
    """The weights of one adapter as attributes, and `shape` (in, out) of W."""

    shape: Shape

    def __getattr__(self, name: str) -> Tensor: ...


class WeightValues:
    """`Weights` that hold plain values, by name, instead of variables."""

    def __init__(self, shape: Shape, **values: Tensor):
        self.shape = shape
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"There is no weight '{name}' among {vars(self)}")


class LinearMap(Protocol):
    """The frozen product x·W of a layer with its current input x (tokens, in).

    x itself may exist nowhere: for a convolution it is the patches of an
    image. `dtype` is the layer's compute dtype.
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
    """The frozen product x·Wᵀ, x (tokens, out), of a tied head.

    It is a `LinearMap` with Wᵀ in place of W: `base()` is x·Wᵀ.
    """

    def back(self, r: Tensor) -> Tensor:
        """Returns r·W (k, out) for any r (k, in)."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class of the methods, which are frozen dataclasses of settings.

    In the hooks below, `shape` is (in, out) of the kernel matrix W; `factors`
    is the part of its decomposition that `needs` asked for; `matrix` is W in
    float32; `weights` has the weights as attributes, and `shape`; `base` is
    the frozen product x·W.

    Attributes:
        name: str, the method's short name: `"svf"`.
        title: str, the method's name in print: `"SVF"`. Layers are called
            after it: `SVFDense`.
        suggested_learning_rate: float, a rate for Adam to start from. One for
            all, LoRA's: methods that want other steps say so by `Weight.step`.
        formula: str, what it computes, in LaTeX, for the documentation.
        picture: what it trains, for the documentation.
        example: str, the settings that have no default, written as further
            arguments in code: `", rank=8"`.
        linear: bool. Whether ΔW is linear in the trainable weights, so that
            adapters with equal settings add up by adding these.
        banks: bool. Whether it adapts a bank of matrices (experts), whose
            layer reads only the merged kernels.
        embeddings: bool. Whether it adapts embeddings.
        rebuilds_basis: bool. Whether loading computes frozen weights from the
            singular vectors of W again. They are then those of W rounded to
            bfloat16 (`matrix/rounding.py`), so that W in float32 and W in
            bfloat16 have the same; W·V = U·diag(s) holds to that rounding only.
        trains_other_components: bool. Whether the components of W that `needs`
            names are the ones that stay, and all others may change.
        has_enable: bool. Whether there is an `enable_<name>`. There is none
            where Keras has a method of that name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suggested_learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = ""
    picture: ClassVar[Picture] = ()
    example: ClassVar[str] = ""
    linear: ClassVar[bool] = False
    banks: ClassVar[bool] = True
    embeddings: ClassVar[bool] = True
    rebuilds_basis: ClassVar[bool] = False
    trains_other_components: ClassVar[bool] = False
    has_enable: ClassVar[bool] = True

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Makes the subclass that `form_of` named for a setting, if any."""
        for option, form in _FORMS.get(cls, {}).items():
            if settings.get(option):
                return object.__new__(form)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def for_shape(self, shape: Shape) -> Self:
        """Returns the method with the settings that fit W (in, out).

        One method is enabled on matrices of all sizes. A setting that is too
        large for this one, such as a rank above min(in, out), becomes the
        largest that fits. The hooks below are called on the result. A method
        that cannot adapt such a matrix at all raises a ValueError.
        """
        return self

    def needs(self, shape: Shape) -> Needs | None:
        """Returns which part of W's decomposition is used; None if none."""
        return None

    def resolved(self, factors: Factors | None) -> Self:
        """Returns the method with the settings decided for one matrix."""
        return self

    def weights(self, shape: Shape) -> list[Weight]:
        """Returns the weights for W; the method has been `resolved`."""
        raise NotImplementedError

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        """Returns the first values of the weights, by name; the others are 0.

        With these values `call` is `base()`. `random` is a generator seeded by
        the method and the layer.
        """
        raise NotImplementedError

    def call(self, weights: Weights, base: LinearMap) -> Tensor:
        """Computes the adapted product x·W' (tokens, out).

        With the first weights it is `base()` to the bit.
        """
        raise NotImplementedError

    def merged(self, weights: Weights, matrix: Tensor) -> Tensor:
        """Computes W' (in, out): `call(weights, base)` is x·W'.

        `matrix` and the trainable weights are float32, and so is W'; or all
        of them are float64, where the layer holds W in that.
        """
        raise NotImplementedError

    def reverse(self, weights: Weights, base: ReverseMap) -> Tensor:
        """Computes the adapted product with Wᵀ, x·W'ᵀ (tokens, in).

        Here `base` is the frozen product x·Wᵀ with x (tokens, out). A method
        that does not define `reverse` is refused on tied embeddings.
        """
        raise NotImplementedError

    def neutral(self, weights: Weights) -> dict[str, Tensor]:
        """Returns trainable values, by name, with which `call` is `base()`.

        By default, zero for every one of them.
        """
        return {
            w.name: ops.zeros(w.shape)
            for w in self.weights(weights.shape)
            if w.trainable
        }

    def low_rank_factors(
        self, weights: Weights, matrix: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Returns W' - W as a product of two thin matrices, if it is one.

        Returns:
            (a, b), float32 of shapes (in, k) and (k, out), with W' = W + a·b,
            the scale included. None if the method has no such form, or needs
            `matrix` for it and that is None.
        """
        return None

    def core(self, weights: Weights, s: np.ndarray) -> np.ndarray | None:
        """Returns the matrix M of W' = U (diag(s) + M) Vᵀ, if W' has that form.

        It gets the singular values s (n,) of W in float64, and returns M (n, n)
        or, for a diagonal M, the diagonal (n,); None if W' has no such form.
        With `rebuilds_basis` the form is that of the rounded W, and s its own.
        """
        return None

    def current_rank(self, weights: Weights | None) -> int | float | None:
        """Returns the rank of one adapter now; None for methods without one.

        `weights` is None before the method is enabled.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """Returns the settings as plain values, for files and configs.

        Fields with `compare=False` are left out: they say how a layer computes,
        not what.
        """
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.compare
        }

    def trains_like(self, other: "Method") -> bool:
        """Says whether both methods have weights of the same meaning."""
        ours, theirs = self.settings(), other.settings()
        # `rank=1.0` is all components and `rank=1` is one, yet 1 == 1.0.
        shares = [isinstance(x.get("rank"), float) for x in (ours, theirs)]
        return (
            self.name == other.name
            and ours == theirs
            and shares[0] == shares[1]
        )


def has_reverse(method: Method) -> bool:
    """Says whether a method defines `reverse`, which tied embeddings need."""
    return type(method).reverse is not Method.reverse


def small_side(shape: Shape) -> str:
    """Returns the shorter axis of W (in, out); `OUT` if they are equal."""
    rows, columns = shape
    return OUT if columns <= rows else IN


METHODS: dict[str, type[Method]] = {}
_FOLLOWERS: list[Callable[[type[Method]], None]] = []
# By class and option: the class to make instead where the option is true.
_FORMS: dict[type, dict[str, type]] = {}
M = TypeVar("M", bound=Method)


def register(cls: type[M]) -> type[M]:
    """Class decorator: registers a method under its name."""
    METHODS[cls.name] = cls
    for follow in _FOLLOWERS:
        follow(cls)
    return cls


def for_every_method(follow: Callable[[type[Method]], None]) -> None:
    """Calls `follow` with every registered method, now and later."""
    _FOLLOWERS.append(follow)
    for cls in list(METHODS.values()):
        follow(cls)


def form_of(parent: type[Method], option: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: makes this class what `parent(option=...)` returns.

    For an option that changes what a method does to a layer: the user writes
    `PiSSA(rank=8, quantize="int4")` and gets a `QPiSSA`, a subclass. `option`
    is a field of `parent` by keyword only; the class is made where it is true.
    """

    def decorate(cls: type[M]) -> type[M]:
        _FORMS.setdefault(parent, {})[option] = cls
        return cls

    return decorate


def nearest(wanted: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: known names like `wanted`."""
    known = list(known)
    # Cut off, since a damaged file may hold a name of megabytes.
    close = difflib.get_close_matches(wanted[:500], known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(x) for x in close)}?"
    return f"There are: {', '.join(repr(x) for x in sorted(set(known))[:12])}."
