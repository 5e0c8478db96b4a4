"""Turns the low-rank factors of another library's file into an adapter.

Such a file names its layers in its own way and says nothing of the base that it
belongs to: only shapes can be checked. `peft_folder.py` and
`keras_lora_file.py` read them.
"""

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import effect
from keras_svdtune.files.compatibility import array_key, fingerprint_of
from keras_svdtune.files.format import (
    EFFECTS,
    FINGERPRINTS,
    SavedAdapter,
)
from keras_svdtune.files.metadata import about_of
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method, WeightValues, nearest
from keras_svdtune.methods.dora import DoRA
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Json, Model


@dataclasses.dataclass(frozen=True)
class LowRankLayer:
    """What a file adds to one layer: W' = W + scale·a·b.

    Attributes:
        a: (in, r), float32.
        b: (r, out), float32.
        scale: float.
        magnitude: (out,), float32, the m of DoRA; or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class LowRankFile:
    """The contents of another library's file: its layers, by our paths."""

    source: str
    layers: dict[str, LowRankLayer]

    def as_saved(self, ours: Mapping[str, Target], root: Model) -> SavedAdapter:
        """Returns it as a LoRA or DoRA of this package, for this base.

        Raises a ValueError if a layer is not in the model, or not of the
        shape of its factors.
        """
        methods = {p: self._method(p, ours, root) for p in self.layers}
        found = collections.Counter(map(repr, methods.values()))
        (usual, _), *_ = found.most_common(1)
        method = next(x for x in methods.values() if repr(x) == usual)
        arrays: dict[str, np.ndarray] = {}
        layers: Json = {}
        fingerprints, effects = [], []
        for path, layer in self.layers.items():
            target = ours[path]
            matrix = target.matrix()
            values = _values(methods[path], layer, matrix)
            for weight in methods[path].weights(target.view.shape):
                if weight.saved:
                    key = array_key(path, method, weight.name)
                    arrays[key] = np.ascontiguousarray(values[weight.name])
            weights = WeightValues(target.view.shape, **values)
            fingerprints.append(fingerprint_of(target))
            effects.append(effect(methods[path], weights, matrix, False))
            layers[path] = {
                "kernel_shape": list(target.view.kernel_shape),
                "dtype": target.base_dtype,
            }
            if not methods[path].trains_like(method):
                layers[path]["settings"] = methods[path].settings()
        arrays[FINGERPRINTS] = np.stack(fingerprints)
        arrays[EFFECTS] = np.stack(effects)
        about = about_of(method, root, layers)
        return SavedAdapter(about, arrays, self.source)

    def _method(
        self, path: str, ours: Mapping[str, Target], root: Model
    ) -> Method:
        """Returns the method of a layer, having checked that it fits."""
        layer, target = self.layers[path], ours.get(path)
        if target is None:
            raise ValueError(
                f"{self.source} has an adapter for layer '{path}', which "
                f"cannot be adapted in '{root.name}'. "
                f"{nearest(path, list(ours))}"
            )
        shape = target.view.shape
        m = layer.magnitude
        arrays = [layer.a, layer.b, *([] if m is None else [m])]
        if (
            target.view.count is not None
            or (layer.a.shape[0], layer.b.shape[1]) != shape
            or (m is not None and m.shape != shape[1:])
        ):
            raise ValueError(
                f"{self.source} was made for another model: its factors of "
                f"layer '{path}' have the shapes "
                f"{', '.join(str(x.shape) for x in arrays)}, and the layer is "
                f"{target.view}."
            )
        if not all(np.isfinite(x).all() for x in arrays):
            raise ValueError(
                f"{self.source} holds NaN or infinity for layer '{path}'."
            )
        rank = layer.a.shape[1]
        alpha = None if layer.scale == 1.0 else layer.scale * rank
        if layer.magnitude is None:
            return LoRA(rank=rank, alpha=alpha)
        return DoRA(rank=rank, alpha=alpha)


def thin(layer: LowRankLayer) -> LowRankLayer:
    """Returns the same with a rank of min(in, out), if it is larger."""
    (rows, rank), columns = layer.a.shape, layer.b.shape[1]
    if rank <= min(rows, columns):
        return layer
    product = layer.a @ layer.b
    if rows <= columns:
        pair = (np.eye(rows, dtype="float32"), product)
    else:
        pair = (product, np.eye(columns, dtype="float32"))
    return dataclasses.replace(layer, a=pair[0], b=pair[1])


def _values(
    method: Method, layer: LowRankLayer, matrix: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the values of a method's weights that do what a file says."""
    values = {"a": layer.a, "b": layer.b}
    if layer.magnitude is not None:
        first = method.initial_values(matrix, None, np.random.RandomState(0))
        squared = to_numpy(ops.convert_to_tensor(first["squared_norms"]))
        values["squared_norms"] = squared
        values["magnitude_change"] = layer.magnitude - np.sqrt(squared)
    return values
