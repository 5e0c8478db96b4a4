"""Converts a built layer in place, and back again, exactly.

A KerasHub backbone is a Functional graph that calls its layers by
reference, so a layer cannot be replaced; it can change its class. All that
this package relies on of Keras' internals is in this file and `freezing.py`,
and for several devices in `devices.py`:

- Variables and paths stay where they are. The adapter is a sublayer, built in
  the layer's own name scope, so that its variables get full paths.
- Weights files name the layers of a list by their class. So the class swapped
  in carries the name of the plain one, and files of plain and adapted
  models fit each other.
- A layer that gets another kernel for its adapter (`replaced_kernel.py`) has it
  before that; if quantized, it is as any layer that Keras has quantized.
- A full save holds the merged kernel where the plain layer has its kernel,
  and the adapter in a group of its own, which a plain layer ignores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.adapter.plan import Plan, plan
from keras_svdtune.adapter.sharding import adapter_layouts
from keras_svdtune.hosts.direct_kernels import (
    RawKernel,
    ReadsMerged,
    adapted_kernels,
    reading_merged,
)
from keras_svdtune.hosts.embeddings import AdaptedEmbedding
from keras_svdtune.hosts.host import (
    HOSTS,
    AdaptedConvolution,
    AdapterHost,
    host_matrix_of,
    kernel_of,
    matrix_of,
    view_of,
    without_adapter,
)
from keras_svdtune.hosts.quantized import (
    float_policy,
    requantized,
    variable_names,
)
from keras_svdtune.methods.base import Method
from keras_svdtune.runtime.placement import placed, placement_of


class _SavesMerged(AdapterHost):
    """What a converted layer does when the model is saved and loaded."""

    @property
    def kernel(self) -> Any:
        # What reads the kernel rather than call the layer, as Gemma 4's
        # feed-forward block does, gets the adapted one.
        return self.merged_in_compute_dtype()

    def _get_kernel_with_merged_lora(self) -> tuple[Any, ...]:
        # Keras asks for (kernel, scale, zero point) to save here.
        merged = _merged_variables(self)
        return tuple(merged.get(name) for name in _names(self))

    def load_own_variables(self, store: Any) -> None:
        before = _copies(self)
        super().load_own_variables(store)  # type: ignore[misc]
        self.adapter.settle = _settle(self, before)


class _SavesMergedEmbedding(_SavesMerged):
    @property
    def embeddings(self) -> Any:
        return self.merged_kernel()  # Keras does not autocast it either

    def _get_embeddings_with_merged_lora(self) -> tuple[Any, ...]:
        return self._get_kernel_with_merged_lora()


class _SavesMergedConvolution(_SavesMerged):
    def save_own_variables(self, store: Any) -> None:
        layer: Any = self
        store["0"] = self.merged_kernel()
        if layer.bias is not None:
            store["1"] = layer.bias


class _OwnerSavesMerged(ReadsMerged):
    """What the owner of raw kernels does when the model is saved and loaded."""

    def save_own_variables(self, store: Any) -> None:
        layer: Any = self
        kernels = {id(x.variable): x for x in adapted_kernels(self)}
        variables = layer._trainable_variables + layer._non_trainable_variables
        for i, variable in enumerate(variables):
            kernel = kernels.get(id(variable))
            store[str(i)] = kernel.merged_kernel() if kernel else variable

    def load_own_variables(self, store: Any) -> None:
        before = [(x, _copies(x)) for x in adapted_kernels(self)]
        super().load_own_variables(store)  # type: ignore[misc]
        for kernel, copies in before:
            kernel.adapter.settle = _settle(kernel, copies)


def _in_place(host: type[AdapterHost]) -> type:
    """The class to swap in, which saves like the plain one."""
    mixin: type[_SavesMerged] = _SavesMerged
    if issubclass(host, AdaptedConvolution):
        mixin = _SavesMergedConvolution
    elif issubclass(host, AdaptedEmbedding):
        mixin = _SavesMergedEmbedding
    # A config written from it names the plain layer.
    return type(
        host.plain.__name__, (mixin, host), {"__module__": "keras.layers"}
    )


_IN_PLACE = {plain: _in_place(host) for plain, host in HOSTS.items()}


def owner_of(layer: Any) -> Any:
    """The Keras layer that a target is, or whose kernel it is."""
    return layer.owner if isinstance(layer, RawKernel) else layer


def adapter_of(layer: Any) -> Any:
    """The adapter of a target, or None."""
    return getattr(owner_of(layer), _slot(layer), None)


def _slot(layer: Any) -> str:
    """The attribute of the owner that holds the adapter."""
    return layer.slot if isinstance(layer, RawKernel) else "adapter"


def _host_class(layer: Any) -> type:
    if not isinstance(layer, RawKernel):
        return _IN_PLACE[type(layer)]
    owner = type(layer.owner)
    return (
        owner
        if issubclass(owner, ReadsMerged)
        else reading_merged(owner, _OwnerSavesMerged)  # type: ignore[arg-type]
    )


def attach(
    layer: Any,
    method: Method,
    initial_value: Callable[[str], Any],
    host_class: type | None = None,
) -> None:
    """Gives `layer` an adapter, and the class that computes through it.

    Args:
        layer: a built layer of a class in `HOSTS`, or a `RawKernel`.
        method: `Method`.
        initial_value: function from a weight's name to its first value,
            None for zeros.
        host_class: the class to swap in; None for the one that saves like
            a plain layer. A layer that has it already keeps it.
    """
    declared = host_class is not None
    host_class = host_class or _host_class(layer)
    adapter = Adapter(
        method,
        view_of(layer),
        initial_value,
        # What an adapter adds to a quantized kernel is of the float policy.
        dtype=float_policy(layer),
        self_contained=declared,
        shardings=shardings_of(layer, method),
        name=_slot(layer),
    )
    owner = owner_of(layer)
    locked = owner._tracker.locked
    owner._tracker.unlock()
    try:
        with owner._open_name_scope():
            adapter.build(None)
        setattr(owner, _slot(layer), adapter)
    finally:
        if locked:
            owner._tracker.lock()
    owner.__class__ = host_class


def shardings_of(layer: Any, method: Method) -> dict[str, Any]:
    """How each weight of an adapter is split, as its kernel is; by name.

    Empty where the kernel is on one device.
    """
    kernel = placement_of(kernel_of(layer))
    if kernel is None:
        return {}
    view = view_of(layer)
    specs = adapter_layouts(
        method.weights(view.shape), view, kernel.spec, kernel.sizes
    )
    return {name: kernel.sharding(spec) for name, spec in specs.items()}


def place_values(
    layer: Any, method: Method, values: dict[str, Any]
) -> dict[str, Any]:
    """The tensors of an adapter's first values, each on its devices."""
    shardings = shardings_of(layer, method)
    return {
        name: placed(value, shardings.get(name))
        for name, value in values.items()
    }


