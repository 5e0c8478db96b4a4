"""The matrices of a model one by one, without their adapters and with them.

A bank of experts is taken apart here, and a replaced kernel read back, so that
reports see one W and one W' at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

from keras_svdtune.hosts.target import Target, host_value_of
from keras_svdtune.methods.base import WeightValues
from keras_svdtune.runtime.parallel import run_all
from keras_svdtune.runtime.processes import processes
from keras_svdtune.runtime.types import Array

T = TypeVar("T")


def each_matrix(targets: dict[str, Target]) -> dict[str, Target]:
    """Returns the targets by path, each matrix of a bank as one by itself."""
    found = {}
    for path, target in targets.items():
        if target.view.count is None:
            found[path] = target
            continue
        for i in range(target.view.count):
            one = dataclasses.replace(target, path=f"{path}#{i}", index=i)
            found[one.path] = one
    return found


def kernel_matrix(target: Target) -> Array:
    """Returns the layer's kernel (in, out), float32: W unless replaced."""
    matrix = target.host_matrix()
    return matrix if target.index is None else matrix[target.index]


def base_matrix(target: Target) -> Array:
    """Returns W (in, out), float32, without what the adapter has learned."""
    kernel = kernel_matrix(target)
    if not target.replaced:
        return kernel
    method = target.adapted.method
    return method.merged(weight_values(target, neutral=True), kernel)


def merged_matrix(target: Target) -> Array:
    """Returns W' (in, out), float32; W where there is no adapter."""
    kernel = kernel_matrix(target)
    if target.adapter is None:
        return kernel
    return target.adapter.method.merged(weight_values(target), kernel)


def weight_values(target: Target, neutral: bool = False) -> WeightValues:
    """Returns the adapter's weights for one matrix, as methods take them.

    With `neutral`, the trainable ones have values that change nothing.
    """
    adapter = target.adapted
    found = WeightValues(target.view.shape)
    for weight in adapter.method.weights(target.view.shape):
        value = host_value_of(getattr(adapter, weight.name))
        if target.index is not None:
            value = value[target.index]
        setattr(found, weight.name, value)
    if neutral:
        vars(found).update(adapter.method.neutral(found))
    return found


def for_each(
    what: str, jobs: Mapping[str, Callable[[], T]], bar: bool = True
) -> dict[str, T]:
    """Runs the jobs in threads; several processes run them in order.

    Processes gather values together, and so must agree on the order.
    """
    if processes()[1] > 1:
        return {path: job() for path, job in jobs.items()}
    return run_all(what, jobs, bar)
