"""Whether an adapter file belongs to a model, down to its effect."""

import functools
import types
from typing import Any

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import (
    effect,
    fingerprint,
    matches,
    same_effect,
)
from keras_svdtune.adapter.plan import Plan
from keras_svdtune.files.format import EFFECTS, FINGERPRINTS, SavedAdapter
from keras_svdtune.files.renumbered import renumbered
from keras_svdtune.hosts.host import (
    host_matrix_of,
    kernel_of,
    kernel_shape,
    matrix_of,
    view_of,
)
from keras_svdtune.methods.base import METHODS, Method, Weight, nearest
from keras_svdtune.runtime.processes import to_numpy


def methods_of(adapter: SavedAdapter) -> tuple[Method, dict[str, Method]]:
    """The file's method, and that of each layer by its path."""
    about, source = adapter.about, adapter.source
    method = _method(about["method"], about["settings"], source)
    return method, {
        layer_path: _method(about["method"], entry["settings"], source)
        if "settings" in entry
        else method
        for layer_path, entry in about["layers"].items()
    }


def _method(name: str, settings: dict[str, Any], source: str) -> Method:
    if name not in METHODS:
        raise ValueError(
            f"{source} was saved with the method {name!r}, which this release "
            f"does not have. {nearest(name, list(METHODS))}"
        )
    try:
        return METHODS[name](**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source} has settings that {METHODS[name].__name__} does not "
            f"accept: {error}"
        ) from None


def find_layers(adapter: SavedAdapter, ours: dict[str, Any]) -> dict[str, Any]:
    """The model's layers for the file's, each with its kernel's shape."""
    layers = {}
    for row, (layer_path, entry) in enumerate(adapter.about["layers"].items()):
        layer = ours.get(layer_path)
        if layer is None or _shape_of(layer) != tuple(entry["kernel_shape"]):
            other = renumbered(adapter, row, ours, _described)
            if other is not None:
                layers[layer_path] = other
                continue
        if layer is None:
            raise ValueError(
                f"{adapter.source} has an adapter for layer '{layer_path}' of "
                f"a {adapter.about.get('model_class')}, which this model does "
                f"not have. {nearest(layer_path, list(ours))}"
            )
        shape = _shape_of(layer)
        if shape != tuple(entry["kernel_shape"]):
            raise ValueError(
                f"{adapter.source} was made for another model: layer "
                f"'{layer_path}' has a kernel of shape {shape}, expected "
                f"{tuple(entry['kernel_shape'])}."
            )
        layers[layer_path] = layer
    return layers


def _described(layer: Any) -> tuple[tuple[int, ...], Any, str]:
    """What `renumbered` asks of a layer."""
    shape = _shape_of(layer)
    if not shape:
        return (), None, ""
    return shape, functools.partial(fingerprint_of, layer), base_dtype(layer)


def _shape_of(layer: Any) -> tuple[int, ...]:
    try:
        return kernel_shape(layer)
    except AttributeError:  # it has none
        return ()


def values_for(
    adapter: SavedAdapter, layers: dict[str, Any], methods: dict[str, Method]
) -> dict[str, dict[str, Any]]:
    """The file's arrays for each layer, by weight name."""
    values: dict[str, dict[str, Any]] = {}
    arrays = adapter.arrays
    known = {FINGERPRINTS, EFFECTS, *adapter.statistics}
    for layer_path, layer in layers.items():
        method = methods[layer_path]
        values[layer_path] = {}
        view = view_of(layer)
        for weight in method.weights(view.shape):
            key = array_key(layer_path, method, weight.name)
            if weight.saved or (key in arrays and not weight.overwritten):
                values[layer_path][weight.name] = _checked(
                    adapter,
                    key,
                    view.batch + weight.shape,
                    dtype_in_file(weight),
                )
                known.add(key)
    for name, count in ((FINGERPRINTS, 5), (EFFECTS, 8)):
        _checked(adapter, name, (len(layers), count), "float32")
    unknown = sorted(set(arrays) - known)
    if unknown:
        raise ValueError(
            f"{adapter.source} holds '{unknown[0]}', which belongs to none of "
            "its layers."
        )
    return values


