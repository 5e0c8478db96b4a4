"""An adapter for one matrix, computed before anything is touched."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import (
    fingerprint,
)
from keras_svdtune.matrix.decompose import decompose
from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import Method


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
