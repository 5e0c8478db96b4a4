"""Saving the adapter of a model, and loading it into its base again.

All is checked before anything is touched: a file that does not belong to this
model never loads. What a file holds is described in `adapter_file.py`.
"""

import os
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import effect
from keras_svdtune.adapter.plan import Plan
from keras_svdtune.files.compatibility import (
    array_key,
    base_dtype,
    check_bases,
    check_effect,
    check_start,
    dtype_in_file,
    find_layers,
    fingerprint_of,
    methods_of,
    values_for,
)
from keras_svdtune.files.format import (
    EFFECTS,
    FINGERPRINTS,
    FORMAT_VERSION,
    STATISTICS,
    SavedAdapter,
    checked_path,
    read_adapter,
)
from keras_svdtune.hosts.host import kernel_shape, matrix_of
from keras_svdtune.methods.base import Method
from keras_svdtune.model.enable import (
    adapted_part,
    attach_plans,
    check_layer,
    enabled_method,
    require_adapted,
    statistics_of,
)
from keras_svdtune.model.moving_statistics import Statistics
from keras_svdtune.model.planning import plan_layers
from keras_svdtune.model.targets import adapted_layers, loadable_layers
from keras_svdtune.runtime.processes import shared, to_numpy


def save_adapter(
    model: keras.Model,
    path: str | os.PathLike[str],
    include_basis: bool = False,
) -> None:
    """Writes the trainables of the enabled adapter to one file.

    The file is written under a temporary name and renamed, so that `path`
    holds the old file or the new one, never half of one. With several
    processes all call this, and the first one writes.

    Args:
        model: a model with an adapter.
        path: where to write, ending in `.safetensors`.
        include_basis: whether to write the frozen weights too. The singular
            vectors are computed from W again on loading, and the file
            knows whether they came out the same; with them in it, loading
            computes nothing and cannot differ. They make it larger: n² numbers
            a matrix for SVF and SVFT.

    Raises:
        ValueError: the model has no adapter, or `path` another ending.
    """
    path = checked_path(path)
    saved = saved_adapter(model, include_basis)
    shared(0, lambda: saved.save(path))


def saved_adapter(
    model: keras.Model, include_basis: bool = False
) -> SavedAdapter:
    """What `save_adapter` writes, in memory."""
    root = adapted_part(model)
    method = enabled_method(root)
    arrays: dict[str, np.ndarray] = {}
    layers: dict[str, Any] = {}
    fingerprints, effects = [], []
    for layer_path, layer in require_adapted(root).items():
        adapter = layer.adapter
        for weight in adapter.method.weights(adapter.shape):
            if weight.saved or (include_basis and not weight.overwritten):
                value = getattr(adapter, weight.name).value
                value = ops.cast(value, dtype_in_file(weight))
                key = array_key(layer_path, adapter.method, weight.name)
                arrays[key] = np.ascontiguousarray(to_numpy(value))
        matrix = matrix_of(layer)
        fingerprints.append(fingerprint_of(layer))
        effects.append(effect(adapter.method, adapter, matrix))
        entry = {
            "kernel_shape": list(kernel_shape(layer)),
            "dtype": base_dtype(layer),
        }
        if adapter.method != method:
            entry["settings"] = adapter.method.settings()
        layers[layer_path] = entry
    arrays[FINGERPRINTS] = np.stack(fingerprints)
    arrays[EFFECTS] = np.stack(effects)
    moved = statistics_of(root).moved()
    arrays |= moved
    about = {
        "format_version": FORMAT_VERSION,
        "method": method.name,
        "settings": method.settings(),
        "model_class": type(root).__name__,
        "versions": {
            "keras": keras.version(),
            "keras_hub": keras_hub.__version__,
        },
        "layers": layers,
        STATISTICS: sorted(moved),
    }
    return SavedAdapter(about, arrays, f"the adapter of '{root.name}'")


def load_adapter(
    model: keras.Model, adapter: str | os.PathLike[str] | SavedAdapter
) -> None:
    """Loads an adapter file into the base model that it was trained on.

    If the model has no adapter yet, the file's method is enabled on the
    file's layers. If it has the same one, values are assigned and nothing is
    compiled anew. With several processes all call this, and the first one reads
    for all.

    Args:
        model: the base model, or the same with the same method enabled.
        adapter: a file that `save_adapter` wrote; the URI of what
            `push_adapter` uploaded, `"hf://user/name"`, also with
            `"@revision"`, or `"kaggle://user/model/keras/variation"`, also
            with `"/version"`; or what `compose` returned.

    Raises:
        ImportError: a URI needs `pip install keras_svdtune[hub]`.
        ValueError: the file is no adapter file, or does not belong to this
            model: other layers, shapes, method or base weights, or
            singular vectors that come out otherwise here than where it was
            trained. Or the hub has none, or does not answer. The model is as
            it was.
    """
    if not isinstance(adapter, SavedAdapter):
        file = adapter
        adapter = shared(0, lambda: read_adapter(file))
    root = adapted_part(model)
    adapted = adapted_layers(root)
    method, methods = methods_of(adapter)
    ours = adapted or loadable_layers(root)
    layers = find_layers(adapter, ours)
    if not adapted:
        for layer_path, layer in layers.items():
            _check_layer(adapter, layer_path, layer, methods[layer_path])
    elif len(adapted) != len(layers) or any(
        x.adapter.method != methods[p] for p, x in layers.items()
    ):
        raise ValueError(
            f"{adapter.source} holds {method} on {len(layers)} layers; this "
            f"model has {enabled_method(root)} on {len(adapted)}. Call "
            "`remove_adapter()` first, then load."
        )
    values = values_for(adapter, layers, methods)
    moved = {key: adapter.arrays[key] for key in adapter.statistics}
    Statistics(root).check(moved, adapter.source)
    check_bases(adapter, layers, methods, ours)
    if not adapted:
        plans = plan_layers(f"{method.title}: loading", layers, methods, values)
        for row, (layer_path, layer) in enumerate(layers.items()):
            check_effect(adapter, row, layer, plans[layer_path])
        attach_plans(root, method, layers, plans)
        statistics_of(root).assign(moved)
        return
    for row, (layer_path, layer) in enumerate(layers.items()):
        now = layer.adapter.method.weights(layer.adapter.shape)
        new = {w.name: getattr(layer.adapter, w.name).value for w in now}
        new |= values[layer_path]
        adapter_now = layer.adapter
        ready = Plan(adapter_now.method, new, adapter_now.base_fingerprint)
        check_start(adapter, layer_path, layer, values[layer_path])
        check_effect(adapter, row, layer, ready)
    for layer_path, layer in layers.items():
        for name, value in values[layer_path].items():
            getattr(layer.adapter, name).assign(value)
    statistics_of(root).assign(moved)


def _check_layer(
    adapter: SavedAdapter, layer_path: str, layer: Any, method: Method
) -> None:
    try:
        check_layer(layer_path, layer, method)
    except ValueError as error:
        raise ValueError(f"{adapter.source} does not fit. {error}") from None
