"""Another kernel for a layer, prepared before and put in its place.

QPiSSA's base is not W but what its low-rank start leaves of it, in int8 or
int4. All of these kernels are made before the first layer is touched, each in
a layer beside the real one, by Keras' own quantization. Then each layer is
quantized, and gets the prepared values instead of its own. Until the last one
is done, every layer can be put back as it was: its float kernel is kept. SVF's
`replace_kernel` goes the same way, without the quantization.
"""

import dataclasses
from collections.abc import Callable

from keras import ops

from keras_svdtune.adapter.plan import KernelMaker, NewKernel
from keras_svdtune.adapter.sharding import refitted
from keras_svdtune.hosts.quantized import (
    quantize,
    quantized_copy,
    variable_names,
)
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.runtime.keras_internals import remember_state
from keras_svdtune.runtime.placement import (
    place_variable,
    placement_of,
    undistributed,
)
from keras_svdtune.runtime.types import Array, Tensor


def kernel_maker(target: Target, method: Method) -> KernelMaker | None:
    """A function that makes a matrix (in, out) the kernel of `target`.

    None where the method leaves W as it is. The layer, a Dense or EinsumDense
    that is not quantized, is not touched.
    """
    if not isinstance(method, ReplacesBase):
        return None
    mode, view, name = method.quantization, target.view, target.attribute

    def as_it_is(matrix: Array) -> NewKernel:
        kernel = ops.cast(view.to_kernel(matrix), target.kernel.dtype)

        def rounded() -> Tensor:
            return ops.cast(view.to_matrix(kernel), "float32")

        return NewKernel(None, {name: kernel}, rounded)

    def quantizing(matrix: Array) -> NewKernel:
        assert mode is not None
        copy = quantized_copy(target.owner, view.to_kernel(matrix), mode)
        values = {
            name: getattr(copy, name).value
            for name in variable_names(copy)
            if hasattr(copy, name)
        }
        # Read through the copy, which holds the new kernel.
        made = dataclasses.replace(target, owner=copy)
        return NewKernel(mode, values, made.matrix)

    return as_it_is if mode is None else quantizing


def put_in_place(target: Target, kernel: NewKernel) -> None:
    """Gives a layer this kernel; makes it a quantized one if the kernel is."""
    layer = target.owner
    if kernel.mode is not None:
        before = placement_of(target.kernel)
        with undistributed():  # a rule for a kernel fits no packed one
            quantize(layer, target.kernel.value, kernel.mode)
        if before is not None:
            for name in kernel.variables:
                variable = getattr(layer, name)
                shape = tuple(variable.shape)
                spec = refitted(before.spec, shape, before.sizes)
                place_variable(variable, before.sharding(spec))
    for name, value in kernel.variables.items():
        getattr(layer, name).assign(value)


def remember(target: Target, kernel: NewKernel) -> Callable[[], None]:
    """How a layer is now, to undo what `put_in_place` does, also half done.

    Args:
        target: the layer's kernel, as it is.
        kernel: what will be put in place.

    Returns:
        A function that puts attributes, variables and their order back, and
        the kernel's value. The variables are the very same.
    """
    variable = target.kernel
    # Quantization gives the layer another variable; else this one is assigned.
    before = ops.copy(variable.value) if kernel.mode is None else None
    restore_state = remember_state(target.owner)

    def restore() -> None:
        restore_state()
        if before is not None:
            variable.assign(before)

    return restore
