"""A float layer quantized in place, with a kernel that was prepared before.

QPiSSA's base is not W but what its low-rank start leaves of it, in int8 or
int4. All of these kernels are made before the first layer is touched, each in
a layer beside the real one, by Keras' own quantization. Then each layer is
quantized, and gets the prepared values instead of its own. Until the last one
is done, every layer can be put back as it was: its float kernel is kept.
"""

import functools
from collections.abc import Callable
from typing import Any

from keras_svdtune.hosts import matrix_of, view_of
from keras_svdtune.quantized import (
    QuantizedKernel,
    quantize,
    quantized_copy,
    variable_names,
)


def quantizer_of(layer: Any, mode: str) -> Callable[[Any], QuantizedKernel]:
    """A function that quantizes a matrix as the kernel of `layer`.

    Args:
        layer: a built Dense or EinsumDense, not quantized. It is not touched.
        mode: `"int8"` or `"int4"`.

    Returns:
        A function from a matrix (in, out) to a `QuantizedKernel`.
    """
    view = view_of(layer)

    def quantizer(matrix: Any) -> QuantizedKernel:
        copy = quantized_copy(layer, view.to_kernel(matrix), mode)
        return QuantizedKernel(
            mode,
            {
                name: getattr(copy, name).value
                for name in variable_names(layer)
                if hasattr(copy, name)
            },
            functools.partial(matrix_of, copy),
        )

    return quantizer


def quantize_in_place(layer: Any, kernel: QuantizedKernel) -> None:
    """Makes `layer` a quantized one with this kernel."""
    quantize(layer, layer._kernel.value, kernel.mode)
    for name, value in kernel.variables.items():
        getattr(layer, name).assign(value)


def remember(layer: Any) -> Callable[[], None]:
    """How `layer` is now, to undo its quantization, also half done.

    Returns:
        A function that puts attributes, variables and their order back. The
        variables are the very same; nothing is copied.
    """
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
        tracker.locked = locked

    return restore
