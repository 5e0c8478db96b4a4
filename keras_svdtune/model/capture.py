"""Starts adapters from data: what layers see of it, or the gradient of a loss.

A few batches go through the model as it is, one group of layers after the
other, so that no more than `GROUP_BYTES` are held at a time, but for a single
layer that needs more. What a group of layers saw becomes the first values of
their adapters, a few numbers a matrix, before the next group has its turn. The
model is as it was after each of them, also after an error or an interrupt.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_svdtune.adapter.plan import Values, values_from_data
from keras_svdtune.hosts.target import Target
from keras_svdtune.hosts.watch import rows_of, watched
from keras_svdtune.matrix.view import Sizes
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.data_method import DataMethod, Inputs, Seen
from keras_svdtune.model.batches import Batch, read_batches
from keras_svdtune.model.checks import is_finite
from keras_svdtune.runtime.keras_internals import (
    layers_in,
    mask_of,
    without_remat,
)
from keras_svdtune.runtime.parallel import in_turn, run_all
from keras_svdtune.runtime.precision import full_precision
from keras_svdtune.runtime.processes import processes, to_numpy
from keras_svdtune.runtime.programs import compiled, with_gradients
from keras_svdtune.runtime.types import Model, Tensor

# What a group of layers may hold: the sums over all batches so far and over one
# more, in float32, where the model computes.
GROUP_BYTES = 2**30
_BYTES = 4 + 4
# What a loss is multiplied by where a gradient of float16 might vanish, as in
# Keras' training; by less, where that overflows.
_LOSS_SCALE, _LESS = 2.0**15, 2.0**-5
# Between the paths of layers that share their sums: no path has it.
_AND = "\n"

# Takes (x, y, y_pred, sample_weight), and returns the loss of a batch.
Loss = Callable[[Any, Any, Any, Any], Tensor]


def check_data(model: Model, method: Method) -> None:
    """Raises a ValueError if a method needs data, or a loss, and has none."""
    if not isinstance(method, DataMethod):
        return
    if method.data is None:
        raise ValueError(
            f"{method.title} starts from data. Give it what `fit` takes, "
            f"`{type(method).__name__}(..., data=texts)`. Only to load an "
            "adapter file needs none."
        )
    if processes()[1] > 1:
        raise ValueError(
            f"{method.title} reads its data in one process, and this program "
            "has several. Enable it in a program of one process, call "
            "`save_adapter`, and load the file here."
        )
    if method.statistic == "gradient":
        loss_of(model, method)


def starts_from_data(
    model: Model,
    method: DataMethod,
    methods: dict[str, Method],
    targets: dict[str, Target],
) -> dict[str, Values]:
    """Returns the first values of all weights of each target, by path.

    Args:
        model: what the data is for: a Task, or any model that holds the
            targets.
        method: the method with its data.
        methods: the method of each target, by path.
    """
    batches = read_batches(model, method.data, method.examples)
    groups = list(_groups(method, targets))
    values: dict[str, Values] = {}
    for i, group in enumerate(groups):
        part = f" ({i + 1} of {len(groups)})" if len(groups) > 1 else ""
        label = f"{method.title}: reading the data{part}"
        if method.statistic == "inputs":
            sums = input_sums(model, group, batches, label)
        else:
            loss = loss_of(model, method)
            sums = _gradients(model, group, batches, label, loss)
        _check_sums(method, group, sums)
        jobs = {
            path: functools.partial(
                _start, methods[path], target, sums.pop(path)
            )
            for path, target in group.items()
        }
        values |= run_all(f"{method.title}: starting{part}", jobs)
    return values


def _start(method: Method, target: Target, sums: list[Tensor]) -> Values:
    assert isinstance(method, DataMethod)
    arrays = [to_numpy(x).astype("float64") for x in sums]
    seen: Seen
    if method.statistic == "inputs":
        seen = as_inputs(arrays)
    else:
        seen = target.view.to_matrix(arrays[0])
    return values_from_data(method, target.host_matrix(), seen, target.path)


def as_inputs(sums: list[np.ndarray]) -> Inputs:
    """Returns what `input_sums` found of one layer, in float64."""
    count, total, gram = sums
    return Inputs(round(float(count)), total, gram)


def _groups(
    method: DataMethod, targets: dict[str, Target]
) -> Iterator[dict[str, Target]]:
    group: dict[str, Target] = {}
    held = 0
    for path, target in targets.items():
        rows, columns = target.view.shape
        if method.statistic == "inputs":
            columns = rows
        size = _BYTES * rows * columns * (target.view.count or 1)
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = {}, 0
        group[path] = target
        held += size
    yield group


def _check_sums(
    method: DataMethod,
    group: dict[str, Target],
    sums: dict[str, list[Tensor]],
) -> None:
    sizes = {
        path: float(to_numpy(ops.max(ops.absolute(sums[path][-1]))))
        if path in sums
        else 0.0
        for path in group
    }
    bad = [path for path, size in sizes.items() if not math.isfinite(size)]
    if bad:
        raise ValueError(
            f"With `data`, layer '{bad[0]}' gets NaN or infinity. Check the "
            "data and the weights of the model."
        )
    nothing = [path for path, size in sizes.items() if size == 0.0]
    if nothing:
        what = (
            "No input of these layers comes from `data`, or nothing but zeros"
            if method.statistic == "inputs"
            else "The loss of `data` does not depend on these layers"
        )
        if method.statistic == "gradient" and any(
            _in_float16(group[path].owner) for path in nothing
        ):
            what += ", or its gradient is too small for float16"
        raise ValueError(
            f"{what}: {', '.join(nothing[:4])}"
            f"{' ...' if len(nothing) > 4 else ''}. Leave them out by "
            "`exclude`, or give data that uses them."
        )


# What comes into the layers.


def input_sums(
    model: Model, group: dict[str, Target], batches: list[Batch], label: str
) -> dict[str, list[Tensor]]:
    """Returns [count, Σx, XᵀX] of the inputs of each layer, float32, by path.

    Layers with the same input, such as query, key and value, share them.
    """

    def of_batch(batch: Batch) -> dict[str, list[Tensor]]:
        watch = _Watch(group, _padding_masks(batch.x))
        with watched(group.values(), watch.note):
            model(batch.x, training=False)
        return watch.sums()

    total: dict[str, list[Tensor]] = {}
    for found in _over_batches(model, batches, of_batch, label, compiled):
        for paths in list(found):
            new = found.pop(paths)
            if paths in total:
                before = total.pop(paths)
                new = [ops.add(a, b) for a, b in zip(before, new, strict=True)]
            total[paths] = new
    return {
        path: sums
        for paths, sums in total.items()
        for path in paths.split(_AND)
    }


class _Watch:
    """What came into the layers of a group in one call of the model."""

    def __init__(self, group: dict[str, Target], masks: dict[str, Tensor]):
        self._paths = {id(target): path for path, target in group.items()}
        self._masks = masks
        # The sums of one input, and the input, so that its id stays its own.
        self._found: dict[object, tuple[Tensor, list[Tensor]]] = {}
        # Which inputs a layer had: several, if it was called several times.
        self._keys: dict[str, list[object]] = {}

    def note(self, target: Target, inputs: Tensor) -> None:
        owner = target.owner
        # Two layers that flatten one input alike have the same rows of it, in
        # another order perhaps, which a sum does not show. Patches are others.
        key: object = (id(inputs), target.view.contracted_axes)
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if hasattr(owner, "rank") or owner.compute_dtype != dtype:
            key = (id(inputs), id(owner))
        if key not in self._found:
            sums = _sums(target, inputs, self._masks)
            self._found[key] = (inputs, sums)
        self._keys.setdefault(self._paths[id(target)], []).append(key)

    def sums(self) -> dict[str, list[Tensor]]:
        """Returns the sums by the paths that have them, joined by `_AND`."""
        alike: dict[tuple[object, ...], list[str]] = {}
        for path, keys in self._keys.items():
            alike.setdefault(tuple(keys), []).append(path)
        return {
            _AND.join(paths): [
                functools.reduce(ops.add, parts)
                for parts in zip(
                    *(self._found[key][1] for key in keys), strict=True
                )
            ]
            for keys, paths in alike.items()
        }


def _sums(
    target: Target, inputs: Tensor, masks: dict[str, Tensor]
) -> list[Tensor]:
    """Returns the count of rows, their sum and XᵀX, in float32."""
    rows, sizes = rows_of(target, inputs)
    x = ops.cast(rows, "float32")
    kept = _kept(target, sizes, masks, mask_of(inputs))
    if kept is None:
        count = ops.convert_to_tensor(float(x.shape[0]), "float32")
    else:
        x = ops.where(kept[:, None], x, ops.zeros_like(x))
        count = ops.sum(ops.cast(kept, "float32"))
    return [count, ops.sum(x, axis=0), ops.matmul(ops.transpose(x), x)]


def _padding_masks(x: Any) -> dict[str, Tensor]:
    if not isinstance(x, dict):
        return {}
    return {
        key: mask
        for key, mask in x.items()
        if key.endswith("padding_mask") and len(mask.shape) == 2
    }


def _kept(
    target: Target,
    sizes: Sizes,
    masks: dict[str, Tensor],
    own: Tensor | None,
) -> Tensor | None:
    """Returns which rows of a layer's input are no padding; None for all.

    A mask (examples, tokens) is one for a layer whose input begins with axes of
    these sizes: those of KerasHub's inputs, or else the one that Keras attached
    to the tensor.
    """
    if target.view.count is not None or len(sizes) < 2:
        return None
    turned = not target.view.by_example and not hasattr(target.owner, "rank")

    def fits(mask: Tensor) -> bool:
        axes = tuple(mask.shape)[:2]
        return tuple(sizes[:2]) == (axes[::-1] if turned else axes)

    found = {key: mask for key, mask in masks.items() if fits(mask)}
    if len(found) > 1:
        raise ValueError(
            f"Either of {' and '.join(map(repr, found))} may be the mask of "
            f"layer '{target.path}': they are of one shape. Give `data` whose "
            "sequences have different lengths."
        )
    mask = next(iter(found.values()), own)
    if mask is None or not fits(mask):
        return None
    mask = ops.cast(ops.transpose(mask) if turned else mask, "bool")
    ones = (1,) * (len(sizes) - 2)
    whole = ops.broadcast_to(ops.reshape(mask, (*sizes[:2], *ones)), sizes)
    return ops.reshape(whole, (-1,))


# The gradient of a loss.


def loss_of(model: Model, method: DataMethod) -> Loss:
    """Returns the loss that a model was compiled with."""
    if getattr(model, "loss", None) is None:
        raise ValueError(
            f"{method.title} starts from the gradient of a loss, and "
            f"'{model.name}' has none. Of a Backbone take the Task, "
            "`task.enable_adapter(...)`; `compile` any other model with a loss "
            "first."
        )

    def loss(x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Tensor:
        if y is None:
            raise ValueError(
                f"{method.title} needs what the loss compares with: give "
                "`data=(x, y)`."
            )
        return model.compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight
        )

    return loss


def _gradients(
    model: Model,
    group: dict[str, Target],
    batches: list[Batch],
    label: str,
    loss: Loss,
) -> dict[str, list[Tensor]]:
    """Returns [gradient] of the kernel of each layer, float32, by path."""

    half = any(_in_float16(x) for x in layers_in(model))
    scale = _LOSS_SCALE if half else 1.0

    def of_loss(batch: Batch) -> Tensor:
        y_pred = model(batch.x, training=False)
        return loss(batch.x, batch.y, y_pred, batch.sample_weight)

    def program(model: Model, function: Any) -> Any:
        def scaled(factor: Tensor, *arrays: Tensor) -> tuple[Tensor, Tensor]:
            found = function(*arrays)
            return found * ops.cast(factor, found.dtype), found

        kernels = [target.kernel for target in group.values()]
        run = with_gradients(model, scaled, kernels)

        def gradients(*arrays: Tensor) -> list[Tensor]:
            nonlocal scale
            _, _, found = run(np.float32(scale), *arrays)
            while scale > 1.0 and not all(map(is_finite, found)):
                scale *= _LESS
                _, _, found = run(np.float32(scale), *arrays)
            return [ops.cast(x, "float32") / scale for x in found]

        return gradients

    total: dict[str, list[Tensor]] = {}
    for found in _over_batches(model, batches, of_loss, label, program):
        for path in group:
            new = found.pop(0) / len(batches)
            if path in total:
                new = ops.add(total.pop(path)[0], new)
            total[path] = [new]
    return total


def _in_float16(layer: keras.layers.Layer) -> bool:
    return bool(layer.compute_dtype == "float16")


def _over_batches(
    model: Model,
    batches: list[Batch],
    function: Callable[[Batch], Any],
    label: str,
    program: Callable[[Model, Any], Any],
) -> Iterator[Any]:
    """Yields what a function returns of each batch, compiled for its shapes."""
    programs: dict[str, Any] = {}
    with without_remat(layers_in(model)), full_precision():
        for batch in in_turn(label, batches):
            leaves = keras.tree.flatten(batch)
            key = str([x if x is None else x.shape for x in leaves])
            if key not in programs:
                of_arrays = functools.partial(_of_arrays, function, batch)
                programs[key] = program(model, of_arrays)
            yield programs[key](*(x for x in leaves if x is not None))


def _of_arrays(
    function: Callable[[Batch], Any], like: Batch, *arrays: Tensor
) -> Any:
    """Returns `function` of a batch like another one, with these arrays."""
    left = iter(arrays)
    leaves = [
        None if x is None else next(left) for x in keras.tree.flatten(like)
    ]
    return function(keras.tree.pack_sequence_as(like, leaves))


def without_data(methods: dict[str, Method]) -> dict[str, Method]:
    """Returns methods that hold no data, which would be kept with them."""
    return {k: dataclasses.replace(x, data=None) for k, x in methods.items()}  # type: ignore[call-arg]
