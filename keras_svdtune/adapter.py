"""The weights that a method adds to one layer."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_svdtune.bank import over_bank
from keras_svdtune.devices import place_variable, undistributed
from keras_svdtune.fingerprint import (
    effect,
    fingerprint,
    matches,
    same_effect,
)
from keras_svdtune.matrix import MatrixView
from keras_svdtune.methods.base import LinearMap, Method, ReverseMap, Weight
from keras_svdtune.svd import Factors, decompose


class Adapter(keras.layers.Layer):
    """Holds the weights of one method for one matrix, as a sublayer.

    A sublayer has a group of its own in Keras' weights files, which a plain
    layer ignores: so a plain model loads the file of an adapted one.

    Args:
        method: `Method`. Its weights become attributes: `adapter.delta`.
        view: `MatrixView` of the host's kernel.
        initial_value: function from a weight's name to its first value, or
            None for zeros. It is called when the variable is initialised.
        dtype: the host's dtype policy.
        self_contained: bool. Whether a weights file holds the frozen weights
            too. Where the host saves its merged kernel, it holds the
            trainables and a fingerprint of the base.
        shardings: what `attach.shardings_of` says of the weights, by name.
    """

    def __init__(
        self,
        method: Method,
        view: MatrixView,
        initial_value: Callable[[str], Any],
        dtype: Any = None,
        self_contained: bool = False,
        shardings: dict[str, Any] | None = None,
        name: str = "adapter",
    ):
        super().__init__(name=name, dtype=dtype)
        self.method = method
        self.view = view
        self.shape = view.shape
        self._initial_value: Callable[[str], Any] | None = initial_value
        self._shardings = shardings or {}
        self.self_contained = self_contained
        # One part in how many adapters of the model, for regularisers.
        self.share = 1.0
        # The model's moving statistics, which are the base's; None if declared.
        self.statistics: Any = None
        # Of an adapter that was put into a plain layer: what recognises its
        # base, and a function that gives the matrix.
        self.base_fingerprint: np.ndarray | None = None
        self.matrix: Callable[[], Any] | None = None
        # Where another base than W was put into the layer for this adapter.
        self.replaced: ReplacedBase | None = None
        # Set while a weights file is read: tells the host what was in it.
        self.settle: Callable[[bool], None] | None = None

    def build(self, input_shape: Any = None) -> None:
        for weight in self.method.weights(self.shape):
            # A user's rule for kernels may match these paths too.
            with undistributed():
                variable = self.add_weight(
                    name=f"{self.method.name}_{weight.name}",
                    shape=self.view.batch + weight.shape,
                    initializer=self._initializer(weight),
                    trainable=weight.trainable or weight.overwritten,
                    overwrite_with_gradient=weight.overwritten,
                    regularizer=self._regularizer(weight),
                    # A trainable stays float32 in a bfloat16 model: neither
                    # stored nor cast on access, or small updates are lost.
                    dtype=weight.dtype,
                    autocast=weight.dtype is None,
                )
            place_variable(variable, self._shardings.get(weight.name))
            setattr(self, weight.name, variable)
        self._initial_value = None

    def _initializer(self, weight: Weight) -> Callable[..., Any]:
        initial_value = self._initial_value
        assert initial_value is not None

        def initialize(shape: Any, dtype: Any = None) -> Any:
            value = initial_value(weight.name)
            if value is None:
                return ops.zeros(shape, dtype)
            return ops.cast(ops.convert_to_tensor(value), dtype)

        return initialize

    def _regularizer(self, weight: Weight) -> Callable[[Any], Any] | None:
        penalty = weight.regularizer
        if penalty is None:
            return None
        # `share` is known when all layers are adapted.
        return lambda variable: penalty(variable) * self.share

    def call(self, base: LinearMap) -> Any:
        """The adapted product (tokens, out), by the method."""
        return self.method.call(self, base)

    def reverse(self, base: ReverseMap) -> Any:
        """x·W'ᵀ (tokens, in) where a layer multiplies by Wᵀ too."""
        return self.method.reverse(self, base)

    def merged(self, matrix: Any) -> Any:
        """W' (in, out) in float32 for W (in, out); or for each of a bank."""
        matrix = ops.cast(matrix, "float32")
        if self.view.count is None:
            return self.method.merged(self, matrix)
        return over_bank(self.method.merged, self.method, self, matrix)

    def reset(self) -> None:
        """Sets the trainables so that the layer computes x·W again."""
        for name, value in self.method.neutral(self).items():
            variable = getattr(self, name)
            variable.assign(ops.broadcast_to(value, variable.shape))

    def save_own_variables(self, store: Any) -> None:
        for name, variable in self._stored().items():
            store[name] = variable
        if self.matrix is not None:
            store["base_fingerprint"] = self.base_fingerprint
            store["effect"] = effect(self.method, self, self.matrix())

    def load_own_variables(self, store: Any) -> None:
        settle, self.settle = self.settle, None
        names = list(store.keys())
        if settle is not None:
            settle(bool(names))
        if not names:  # the file of a plain model
            self.reset()
            if self.statistics is not None:
                self.statistics.forget()
            return
        wanted = self._stored()
        checks = {"base_fingerprint", "effect"} if self.matrix else set()
        missing = sorted({*wanted, *checks} - set(names))
        if missing:
            raise ValueError(
                f"The weights file holds no {', '.join(missing)} for layer "
                f"'{self.path}', which is adapted by {self.method}. It holds "
                f"{', '.join(sorted(names))}: enable the method it was saved "
                "with."
            )
        ours: Any = self.base_fingerprint
        if self.matrix is not None and not matches(
            ours,
            np.array(store["base_fingerprint"]),
            self.variable_dtype,
        ):
            raise ValueError(
                f"The weights file was saved from an adapted layer "
                f"'{self.path}' with another base kernel than this model's, "
                "and it holds the two merged. Load the base model that it was "
                "trained from first; or `remove_adapter()` and load the file "
                "into the plain model, which then is the merged one."
            )
        before = {name: ops.copy(v.value) for name, v in wanted.items()}
        for name, variable in wanted.items():
            variable.assign(store[name])
        if self.matrix is not None and not same_effect(
            effect(self.method, self, self.matrix()),
            np.array(store["effect"]),
            float(ours[0]),
            self.variable_dtype,
        ):
            for name, variable in wanted.items():
                variable.assign(before[name])
            raise ValueError(
                f"The weights file would not do in layer '{self.path}' what it "
                f"did where it was saved: {self.method} has other settings "
                "there, or the singular vectors come out otherwise here. "
                "Enable the method with the same settings; or "
                "`remove_adapter()` and load the file into the plain model, "
                "which then is the merged one."
            )

    def _stored(self) -> dict[str, Any]:
        """The variables that a full save holds."""
        return {
            f"{self.method.name}_{w.name}": getattr(self, w.name)
            for w in self.method.weights(self.shape)
            if self.self_contained or w.saved or w.overwritten or w.drawn
        }

    def variables_by_name(
        self, trainable: bool | None = None
    ) -> dict[str, Any]:
        """The variables, by their full names (`svf_delta`)."""
        return {
            f"{self.method.name}_{w.name}": getattr(self, w.name)
            for w in self.method.weights(self.shape)
            if trainable is None or w.trainable == trainable
        }


