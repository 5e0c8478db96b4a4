"""Derives how an adapter is split over devices from how its kernel is split.

A kernel of a model on several devices is split along axes of a mesh of devices.
Every weight of its adapter is split to match, without a rule for it: a method
labels its dimensions with the axis of W (in, out) that they run along.

| label of the dimension | it is split along |
|---|---|
| `IN`, `OUT` | the mesh axes of W's in or out, if they split it into blocks |
| `COMPONENTS`, of a full basis | the axes that its other dimension leaves |
| None: a rank, or tiny | nothing |

So nothing of size n² is whole on every device. With V (out, n) of SVF under a W
that is split along out (column-parallel), V is split along out too: h·V is
summed over the devices, and (..)·Vᵀ stays local. Under a W that is split along
in (row-parallel), V is split along n: h·V stays local, and (..)·Vᵀ is summed.
Either costs one more collective in the forward and one in the backward pass.

Here are only names and numbers; `runtime/placement.py` tells JAX.
"""

import math
from collections.abc import Iterable, Mapping

from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.methods.base import COMPONENTS, IN, OUT, Weight
from keras_svdtune.runtime.placement import Axes, Spec

COUNT = "count"  # label of the axis of a bank


def adapter_layouts(
    weights: Iterable[Weight],
    view: MatrixView,
    kernel: Spec,
    sizes: Mapping[str, int],
) -> dict[str, Spec]:
    """Returns how to split each weight of an adapter, by its name.

    Args:
        weights: what the method asks for.
        view: reads the kernel as a matrix.
        kernel: the mesh axes of each dimension of the kernel.
        sizes: devices along each mesh axis.

    Returns:
        The mesh axes of each dimension of each weight; in a bank, those of its
        number of matrices come first.

    Example:

    ```python
    view = MatrixView("btd,df->btf", (64, 32))
    column_parallel = ((), ("model",))
    layouts = adapter_layouts(
        SVF().weights(view.shape), view, column_parallel, {"model": 8}
    )
    layouts["basis"]  # (("model",), ()): V (out, n) is split along out
    ```
    """
    kernel = tuple(tuple(a for a in axes if sizes[a] > 1) for axes in kernel)
    every = tuple(a for axes in kernel for a in axes)
    by_role: dict[str | None, Axes] = {None: (), COMPONENTS: ()}
    for role in (COUNT, IN, OUT):
        dims = view.kernel_dims(role)
        by_role[role] = (
            block_axes(dims, view.kernel_shape, kernel, sizes)
            if len(kernel) == len(view.kernel_shape)
            else ()  # a packed kernel has other dimensions
        )
    found: dict[str, Spec] = {}
    components: Axes | None = None
    for weight in weights:
        names = (*(COUNT for _ in view.batch), *_axes_of(weight))
        shape = view.batch + weight.shape
        spec = [
            _dividing(by_role[role], size, sizes)
            for role, size in zip(names, shape, strict=True)
        ]
        if COMPONENTS in names:
            if components is None:  # it is the basis: it comes first
                used = {a for axes in spec for a in axes}
                components = tuple(a for a in every if a not in used)
            i = names.index(COMPONENTS)
            spec[i] = _dividing(components, shape[i], sizes)
        found[weight.name] = tuple(spec)
    return found


def block_axes(
    dims: Iterable[int],
    shape: tuple[int, ...],
    spec: Spec,
    sizes: Mapping[str, int],
) -> Axes:
    """Returns the mesh axes that split flattened dimensions into blocks.

    A block is a contiguous part of the flattened dimension. So the axes of a
    dimension count only if those before it are split to single elements.

    Args:
        dims: dimensions of an array, in the order of flattening.
        shape, spec: the array's shape, and the mesh axes of each dimension.
        sizes: devices along each mesh axis.
    """
    found: Axes = ()
    for dim in dims:
        parts = math.prod(sizes[a] for a in spec[dim])
        if shape[dim] % parts:
            break
        found += spec[dim]
        if parts < shape[dim]:
            break
    return found


def spec_for_replacement(
    spec: Spec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> Spec:
    """Returns how to split an array that replaces one of another shape.

    With as many dimensions it is split like the old one, otherwise along one of
    its own: a kernel packed by quantization, its scale, its zero point.

    Args:
        spec: the mesh axes of each dimension of the old array.
        shape: the shape of the new one.
    """
    if len(spec) == len(shape):
        pairs = zip(spec, shape, strict=True)
        return tuple(_dividing(axes, n, sizes) for axes, n in pairs)
    every = tuple(a for axes in spec for a in axes)
    found: list[Axes] = [()] * len(shape)
    if len(shape) > 1:  # a vector is tiny
        parts = [_dividing(every, n, sizes) for n in shape]
        best = max(range(len(shape)), key=lambda i: len(parts[i]))
        found[best] = parts[best]
    return tuple(found)


def _axes_of(weight: Weight) -> tuple[str | None, ...]:
    return weight.axes or (None,) * len(weight.shape)


def _dividing(axes: Axes, size: int, sizes: Mapping[str, int]) -> Axes:
    """Returns the leading `axes` whose devices divide `size`."""
    kept: Axes = ()
    for axis in axes:
        if size % math.prod(sizes[a] for a in (*kept, axis)):
            break
        kept += (axis,)
    return kept