def _checked(
    adapter: SavedAdapter, key: str, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    array = adapter.arrays.get(key)
    if array is None or array.shape != shape:
        found = "nothing" if array is None else f"shape {array.shape}"
        raise ValueError(
            f"{adapter.source} should hold '{key}' of shape {shape}. "
            f"Found: {found}"
        )
    if array.dtype != dtype or not np.isfinite(array).all():
        raise ValueError(
            f"'{key}' of {adapter.source} should hold finite {dtype} values. "
            f"Found: {array.dtype}"
        )
    return array


def check_bases(
    adapter: SavedAdapter,
    layers: dict[str, Any],
    methods: dict[str, Method],
    ours: dict[str, Any],
) -> None:
    """Checks the kernels of `layers`; corrects those with another number."""
    for row, (layer_path, layer) in enumerate(layers.items()):
        entry = adapter.about["layers"][layer_path]
        theirs = adapter.arrays[FINGERPRINTS][row]
        dtypes = (entry["dtype"], base_dtype(layer))
        if methods[layer_path].base_mode is not None and len({*dtypes}) > 1:
            raise ValueError(
                f"{adapter.source} was trained on a residual of a "
                f"{dtypes[0]} kernel, and layer '{layer_path}' has a "
                f"{dtypes[1]} kernel, which leaves another. Load the base "
                f"model in {dtypes[0]}."
            )
        if not matches(fingerprint_of(layer), theirs, *dtypes):
            other = renumbered(adapter, row, ours, _described)
            if other is not None:
                layers[layer_path] = other
                continue
            raise ValueError(
                f"{adapter.source} was trained on other weights: the kernel of "
                f"layer '{layer_path}' is not the one of its base "
                f"({adapter.about.get('model_class')}). Load the base model "
                "that it was trained on."
            )
    if len({id(x) for x in layers.values()}) < len(layers):
        raise ValueError(
            f"{adapter.source} has two layers for one of this model's, by "
            "their kernels. Load the base model that it was trained on."
        )


def check_effect(
    adapter: SavedAdapter, row: int, layer: Any, ready: Plan
) -> None:
    """Whether the weights to load do here what they did in training."""
    base = ready.replaced
    if base is not None and base.kernel is not None:
        matrix = base.kernel.matrix()
    else:
        matrix = matrix_of(layer)
    view = view_of(layer)
    weights = types.SimpleNamespace(shape=view.shape)
    for weight in ready.method.weights(weights.shape):
        value = ready.values.get(weight.name)
        dtype = weight.dtype or layer.variable_dtype
        if value is None:
            value = ops.zeros(view.batch + weight.shape)
        setattr(weights, weight.name, ops.cast(value, dtype))
    layer_path = list(adapter.about["layers"])[row]
    dtypes = (
        adapter.about["layers"][layer_path]["dtype"],
        base_dtype(layer),
    )
    if not same_effect(
        effect(ready.method, weights, matrix),
        adapter.arrays[EFFECTS][row],
        float(ready.base_fingerprint[0]),
        *dtypes,
    ):
        if ready.method.base_mode is not None:
            raise ValueError(
                f"{adapter.source} would not do here what it did where it was "
                f"trained: the kernel of layer '{layer_path}' is quantized "
                "otherwise here, perhaps by another release of Keras."
            )
        raise ValueError(
            f"{adapter.source} would not do here what it did where it was "
            f"trained: the singular vectors of layer '{layer_path}' come out "
            "otherwise (another sign, or turned among singular values that "
            f"are nearly equal; there {dtypes[0]}, here {dtypes[1]}). Save it "
            "again with `save_adapter(path, include_basis=True)` where it was "
            "trained."
        )


def check_start(
    adapter: SavedAdapter, layer_path: str, layer: Any, values: dict[str, Any]
) -> None:
    """Whether a base that was made here fits the file's frozen weights."""
    if layer.adapter.replaced is None:
        return
    trained = layer.adapter.variables_by_name(trainable=True)
    for name, value in values.items():
        ours = to_numpy(getattr(layer.adapter, name).value)
        key = f"{layer.adapter.method.name}_{name}"
        if key not in trained and not np.array_equal(ours, value):
            raise ValueError(
                f"{adapter.source} holds another '{name}' for layer "
                f"'{layer_path}' than the one that this model's base was "
                "made for. Load it into the base model, before "
                "anything is enabled there."
            )


def fingerprint_of(layer: Any) -> np.ndarray:
    """Of the W that an adapter file belongs to."""
    adapter = getattr(layer, "adapter", None)
    if adapter is not None and adapter.replaced is not None:
        return adapter.replaced.float_fingerprint
    if adapter is not None and adapter.base_fingerprint is not None:
        return adapter.base_fingerprint
    return fingerprint(ops.convert_to_numpy(host_matrix_of(layer)))


def base_dtype(layer: Any) -> str:
    """The dtype of that W."""
    adapter = getattr(layer, "adapter", None)
    if adapter is not None and adapter.replaced is not None:
        return layer.variable_dtype
    return kernel_of(layer).dtype


def array_key(layer_path: str, method: Method, weight: str) -> str:
    return f"{layer_path}/{method.name}_{weight}"


def dtype_in_file(weight: Weight) -> str:
    return "int32" if weight.dtype == "int32" else "float32"
