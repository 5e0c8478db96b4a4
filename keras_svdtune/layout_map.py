"""A `LayoutMap` for any decoder, found from how its matrices are wired.

A block of a decoder reads a stream of vectors of the model's width and adds
to it. The matrices that read the stream (query, key, value, the first of a
feed-forward block) make heads or hidden units: split along these
(column-parallel), each device has its own, and nothing is sent. Those that
write to the stream are split along the same units (row-parallel), and their
products are summed over the devices once. The other dim of each is split along
the batch axis of the mesh. If that axis has several devices, this gathers the
weights in each step, and divides their memory.
"""

import re
from collections.abc import Iterator

import keras
import keras_hub

from keras_svdtune.hosts.target import Target
from keras_svdtune.model.state import adapted_part
from keras_svdtune.model.targets import matrices_in
from keras_svdtune.runtime.keras_internals import (
    built_without_values,
    layers_in,
)
from keras_svdtune.runtime.types import Model, Variable

Layout = tuple[str | None, ...]
COLUMN, ROW = "column", "row"


def svdtune_layout_map(
    backbone: str | Model,
    device_mesh: keras.distribution.DeviceMesh,
    model_parallel_dim_name: str = "model",
    data_parallel_dim_name: str = "batch",
) -> keras.distribution.LayoutMap:
    """Returns a layout map that splits a decoder over a mesh of devices.

    It is like the `get_layout_map` that five of KerasHub's backbones have, and
    equal to it where that works. It fits every decoder, and never splits a dim
    by a number that does not divide it (one key/value head, say): it splits
    another one or none.

    Args:
        backbone: the name or folder of a preset, of which only the config is
            read; or a built Backbone or Task of the same architecture.
        device_mesh: `keras.distribution.DeviceMesh`.
        model_parallel_dim_name: str, the mesh axis to split weights along.
        data_parallel_dim_name: str, the mesh axis of the batch. The weights
            are split along it too, as KerasHub does.

    Raises:
        ValueError: the mesh has no such axes, or the model no table of token
            embeddings.

    Example:

    ```python
    mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"))
    layout_map = svdtune_layout_map("gemma2_9b_en", mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layout_map)
    with distribution.scope():
        gemma = keras_hub.models.GemmaCausalLM.from_preset("gemma2_9b_en")
    gemma.backbone.enable_svf()
    ```
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            "`device_mesh` must be a keras.distribution.DeviceMesh. "
            f"Received: {device_mesh!r}"
        )
    model, batch = model_parallel_dim_name, data_parallel_dim_name
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    if not {model, batch} <= set(sizes):
        raise ValueError(
            f"The mesh has no axes '{model}' and '{batch}'; name them by "
            "`model_parallel_dim_name` and `data_parallel_dim_name`. It has: "
            f"{tuple(sizes)}"
        )
    if isinstance(backbone, str):
        with built_without_values():
            backbone = keras_hub.models.Backbone.from_preset(
                backbone, load_weights=False
            )
    root = adapted_part(backbone)
    layouts: dict[str, Layout | None] = {v.path: None for v in root.variables}
    for variable, first, second in _split_dims(root, sizes[model]):
        shape = variable.shape
        split: list[str | None] = [None] * len(shape)
        for axis, dims in ((model, (*first, *second)), (batch, second)):
            for dim in dims:
                if split[dim] is None and shape[dim] % sizes[axis] == 0:
                    split[dim] = axis
                    break
        if any(split):
            layouts[variable.path] = tuple(split)
    found = keras.distribution.LayoutMap(device_mesh)
    for path, layout in _by_pattern(layouts).items():
        found[path] = layout
    return found


def _split_dims(
    root: Model, parts: int
) -> Iterator[tuple[Variable, tuple[int, ...], tuple[int, ...]]]:
    """Yields each variable to split, its dims to split first, and the others.

    Where the first dim does not divide by `parts`, another one may.
    """
    tables = [
        layer
        for layer in layers_in(root)
        if isinstance(layer, keras.layers.Embedding) and layer.built
    ]
    if not tables:
        raise ValueError(
            f"'{root.name}' has no table of token embeddings, so it is no "
            "decoder. Write a keras.distribution.LayoutMap for it."
        )
    table = max(tables, key=lambda layer: layer.input_dim)
    width = table.output_dim
    yield table._embeddings, (0,), (1,)
    if not getattr(table, "tie_weights", True):
        yield table.reverse_embeddings, (1,), (0,)
    groups: dict[str, list[Target]] = {}
    for path, target in matrices_in(root, adapted=True).targets.items():
        if not isinstance(target.owner, type(table)):
            parent = path.rpartition("/")[0]
            groups.setdefault(parent, []).append(target)
    for group in groups.values():
        for target, kind in zip(group, _kinds(group, width), strict=True):
            kernel, view = target.kernel, target.view
            rows, columns = view.kernel_dims("in"), view.kernel_dims("out")
            count = view.kernel_dims("count")
            if count and kernel.shape[count[0]] % parts == 0:
                yield kernel, count, rows[:1]  # some experts on each
            elif kind == COLUMN:
                yield kernel, columns[:1], rows[:1]
            elif kind == ROW:
                yield kernel, rows[:1], columns[:1]


def _kinds(group: list[Target], width: int) -> list[str | None]:
    """Says which matrices of one layer read the stream, and which write to it.

    `group` is in the order of use; `width` is that of the stream.
    """
    kinds: list[str | None] = []
    for i, target in enumerate(group):
        view = target.view
        reads, writes = (n == width for n in view.shape)
        several = [len(view.kernel_dims(x)) > 1 for x in ("in", "out")]
        if several[0] != several[1]:  # heads on one side
            kinds.append(ROW if several[0] else COLUMN)
        elif reads and writes:  # its shape does not tell: the last one writes
            last = i == len(group) - 1 and len(group) > 1
            kinds.append(ROW if last else COLUMN)
        elif writes:
            kinds.append(ROW)
        elif reads and (len(group) > 1 or view.shape[1] > width):
            kinds.append(COLUMN)
        else:
            kinds.append(None)  # a router, or what is no part of a block
    return kinds


def _by_pattern(layouts: dict[str, Layout | None]) -> dict[str, Layout]:
    """Merges equal layouts of paths that differ only in numbers into patterns.

    `layouts` has every variable of the model; None leaves one whole.
    """
    alike: dict[str, list[str]] = {}
    for path in layouts:
        pattern = r"\d+".join(map(re.escape, re.split(r"\d+", path)))
        alike.setdefault(pattern, []).append(path)
    found: dict[str, Layout] = {}
    for pattern, paths in alike.items():
        if len({layouts[path] for path in paths}) == 1:
            paths_or_pattern = [(pattern, layouts[paths[0]])]
        else:  # their own paths, none of which has a character to escape
            paths_or_pattern = [(path, layouts[path]) for path in paths]
        found |= {key: x for key, x in paths_or_pattern if x is not None}
    return found
