"""Adapter files: one `.safetensors` file of kilobytes.

The file holds one float32 array for each trainable, under the key
`<layer path>/<method>_<weight>`, e.g.
`decoder_block_0/attention/query/svf_delta`, and a fingerprint of each base
kernel (`fingerprint.py`) under `<layer path>/base_fingerprint`. Its metadata
is one JSON text under `keras_svdtune`:

    {"format_version": 1, "method": "svf", "settings": {},
     "model_class": "Gemma3Backbone",
     "versions": {"keras": "3.15.1", "keras_hub": "0.32.0"},
     "layers": {"decoder_block_0/attention/query":
                {"kernel_shape": [4, 640, 256], "dtype": "float32"}, ...}}

A layer's entry has `settings` of its own where they were decided for it. A
method whose frozen weights cannot be computed again has them in the file too.
"""

import functools
import json
import os
import pathlib
from typing import Any

import keras
import keras_hub
import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from keras_svdtune.adapter import Plan, plan
from keras_svdtune.attach import matrix_of
from keras_svdtune.enable import (
    adapted_part,
    attach_plans,
    check_layer,
    enabled_method,
    require_adapted,
)
from keras_svdtune.fingerprint import fingerprint, matches
from keras_svdtune.methods.base import METHODS, Method, nearest
from keras_svdtune.progress import run_all
from keras_svdtune.targets import adapted_layers, all_layers, layers_by_path

FORMAT_VERSION = 1
_KEY = "keras_svdtune"
_FINGERPRINT = "base_fingerprint"


def save_adapter(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Writes the trainables of the enabled adapter to one file.

    The file is written under a temporary name and renamed, so that `path`
    holds the old file or the new one, never half of one.

    Args:
        model: a model with an adapter.
        path: where to write, ending in `.safetensors`.

    Raises:
        ValueError: the model has no adapter, or `path` another ending.
    """
    path = _checked_path(path)
    root = adapted_part(model)
    method = enabled_method(root)
    arrays: dict[str, np.ndarray] = {}
    layers: dict[str, Any] = {}
    for layer_path, layer in require_adapted(root).items():
        adapter = layer.adapter
        for weight in adapter.method.weights(adapter.shape):
            if weight.saved:
                value = ops.cast(getattr(adapter, weight.name).value, "float32")
                key = _key(layer_path, adapter.method, weight.name)
                arrays[key] = np.ascontiguousarray(ops.convert_to_numpy(value))
        arrays[f"{layer_path}/{_FINGERPRINT}"] = _fingerprint_of(layer)
        entry = {
            "kernel_shape": list(layer._kernel.shape),
            "dtype": layer._kernel.dtype,
        }
        if adapter.method != method:
            entry["settings"] = adapter.method.settings()
        layers[layer_path] = entry
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
    }
    metadata = {_KEY: json.dumps(about, separators=(",", ":"))}
    _write_atomically(path, safetensors.numpy.save(arrays, metadata))


def load_adapter(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Loads an adapter file into the base model that it was trained on.

    If the model has no adapter yet, the file's method is enabled on the
    file's layers. If it has the same one, values are assigned and nothing is
    compiled anew.

    Args:
        model: the base model, or the same with the same method enabled.
        path: a file that `save_adapter` wrote.

    Raises:
        ValueError: the file is no adapter file, or does not belong to this
            model: other layers, shapes, method or base weights. The model is
            as it was.
    """
    path = _checked_path(path)
    about, arrays = _read(path)
    root = adapted_part(model)
    adapted = adapted_layers(root)
    method = _method(about["method"], about["settings"], path)
    layers = _find_layers(
        about, adapted or layers_by_path(all_layers(root)), path
    )
    methods = {
        layer_path: _method(about["method"], entry["settings"], path)
        if "settings" in entry
        else method
        for layer_path, entry in about["layers"].items()
    }
    values = {
        layer_path: _values_of(
            layer_path, layer, methods[layer_path], arrays, path
        )
        for layer_path, layer in layers.items()
    }
    for layer_path, layer in layers.items():
        _check_base(layer_path, layer, about, arrays, path)
    if adapted:
        ours = {p: x.adapter.method for p, x in adapted.items()}
        if ours != methods:
            raise ValueError(
                f"'{path}' holds {method} on {len(layers)} layers; this model "
                f"has {enabled_method(root)} on {len(adapted)}. Call "
                "`remove_adapter()` first, then load."
            )
        for layer_path, layer in layers.items():
            for name, value in values[layer_path].items():
                getattr(layer.adapter, name).assign(value)
        return
    jobs = {}
    for layer_path, layer in layers.items():
        check_layer(layer_path, layer, methods[layer_path])
        jobs[layer_path] = functools.partial(
            _plan, layer_path, layer, methods[layer_path], values[layer_path]
        )
    plans = run_all(f"{method.title}: loading", jobs)
    attach_plans(root, method, layers, plans)


def _plan(
    layer_path: str, layer: Any, method: Method, values: dict[str, Any]
) -> Plan:
    matrix = matrix_of(layer)
    names = {w.name for w in method.weights(tuple(matrix.shape))}
    if names == set(values):  # nothing to decompose
        return Plan(
            method, dict(values), fingerprint(ops.convert_to_numpy(matrix))
        )
    ready = plan(method, matrix, layer_path)
    ready.values.update(values)
    return ready


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and arrays, or an error that says what the file is not."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"There is no file '{path}'.") from None
    except Exception as error:
        raise ValueError(
            f"'{path}' is not a safetensors file, or is damaged: {error}"
        ) from None
    try:
        about = json.loads(metadata[_KEY])
        version = about["format_version"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"'{path}' is a safetensors file, but not an adapter that "
            f"`save_adapter` wrote: its metadata has no valid '{_KEY}'."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format version {version}; this release reads "
            f"version {FORMAT_VERSION}. Update keras_svdtune."
        )
    expected = {"method": str, "settings": dict, "layers": dict}
    for key, kind in expected.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"The metadata of '{path}' has no valid '{key}'.")
    return about, arrays


