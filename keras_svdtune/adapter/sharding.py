"""Which devices hold which part of an adapter: derived from its kernel.

A kernel of a model on several devices is split along axes of a mesh of
devices. Every weight of its adapter is split to match, and no rule has to be
written for it. A method says, for each dim of a weight, what it is of the
matrix W (in, out):

| a dim that is | is split along |
|---|---|
| `IN`, `OUT` | the mesh axes of W's in or out, if they split it into blocks |
| `COMPONENTS`, of a full basis | the axes that its other dim does not take |
| None: a rank, or tiny | nothing |

So nothing of n² numbers is on every device. With V (out, n) of SVF under a W
that is split along out (column-parallel), V is split along out too: h·V is
summed over the devices, and (..)·Vᵀ stays where it is. Under a W that is split
along in (row-parallel), V is split along n: h·V stays, and (..)·Vᵀ is summed.
Either is one collective more in the forward pass, and one in the backward pass.

Only names and numbers here; what a backend makes of them is in `devices.py`.
"""

import math
from collections.abc import Iterable, Mapping

from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.methods.base import COMPONENTS, IN, OUT, Weight
from keras_svdtune.runtime.placement import Axes, Spec

COUNT = "count"  # the matrices of a bank


def adapter_layouts(
    weights: Iterable[Weight],
    view: MatrixView,
    kernel: Spec,
    sizes: Mapping[str, int],
) -> dict[str, Spec]:
    """How to split each weight of an adapter, by its name.

    Args:
        weights: what the method asks for.
        view: how the kernel is a matrix.
        kernel: the mesh axes of each dim of the kernel.
        sizes: devices along each mesh axis.

    Returns:
        For each weight the mesh axes of each of its dims; of a bank, the dim
        of its matrices first.

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
            else ()  # a packed kernel, whose dims are others
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
            if components is None:  # of the basis, which comes first
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
    """The mesh axes that split `dims`, flattened in this order, into blocks.

    A block of the flattened dim is whole dims from some place on; so axes of a
    dim count only where every dim before it is split to its last element.

    Args:
        dims: dims of an array, in the order in which they are flattened.
        shape: of the array.
        spec: the mesh axes of each of its dims.
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


def refitted(
    spec: Spec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> Spec:
    """How to split an array that comes in place of one of another shape.

    Like that one if it has as many dims; if not, along one of its own. For a
    kernel that is packed when it is quantized, its scale and its zero point.

    Args:
        spec: the mesh axes of each dim of the first array.
        shape: of the new one.
        sizes: devices along each mesh axis.
    """
    if len(spec) == len(shape):
        pairs = zip(spec, shape, strict=True)
        return tuple(_dividing(axes, n, sizes) for axes, n in pairs)
    every = tuple(a for axes in spec for a in axes)
    found: list[Axes] = [()] * len(shape)
    if len(shape) > 1:  # or it is tiny
        parts = [_dividing(every, n, sizes) for n in shape]
        best = max(range(len(shape)), key=lambda i: len(parts[i]))
        found[best] = parts[best]
    return tuple(found)


def _axes_of(weight: Weight) -> tuple[str | None, ...]:
    return weight.axes or (None,) * len(weight.shape)


def _dividing(axes: Axes, size: int, sizes: Mapping[str, int]) -> Axes:
    """The leading ones of `axes` whose devices divide `size`."""
    kept: Axes = ()
    for axis in axes:
        if size % math.prod(sizes[a] for a in (*kept, axis)):
            break
        kept += (axis,)
    return kept
