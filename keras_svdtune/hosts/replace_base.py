"""Prepares another kernel for a layer, and puts it in place of W.

QPiSSA's base is not W but what its low-rank start leaves of it, in int8 or
int4. All such kernels are made before the first layer is touched, by Keras' own
quantization, each in a copy of its layer. Then each layer is quantized and gets
the prepared values. SVF's `replace_kernel` does the same in float.
"""

import dataclasses
from collections.abc import Callable

from keras import ops

from keras_svdtune.adapter.plan import KernelMaker, NewKernel
from keras_svdtune.adapter.sharding import spec_for_replacement
from keras_svdtune.hosts.quantized import (
    quantize,
    quantized_copy,
    variable_names,
)
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.runtime.placement import (
    place_variable,
    placement_of,
    undistributed,
)
from keras_svdtune.runtime.types import Array, Tensor


def kernel_maker(target: Target, method: Method) -> KernelMaker | None:
    """Returns a function that makes a matrix (in, out) a kernel of `target`.

    Returns None if the method leaves W as it is. The layer, a Dense or
    EinsumDense that is not quantized, is not touched.
    """
    if not isinstance(method, ReplacesBase):
        return None
    mode, view, name = method.quantization, target.view, target.attribute

    def as_it_is(matrix: Array) -> NewKernel:
        kernel = ops.cast(view.to_kernel(matrix), target.kernel.dtype)
        if not bool(ops.all(ops.isfinite(kernel))):
            raise ValueError(
                f"The kernel of '{target.path}' has numbers too large for "
                f"{target.kernel.dtype} when it is replaced. Leave the layer "
                "out of `target_layer_names`, or the kernel as it is."
            )

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
    """Gives a layer this kernel, quantizing the layer if the kernel is."""
    layer = target.owner
    if kernel.mode is not None:
        before = placement_of(target.kernel)
        with undistributed():  # a rule for a kernel fits no packed one
            quantize(layer, target.kernel.value, kernel.mode)
        if before is not None:
            for name in kernel.variables:
                variable = getattr(layer, name)
                shape = tuple(variable.shape)
                spec = spec_for_replacement(before.spec, shape, before.sizes)
                place_variable(variable, before.sharding(spec))
    for name, value in kernel.variables.items():
        getattr(layer, name).assign(value)


def remember_value(target: Target, kernel: NewKernel) -> Callable[[], None]:
    """Returns a function that restores the value that `put_in_place` changes.

    Quantization gives the layer another variable instead, so there is nothing
    to restore.
    """
    if kernel.mode is not None:
        return lambda: None
    variable = target.kernel
    before = ops.copy(variable.value)
    return lambda: variable.assign(before)