def attach_plan(layer: Any, ready: Plan) -> None:
    """Gives `layer` the adapter that was prepared for it; uses it up."""
    attach(layer, ready.method, lambda name: ready.values.pop(name, None))
    layer.adapter.base_fingerprint = ready.base_fingerprint
    layer.adapter.matrix = functools.partial(matrix_of, layer)
    if ready.replaced is not None:
        base = dataclasses.replace(ready.replaced, kernel=None)
        layer.adapter.replaced = base


def detach(layer: Any) -> None:
    """Takes the adapter away; the layer is a plain Keras layer again."""
    owner = owner_of(layer)
    _drop(owner, _slot(layer))
    if isinstance(layer, RawKernel):
        if isinstance(owner, ReadsMerged) and not adapted_kernels(owner):
            owner.__class__ = owner.plain
    elif isinstance(owner, AdapterHost):
        owner.__class__ = owner.plain


def put_back(layer: Any, adapter: Adapter, host_class: type) -> None:
    """Undoes `detach`, and what was attached since: as it was before.

    Args:
        layer: a layer that was adapted; plain, adapted, or in between.
        adapter, host_class: the adapter, and the class that its owner had.
    """
    owner = owner_of(layer)
    if adapter_of(layer) not in (None, adapter):
        _drop(owner, _slot(layer))
    owner._tracker.unlock()
    setattr(owner, _slot(layer), adapter)
    owner._tracker.lock()
    owner.__class__ = host_class


def _drop(owner: Any, slot: str) -> None:
    adapter = getattr(owner, slot)
    owner._tracker.unlock()
    delattr(owner, slot)
    owner._tracker.untrack(adapter)
    owner._tracker.lock()


def merge(layer: Any) -> None:
    """Folds the adapter into the kernel and takes it away."""
    merged = _merged_variables(layer)
    for name, variable in _kernel_variables(layer).items():
        variable.assign(merged[name])
    detach(layer)


def take_away(layer: Any) -> None:
    """Takes the adapter away, with what it learned.

    A base that was put into the layer for it is not W without the adapter's
    first weights; so these are folded into it.
    """
    if layer.adapter.replaced is None:
        detach(layer)
    else:
        layer.adapter.reset()
        merge(layer)


def rebuild_basis(layer: Any) -> None:
    """Computes the adapter's weights anew, for a kernel that was replaced."""
    adapter = layer.adapter
    new = plan(adapter.method, host_matrix_of(layer), layer.path)
    for name, value in new.values.items():
        getattr(adapter, name).assign(value)
    adapter.reset()
    adapter.base_fingerprint = new.base_fingerprint


def _kernel_variables(layer: Any) -> dict[str, Any]:
    """The variables that hold the kernel: several if it is quantized."""
    if layer.quantization_mode is None:
        return {_names(layer)[0]: kernel_of(layer)}
    found = {x: getattr(layer, x, None) for x in _names(layer)}
    return {name: x for name, x in found.items() if x is not None}


def _names(layer: Any) -> tuple[str, ...]:
    if layer.quantization_mode is None:
        return (layer.kernel_name, "", "")
    return variable_names(layer)


def _merged_variables(layer: Any) -> dict[str, Any]:
    """What they are for the merged kernel."""
    merged = layer.merged_kernel()
    if layer.quantization_mode is None:
        return {_names(layer)[0]: merged}
    return requantized(without_adapter(layer), merged)


def _copies(layer: Any) -> dict[str, Any]:
    variables = _kernel_variables(layer)
    return {name: ops.copy(x.value) for name, x in variables.items()}


def _settle(layer: Any, before: dict[str, Any]) -> Callable[[bool], None]:
    """What is left to do once a weights file was read."""

    def settle(adapted_file: bool) -> None:
        variables = _kernel_variables(layer)
        if adapted_file:
            # The kernel that was read is merged; the adapter comes on top.
            for name, variable in variables.items():
                variable.assign(before[name])
        elif layer.adapter.replaced is not None:
            for name, variable in variables.items():
                variable.assign(before[name])
            raise ValueError(
                f"The weights file holds a plain layer '{layer.path}', and "
                "this one has a base that was made for its adapter "
                f"({layer.adapter.method}). Call `remove_adapter()` first, or "
                "load the file into a plain model."
            )
        elif not all(
            bool(ops.all(ops.equal(variable.value, before[name])))
            for name, variable in variables.items()
        ):
            rebuild_basis(layer)

    return settle
