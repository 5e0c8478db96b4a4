"""Converts a built layer to an adapted one in place, and back exactly.

The layer changes its class and gets its adapter as a sublayer, built in the
layer's own name scope so that its variables get full paths. Its own variables
and paths stay. A kernel that replaces W is put in first (`replace_base.py`).
"""

import dataclasses

import numpy as np
from keras import ops

from keras_svdtune.adapter.adapter import Adapter, FirstValue
from keras_svdtune.adapter.plan import AdapterPlan, Values
from keras_svdtune.adapter.sharding import adapter_layouts
from keras_svdtune.hosts.direct_kernels import (
    ReadsMerged,
    adapted_directly,
    direct_targets,
    reading_merged,
)
from keras_svdtune.hosts.host import HOSTS, AdapterHost
from keras_svdtune.hosts.quantized import float_policy
from keras_svdtune.hosts.saving import IN_PLACE, OwnerSavesMerged
from keras_svdtune.hosts.target import Target, host_value_of
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.runtime.keras_internals import (
    build_inside,
    drop_sublayer,
    track_parameters,
    unlocked,
)
from keras_svdtune.runtime.placement import placement_of, to_devices
from keras_svdtune.runtime.types import Layer, Tensor


def plain_targets(layer: Layer) -> list[Target]:
    """Returns the matrices of a built layer that have no adapter.

    Raises:
        ValueError: the kernel is no matrix, and why.
    """
    host = HOSTS.get(type(layer))
    if host is None:
        return [x for x in direct_targets(layer) if x.adapter is None]
    path, view = layer.path or layer.name, host.matrix_view(layer)
    return [Target(path, layer, host.kernel_name, view)]


def adapted_targets_of(layer: Layer) -> list[Target]:
    """Returns the matrices of one layer that have an adapter."""
    if isinstance(layer, AdapterHost):
        return [layer.target]
    return adapted_directly(layer)


def attach(
    target: Target,
    method: Method,
    first_value: FirstValue,
    host_class: type | None = None,
) -> Adapter:
    """Gives a layer an adapter, and the class that computes through it.

    Args:
        target: the kernel, in a built layer without an adapter.
        first_value: maps a weight's name to its first value, None for zeros.
        host_class: the class of a layer that is declared with its method; None
            for the class that saves like a plain layer.
    """
    owner = target.owner
    adapter = Adapter(
        method,
        target.view,
        target,
        first_value,
        # Beside a quantized kernel an adapter computes by the float policy.
        dtype=float_policy(owner),
        self_contained=host_class is not None,
        shardings=shardings_of(target, method),
        name=target.slot,
    )
    with unlocked(owner):
        build_inside(owner, adapter)
        setattr(owner, target.slot, adapter)
    owner.__class__ = host_class or _converted_class(target)
    track_parameters([owner])
    return adapter


def attach_plan(target: Target, plan: AdapterPlan) -> Adapter:
    """Gives a layer its planned adapter, and empties `plan.values`."""
    adapter = attach(
        target, plan.method, lambda name: plan.values.pop(name, None)
    )
    adapter.base_fingerprint = plan.base_fingerprint
    adapter.rounds = plan.rounds
    if plan.replaced is not None:
        adapter.replaced = dataclasses.replace(plan.replaced, kernel=None)
    return adapter


def _converted_class(target: Target) -> type:
    plain = type(target.owner)
    if not target.direct:
        return IN_PLACE[plain]
    if issubclass(plain, ReadsMerged):  # another of its kernels is adapted
        return plain
    return reading_merged(plain, OwnerSavesMerged)  # type: ignore[arg-type]


def shardings_of(target: Target, method: Method) -> dict[str, object]:
    """Returns how to split each weight like its kernel; {} if on one device."""
    kernel = placement_of(target.kernel)
    if kernel is None:
        return {}
    specs = adapter_layouts(
        method.weights(target.view.shape),
        target.view,
        kernel.spec,
        kernel.sizes,
    )
    return {name: kernel.sharding(spec) for name, spec in specs.items()}


def place_values(target: Target, method: Method, values: Values) -> Values:
    """Returns the first values of an adapter as tensors on their devices."""
    shardings = shardings_of(target, method)
    return {
        name: to_devices(value, shardings.get(name))
        for name, value in values.items()
    }


def detach(target: Target) -> None:
    """Removes the adapter; the layer is a plain Keras layer again."""
    _take_away(target, target.adapted)


def _take_away(target: Target, adapter: Adapter) -> None:
    """Removes an adapter. It may be called again, if it was interrupted."""
    owner = target.owner
    drop_sublayer(owner, target.slot, adapter)
    if isinstance(owner, AdapterHost) or (
        isinstance(owner, ReadsMerged) and not adapted_directly(owner)
    ):
        owner.__class__ = owner.plain
    track_parameters([owner])


class Merge:
    """Merges the adapter of a target into its kernel and removes it.

    It is called; and called again, if it was interrupted.
    """

    def __init__(self, target: Target):
        self._target = target
        self._adapter = target.adapted
        self._merged: dict[str, Tensor] | None = None

    def __call__(self) -> None:
        if self._merged is None:
            self._merged = self._target.merged_variables()
        for name, variable in self._target.kernel_variables().items():
            variable.assign(self._merged[name])
        _take_away(self._target, self._adapter)


def remove(target: Target) -> None:
    """Removes the adapter and what it learned.

    A kernel that was put in place of W needs the first weights of the adapter
    to compute what W did, so these are merged into it.
    """
    adapter = target.adapted
    if adapter.replaced is not None and adapter.replaced.corrections is None:
        adapter.reset()
        Merge(target)()
        return
    if adapter.replaced is not None:
        restored = target.view.to_kernel(_restored(target))
        target.kernel.assign(ops.cast(restored, target.kernel.dtype))
    detach(target)


def _restored(target: Target) -> np.ndarray:
    """Returns W, whose rounding to bfloat16 is again what it was.

    On the host, where the corrections were found: another sum would differ.
    """
    adapter = target.adapted
    method, replaced = adapter.method, adapter.replaced
    assert isinstance(method, ReplacesBase) and replaced is not None
    assert replaced.corrections is not None
    frozen = {
        weight.name: ops.convert_to_numpy(
            host_value_of(getattr(adapter, weight.name))
        )
        for weight in method.weights(target.view.shape)
    }
    kernel = ops.convert_to_numpy(target.host_matrix())
    w = method.restored(kernel, frozen)
    places, values = replaced.corrections
    w.flat[places] = values
    return w
