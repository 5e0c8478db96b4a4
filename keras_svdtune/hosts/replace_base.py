"""Another kernel for a layer, prepared before and put in its place.

QPiSSA's base is not W but what its low-rank start leaves of it, in int8 or
int4. All of these kernels are made before the first layer is touched, each in
a layer beside the real one, by Keras' own quantization. Then each layer is
quantized, and gets the prepared values instead of its own. Until the last one
is done, every layer can be put back as it was: its float kernel is kept. SVF's
`replace_kernel` goes the same way, without the quantization.
"""

import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_svdtune.adapter.plan import NewKernel
from keras_svdtune.adapter.sharding import refitted
from keras_svdtune.hosts.host import kernel_of, matrix_of, view_of
from keras_svdtune.hosts.quantized import (
    quantize,
    quantized_copy,
    variable_names,
)
from keras_svdtune.runtime.placement import (
    place_variable,
    placement_of,
    undistributed,
)


def kernel_maker(layer: Any, mode: str | None) -> Callable[[Any], NewKernel]:
    """A function that makes a matrix the kernel of `layer`.

    Args:
        layer: a built Dense or EinsumDense, not quantized. It is not touched.
        mode: `"int8"` or `"int4"`, to quantize it; None, not to.

    Returns:
        A function from a matrix (in, out) to a `NewKernel`.
    """
    view = view_of(layer)
    name, *_ = variable_names(layer)

    def as_it_is(matrix: Any) -> NewKernel:
        kernel = ops.cast(view.to_kernel(matrix), kernel_of(layer).dtype)

        def rounded() -> Any:
            return ops.cast(view.to_matrix(kernel), "float32")

        return NewKernel(None, {name: kernel}, rounded)

    if mode is None:
        return as_it_is

    def quantizer(matrix: Any) -> NewKernel:
        copy = quantized_copy(layer, view.to_kernel(matrix), mode)
        return NewKernel(
            mode,
            {
                name: getattr(copy, name).value
                for name in variable_names(layer)
                if hasattr(copy, name)
            },
            functools.partial(matrix_of, copy),
        )

    return quantizer


def put_in_place(layer: Any, kernel: NewKernel) -> None:
    """Gives `layer` this kernel; makes it a quantized one if the kernel is."""
    if kernel.mode is not None:
        before = placement_of(kernel_of(layer))
        with undistributed():  # a rule for a kernel fits no packed one
            quantize(layer, layer._kernel.value, kernel.mode)
        if before is not None:
            for name in kernel.variables:
                variable = getattr(layer, name)
                shape = tuple(variable.shape)
                spec = refitted(before.spec, shape, before.sizes)
                place_variable(variable, before.sharding(spec))
    for name, value in kernel.variables.items():
        getattr(layer, name).assign(value)


def remember(layer: Any, kernel: NewKernel) -> Callable[[], None]:
    """How `layer` is now, to undo what `put_in_place` does, also half done.

    Args:
        layer: a layer as it is.
        kernel: what will be put in place.

    Returns:
        A function that puts attributes, variables and their order back, and
        the kernel's value. The variables are the very same.
    """
    variable = kernel_of(layer)
    # Quantization gives the layer another variable; else this one is assigned.
    before = ops.copy(variable.value) if kernel.mode is None else None
    attributes = dict(layer.__dict__)
    tracker = layer._tracker
    stores = {name: list(x) for name, (_, x) in tracker.config.items()}
    ids = {name: set(x) for name, x in tracker.stored_ids.items()}
    locked = tracker.locked

    def restore() -> None:
        tracker.unlock()
        for name in set(layer.__dict__) - set(attributes):
            delattr(layer, name)
        for name, value in attributes.items():
            if layer.__dict__.get(name) is not value:
                setattr(layer, name, value)
        for name, (_, store) in tracker.config.items():
            store[:] = stores[name]
            tracker.stored_ids[name] = set(ids[name])
        if hasattr(layer, "_torch_params"):  # torch keeps a list of its own
            layer._track_variables()
        if before is not None:
            variable.assign(before)
        tracker.locked = locked

    return restore