def _method(name: str, settings: dict[str, Any], path: pathlib.Path) -> Method:
    if name not in METHODS:
        raise ValueError(
            f"'{path}' was saved with the method {name!r}, which this release "
            f"does not have. {nearest(name, list(METHODS))}"
        )
    try:
        return METHODS[name](**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"'{path}' has settings that {METHODS[name].__name__} does not "
            f"accept: {error}"
        ) from None


def _find_layers(
    about: dict[str, Any], ours: dict[str, Any], path: pathlib.Path
) -> dict[str, Any]:
    """The model's layers for the file's, each with its kernel's shape."""
    layers = {}
    for layer_path, entry in about["layers"].items():
        if layer_path not in ours:
            raise ValueError(
                f"'{path}' has an adapter for layer '{layer_path}' of a "
                f"{about.get('model_class')}, which this model does not have. "
                f"{nearest(layer_path, list(ours))}"
            )
        layer = ours[layer_path]
        shape = tuple(getattr(layer, "_kernel", np.zeros(())).shape)
        if shape != tuple(entry.get("kernel_shape", ())):
            raise ValueError(
                f"'{path}' was made for another model: layer '{layer_path}' "
                f"has a kernel of shape {shape}, expected "
                f"{tuple(entry.get('kernel_shape', ()))}."
            )
        layers[layer_path] = layer
    return layers


def _values_of(
    layer_path: str,
    layer: Any,
    method: Method,
    arrays: dict[str, np.ndarray],
    path: pathlib.Path,
) -> dict[str, Any]:
    """The file's arrays for one layer, by weight name."""
    values = {}
    for weight in method.weights(tuple(matrix_of(layer).shape)):
        if not weight.saved:
            continue
        key = _key(layer_path, method, weight.name)
        array = arrays.get(key)
        if array is None or array.shape != weight.shape:
            found = "nothing" if array is None else f"shape {array.shape}"
            raise ValueError(
                f"'{path}' should hold '{key}' of shape {weight.shape}. "
                f"Found: {found}"
            )
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(
                f"'{key}' of '{path}' should hold finite float32 values. "
                f"Found: {array.dtype}"
            )
        values[weight.name] = array
    return values


def _check_base(
    layer_path: str,
    layer: Any,
    about: dict[str, Any],
    arrays: dict[str, np.ndarray],
    path: pathlib.Path,
) -> None:
    theirs = arrays.get(f"{layer_path}/{_FINGERPRINT}")
    dtype = about["layers"][layer_path].get("dtype", "float32")
    if theirs is None or not matches(
        _fingerprint_of(layer), theirs, dtype, layer._kernel.dtype
    ):
        raise ValueError(
            f"'{path}' was trained on other weights: the kernel of layer "
            f"'{layer_path}' is not the one of its base "
            f"({about.get('model_class')}). Load the base model that it was "
            "trained on."
        )


def _fingerprint_of(layer: Any) -> np.ndarray:
    adapter = getattr(layer, "adapter", None)
    known = getattr(adapter, _FINGERPRINT, None)
    if known is not None:
        return known
    return fingerprint(ops.convert_to_numpy(matrix_of(layer)))


def _key(layer_path: str, method: Method, weight: str) -> str:
    return f"{layer_path}/{method.name}_{weight}"


def _checked_path(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"An adapter file ends in '.safetensors'. Received: path='{path}'"
        )
    return path


def _write_atomically(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