@dataclasses.dataclass(frozen=True)
class NewKernel:
    """A kernel that is not yet in the layer it is for.

    Attributes:
        mode: `"int8"` or `"int4"`, as Keras quantizes it; None as it is.
        variables: what the layer's variables are to hold, by attribute.
        matrix: function that returns it as a matrix (in, out), float32.
    """

    mode: str | None
    variables: dict[str, Any]
    matrix: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class ReplacedBase:
    """A base that is in the layer for its adapter, in place of W.

    Attributes:
        kernel: what to put into the layer; None once it is there.
        float_fingerprint: the fingerprint of W.
        norm: float, ‖W‖, the Frobenius norm. This and the rest where the base
            is quantized.
        plain_error: float, ‖W - quant(W)‖.
        error: float, ‖W - W̃‖, W̃ what base and adapter are at first.
    """

    kernel: NewKernel | None
    float_fingerprint: np.ndarray
    norm: float = 0.0
    plain_error: float = 0.0
    error: float = 0.0


@dataclasses.dataclass
class Plan:
    """An adapter for one matrix, ready to attach.

    Attributes:
        method: the method, its settings resolved for this matrix.
        values: what its weights are at first, by name.
        base_fingerprint: the fingerprint of W, or of what comes in its place.
        replaced: what comes in its place, if anything.
    """

    method: Method
    values: dict[str, Any]
    base_fingerprint: np.ndarray
    replaced: ReplacedBase | None = None


# From a matrix to the kernel that it is in a layer.
KernelMaker = Callable[[Any], NewKernel]
# From a method and its first values to tensors, each where it is to be.
Placer = Callable[[Method, dict[str, Any]], dict[str, Any]]


