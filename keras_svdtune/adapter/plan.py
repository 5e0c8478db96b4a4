"""Computes the adapter of one matrix before any layer is touched."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import fingerprint
from keras_svdtune.matrix.decompose import check_finite, decompose
from keras_svdtune.matrix.factors import Factors, Needs
from keras_svdtune.matrix.rounding import noise, rounded
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.data_method import DataMethod, Seen
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.runtime.types import Array, Shape, Tensor

# First values of the weights of one adapter, by name.
Values = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class NewKernel:
    """A kernel for a layer that does not hold it yet.

    Attributes:
        mode: `"int8"` or `"int4"`, as Keras quantizes it; None if it is float.
        variables: the new values of the layer's variables, by attribute.
        matrix: function that returns the kernel as (in, out), float32.
    """

    mode: str | None
    variables: dict[str, Tensor]
    matrix: Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class ReplacedBase:
    """A kernel that takes the place of W in a layer, for its adapter.

    Attributes:
        kernel: the kernel to put into the layer; None once it is there.
        float_fingerprint: the fingerprint of W.
        corrections: entries of W that come back from the kernel with another
            rounding to bfloat16: their places in W, flat, and their values.
            W with these has the basis that it had. None for a kernel in half
            precision, from which most come back otherwise, or quantized.
        norm: float, ‖W‖ (Frobenius); like the errors, 0 for a float kernel.
        plain_error: float, ‖W - quant(W)‖.
        error: float, ‖W - W̃‖, where W̃ is the kernel with its first adapter.
    """

    kernel: NewKernel | None
    float_fingerprint: np.ndarray
    corrections: tuple[np.ndarray, np.ndarray] | None = None
    norm: float = 0.0
    plain_error: float = 0.0
    error: float = 0.0


@dataclasses.dataclass
class AdapterPlan:
    """An adapter for one matrix, ready to attach.

    Attributes:
        method: the method, its settings resolved for this matrix.
        values: the first values of its weights, by name.
        base_fingerprint: the fingerprint of W, or of the kernel in its place.
        replaced: the kernel in place of W, if there is one.
        rounds: whether its basis is that of W rounded to bfloat16.
    """

    method: Method
    values: Values
    base_fingerprint: np.ndarray
    replaced: ReplacedBase | None = None
    rounds: bool = False


# Makes of a matrix (in, out) the kernel that holds it in a layer.
KernelMaker = Callable[[Array], NewKernel]
# Turns the first values of a method into tensors, each on its devices.
Placer = Callable[[Method, Values], Values]


def plan_adapter(
    method: Method, matrix: Array, name: str, rounds: bool
) -> AdapterPlan:
    """Plans the adapter of W (in, out), or of a bank, with stacked weights.

    Args:
        matrix: W, or a bank (count, in, out); float32, a tensor or an array.
        name: str, the path of the layer, for seeds and for errors.
        rounds: whether the basis is that of W rounded to bfloat16.
    """
    method, values = first_values(method, matrix, name, rounds)
    return plan_from(method, matrix, values, rounds)


def first_values(
    method: Method,
    matrix: Array,
    name: str,
    rounds: bool,
    make_kernel: KernelMaker | None = None,
) -> tuple[Method, Values]:
    """Returns the method resolved for W, and first values: the costly part.

    `make_kernel` is needed by a method that replaces W; the other arguments are
    those of `plan_adapter`.
    """
    start = _start_matrix if len(matrix.shape) == 2 else _start_bank
    method, values = start(method, matrix, name, rounds)
    if not isinstance(method, ReplacesBase) or make_kernel is None:
        return method, values
    resolved, kernel_of = method, make_kernel

    def rounded(rest: np.ndarray) -> np.ndarray:
        return _on_host(kernel_of(rest).matrix())

    def decomposed(rest: np.ndarray) -> Factors:
        shape: Shape = (rest.shape[0], rest.shape[1])
        needs = resolved.needs(shape)
        assert needs is not None
        return decompose(ops.convert_to_tensor(rest), needs, name)

    w = _on_host(matrix)
    with _naming(name):
        return method, method.fitted(w, values, rounded, decomposed)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the layer before the error of a method, which knows no layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Layer '{name}': {error}") from None


def plan_from(
    method: Method,
    matrix: Array,
    values: Values,
    rounds: bool,
    make_kernel: KernelMaker | None = None,
    place: Placer | None = None,
) -> AdapterPlan:
    """Plans an adapter whose first values are known.

    `place` puts them on their devices; if None, they go to the default one.
    """
    w = _on_host(matrix)
    # Tensors already, so that the memory of the arrays is free while the next
    # matrix is decomposed. Converted at the end, all would be held twice.
    tensors = (place or _on_one_device)(method, values)
    if not isinstance(method, ReplacesBase):
        return AdapterPlan(method, tensors, fingerprint(w), rounds=rounds)
    assert make_kernel is not None
    rest = method.residual(w, {k: _on_host(x) for k, x in values.items()})
    kernel = make_kernel(rest)
    base = _on_host(kernel.matrix())
    if method.quantization is None:
        restored = method.restored(
            base, {k: _on_host(x) for k, x in values.items()}
        )
        facts = ReplacedBase(kernel, fingerprint(w), _corrections(w, restored))
    else:
        plain = _on_host(make_kernel(w).matrix())
        facts = ReplacedBase(
            kernel,
            fingerprint(w),
            None,
            float(np.linalg.norm(w)),
            float(np.linalg.norm(w - plain)),
            # W - W̃ = (W - k·A₀·B₀) - Q
            float(np.linalg.norm(rest - base)),
        )
    return AdapterPlan(method, tensors, fingerprint(base), facts, rounds)


def _corrections(
    w: np.ndarray, restored: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    places = np.flatnonzero(rounded(restored) != rounded(w))
    if len(places) > w.size // 100:
        return None
    return places, w.reshape(-1)[places]


def _on_one_device(_: Method, values: Values) -> Values:
    return {name: ops.convert_to_tensor(x) for name, x in values.items()}


def _on_host(x: Array) -> np.ndarray:
    array: np.ndarray = ops.convert_to_numpy(x)
    return array


def values_from_data(
    method: DataMethod, matrix: Array, seen: Seen, name: str
) -> Values:
    """Returns first values of all weights that start from data.

    Args:
        method: fits the matrix, `for_shape`.
        matrix, name: as for `plan_adapter`.
        seen: what the data gave for W; for a bank, stacked.
    """
    check_finite(matrix, name)
    w = _on_host(matrix)
    rows, columns = w.shape[-2:]
    random = _random(method, name)
    values: Values
    if w.ndim == 2:
        values = method.start(w, seen, random)
    else:
        assert isinstance(seen, np.ndarray)
        each = [
            method.start(*pair, random) for pair in zip(w, seen, strict=True)
        ]
        values = {k: np.stack([x[k] for x in each]) for k in each[0]}
    first = {
        weight.name: np.zeros((*w.shape[:-2], *weight.shape))
        for weight in method.weights((rows, columns))
    }
    # In order: torch keeps that of an array, and rounds products by it.
    return {
        k: np.ascontiguousarray(x, "float32")
        for k, x in (first | values).items()
    }


def _random(method: Method, name: str) -> np.random.RandomState:
    # RandomState, since NumPy promises that its stream never changes: loading
    # an adapter file draws the same numbers again.
    seed = zlib.crc32(name.encode()) + getattr(method, "seed", 0)
    return np.random.RandomState(seed % 2**32)


def _start_matrix(
    method: Method, matrix: Array, name: str, rounds: bool
) -> tuple[Method, Values]:
    check_finite(matrix, name)
    shape: Shape = (matrix.shape[0], matrix.shape[1])
    method = method.for_shape(shape)
    needs = method.needs(shape)
    factors = None
    if needs is not None:
        factors = _decomposed(matrix, needs, name, rounds)
    method = method.resolved(factors)
    random = _random(method, name)
    with _naming(name):
        return method, method.initial_values(matrix, factors, random)


def _decomposed(
    matrix: Array, needs: Needs, name: str, rounds: bool
) -> Factors:
    if not rounds:
        return decompose(matrix, needs, name)
    factors = decompose(rounded(matrix), needs, name)
    return dataclasses.replace(factors, noise=noise(factors.s))


def _start_bank(
    method: Method, matrices: Array, name: str, rounds: bool
) -> tuple[Method, Values]:
    def each_of(method: Method) -> list[tuple[Method, Values]]:
        return [
            _start_matrix(method, matrices[i], f"{name}#{i}", rounds)
            for i in range(matrices.shape[0])
        ]

    each = each_of(method)
    if len({resolved for resolved, _ in each}) > 1:
        # A share of energy gives several ranks; stacking needs one.
        widest = max(
            (m for m, _ in each), key=lambda m: m.current_rank(None) or 0
        )
        each = each_of(widest)
    values = {
        key: np.stack([_on_host(v[key]) for _, v in each]) for key in each[0][1]
    }
    return each[0][0], values
