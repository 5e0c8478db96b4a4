"""Converts a built layer in place, and back again, exactly.

A KerasHub backbone is a Functional graph that calls its layers by
reference, so a layer cannot be replaced; it can change its class. All that
this package relies on of Keras' internals is in this file and `freezing.py`:

- Variables and paths stay where they are. The adapter is a sublayer, built in
  the layer's own name scope, so that its variables get full paths.
- Weights files name the layers of a list by their class. So the class swapped
  in carries the name of the plain one, and files of plain and adapted
  models fit each other.
- A full save holds the merged kernel where the plain layer has its kernel,
  and the adapter in a group of its own, which a plain layer ignores.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_svdtune.adapter import Adapter, Plan, plan
from keras_svdtune.hosts import (
    HOSTS,
    AdaptedDense,
    AdaptedEinsumDense,
    AdapterHost,
    plain_class,
)
from keras_svdtune.matrix import MatrixView
from keras_svdtune.methods.base import Method


class _InPlace(AdapterHost):
    """What a converted layer does when the model is saved and loaded."""

    def _get_kernel_with_merged_lora(self) -> tuple[Any, None, None]:
        # Keras asks for (kernel, scale, zero point) to save here.
        return self.merged_kernel(), None, None

    def load_own_variables(self, store: Any) -> None:
        layer: Any = self
        before = ops.copy(layer._kernel.value)
        super().load_own_variables(store)  # type: ignore[misc]

        def settle(adapted_file: bool) -> None:
            if adapted_file:
                # The kernel that was read is merged; the adapter comes on top.
                layer._kernel.assign(before)
            elif not bool(ops.all(ops.equal(layer._kernel.value, before))):
                rebuild_basis(layer)

        self.adapter.settle = settle


class _InPlaceDense(_InPlace, AdaptedDense):
    pass


class _InPlaceEinsumDense(_InPlace, AdaptedEinsumDense):
    pass


_IN_PLACE: dict[type, type] = {
    keras.layers.Dense: _InPlaceDense,
    keras.layers.EinsumDense: _InPlaceEinsumDense,
}
for _plain, _class in _IN_PLACE.items():
    _class.__name__ = _class.__qualname__ = _plain.__name__
    # A config written from it names the plain layer.
    _class.__module__ = "keras.layers"


def view_of(layer: Any) -> MatrixView:
    """How the kernel of a plain or adapted layer reads as a matrix."""
    host: Any = HOSTS.get(type(layer), type(layer))
    return host.matrix_view(layer)


def matrix_of(layer: Any) -> Any:
    """W (in, out) of a plain or adapted layer, a float32 tensor."""
    kernel = ops.cast(layer._kernel.value, "float32")
    return view_of(layer).to_matrix(kernel)


def attach(
    layer: Any,
    method: Method,
    initial_value: Callable[[str], Any],
    host_class: type | None = None,
) -> None:
    """Gives `layer` an adapter, and the class that computes through it.

    Args:
        layer: a built Dense or EinsumDense.
        method: `Method`.
        initial_value: function from a weight's name to its first value,
            None for zeros.
        host_class: the class to swap in; None for the one that saves like
            a plain layer. A layer that has it already keeps it.
    """
    host_class = host_class or _IN_PLACE[type(layer)]
    adapter = Adapter(
        method,
        view_of(layer),
        initial_value,
        dtype=layer.dtype_policy,
        self_contained=not issubclass(host_class, _InPlace),
    )
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        with layer._open_name_scope():
            adapter.build(None)
        layer.adapter = adapter
    finally:
        if locked:
            layer._tracker.lock()
    layer.__class__ = host_class


def attach_plan(layer: Any, ready: Plan) -> None:
    """Gives `layer` the adapter that was prepared for it; uses it up."""
    attach(layer, ready.method, lambda name: ready.values.pop(name, None))
    layer.adapter.base_fingerprint = ready.base_fingerprint


def detach(layer: Any) -> None:
    """Takes the adapter away; the layer is a plain Keras layer again."""
    adapter = layer.adapter
    layer._tracker.unlock()
    delattr(layer, "adapter")
    layer._tracker.untrack(adapter)
    layer._tracker.lock()
    if isinstance(layer, AdapterHost):
        layer.__class__ = plain_class(layer)


def put_back(layer: Any, adapter: Adapter, host_class: type) -> None:
    """Undoes `detach`, and what was attached since: as it was before.

    Args:
        layer: a layer that was adapted; plain, adapted, or in between.
        adapter, host_class: the adapter and the class that it had.
    """
    layer._tracker.unlock()
    now = getattr(layer, "adapter", None)
    if now is not None and now is not adapter:
        delattr(layer, "adapter")
        layer._tracker.untrack(now)
    layer.adapter = adapter
    layer._tracker.lock()
    layer.__class__ = host_class


def merge(layer: Any) -> None:
    """Folds the adapter into the kernel and takes it away."""
    layer._kernel.assign(layer.merged_kernel())
    detach(layer)


def rebuild_basis(layer: Any) -> None:
    """Computes the adapter's weights anew, for a kernel that was replaced."""
    adapter = layer.adapter
    new = plan(adapter.method, matrix_of(layer), layer.path)
    for name, value in new.values.items():
        getattr(adapter, name).assign(value)
    adapter.reset()
    adapter.base_fingerprint = new.base_fingerprint