def plan(
    method: Method,
    matrix: Any,
    name: str,
    new_kernel: KernelMaker | None = None,
    place: Placer | None = None,
) -> Plan:
    """Decomposes W = `matrix` (in, out), the kernel of `name`.

    Or each matrix of a bank (count, in, out), whose weights are stacked.
    `new_kernel` makes the base of a method that replaces W.
    """
    method, values = started(method, matrix, name, new_kernel)
    return known_plan(method, matrix, values, new_kernel, place)


def started(
    method: Method,
    matrix: Any,
    name: str,
    new_kernel: KernelMaker | None = None,
) -> tuple[Method, dict[str, Any]]:
    """The expensive part of `plan`: the method, resolved, and first values."""
    start = _start_one if len(matrix.shape) == 2 else _start_bank
    method, values = start(method, matrix, name)
    if method.base_mode is None:
        return method, values
    assert new_kernel is not None

    def rounded(rest: np.ndarray) -> np.ndarray:
        return ops.convert_to_numpy(new_kernel(rest).matrix())

    def decomposed(rest: np.ndarray) -> Factors:
        needs = method.needs(tuple(rest.shape))
        assert needs is not None
        return decompose(ops.convert_to_tensor(rest), needs, name)

    w = ops.convert_to_numpy(matrix)
    return method, method.fitted(w, values, rounded, decomposed)


def known_plan(
    method: Method,
    matrix: Any,
    values: dict[str, Any],
    new_kernel: KernelMaker | None = None,
    place: Placer | None = None,
) -> Plan:
    """The same where the first values are known."""
    w = ops.convert_to_numpy(matrix)
    # Tensors already: while the next matrix is decomposed the memory of these
    # arrays is free again. At the end it would be held twice.
    tensors = (place or on_one_device)(method, values)
    if not method.replaces_base:
        return Plan(method, tensors, fingerprint(w))
    assert new_kernel is not None
    rest = method.residual(w, values)
    kernel = new_kernel(rest)
    base = ops.convert_to_numpy(kernel.matrix())
    if method.base_mode is None:
        facts = ReplacedBase(kernel, fingerprint(w))
        return Plan(method, tensors, fingerprint(base), facts)
    plain = ops.convert_to_numpy(new_kernel(w).matrix())
    facts = ReplacedBase(
        kernel,
        fingerprint(w),
        float(np.linalg.norm(w)),
        float(np.linalg.norm(w - plain)),
        # W - W̃ = (W - k·A₀·B₀) - Q
        float(np.linalg.norm(rest - base)),
    )
    return Plan(method, tensors, fingerprint(base), facts)


def on_one_device(_: Method, values: dict[str, Any]) -> dict[str, Any]:
    """The tensors of these values, for a kernel on one device."""
    return {name: ops.convert_to_tensor(x) for name, x in values.items()}


def _start_one(
    method: Method, matrix: Any, name: str
) -> tuple[Method, dict[str, Any]]:
    """The method, its settings resolved, and the first values."""
    shape = tuple(matrix.shape)
    needs = method.needs(shape)
    factors = None if needs is None else decompose(matrix, needs, name)
    if factors is not None and isinstance(getattr(method, "rank", 0), float):
        found: dict[str, Any] = {"rank": len(factors.s)}
        if hasattr(method, "n_iter"):
            found["n_iter"] = None  # the energy takes an exact decomposition
        method = dataclasses.replace(method, **found)
    # RandomState, since NumPy promises that its stream never changes: what is
    # drawn here is drawn again when an adapter file is loaded.
    seed = zlib.crc32(name.encode()) + getattr(method, "seed", 0)
    random = np.random.RandomState(seed % 2**32)
    return method, method.initial_values(matrix, factors, random)


def _start_bank(
    method: Method, matrices: Any, name: str
) -> tuple[Method, dict[str, Any]]:
    def each_of(method: Method) -> list[tuple[Method, dict[str, Any]]]:
        return [
            _start_one(method, matrices[i], f"{name}#{i}")
            for i in range(matrices.shape[0])
        ]

    each = each_of(method)
    if len({method for method, _ in each}) > 1:
        # By energy the matrices have several ranks; stacked they have one.
        widest = max((m for m, _ in each), key=lambda m: m.rank)  # type: ignore[attr-defined]
        each = each_of(widest)
    values = {
        key: np.stack([ops.convert_to_numpy(v[key]) for _, v in each])
        for key in each[0][1]
    }
    return each[0][0], values
