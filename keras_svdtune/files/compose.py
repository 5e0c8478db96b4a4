"""The sum of adapter files, as an adapter. No model is needed."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import effect_of_product, matches
from keras_svdtune.files.compatibility import array_key, methods_of
from keras_svdtune.files.format import (
    EFFECTS,
    FINGERPRINTS,
    SavedAdapter,
    read_adapter,
)
from keras_svdtune.matrix.decompose import top_on_host
from keras_svdtune.methods.base import Method, WeightValues
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.methods.settings import (
    check_whole_number,
    is_number,
    plain,
)
from keras_svdtune.runtime.types import Json


class _File:
    """One adapter file, its weight in the sum, and its layers' methods."""

    def __init__(self, path: str | os.PathLike[str], weight: Any):
        weight = plain(weight)
        if not is_number(weight):
            raise ValueError(
                "Each weight must be a finite number. Received: "
                f"{weight!r} for '{path}'"
            )
        self.weight = float(weight)
        self.file = read_adapter(path)
        self.layers: Json = self.file.about["layers"]
        self.method, self.methods = methods_of(self.file)
        self._rows = {layer: i for i, layer in enumerate(self.layers)}

    def row(self, table: str, layer: str) -> np.ndarray:
        """Returns the layer's row of `base_fingerprints` or `effects`."""
        return self.file.arrays[table][self._rows[layer]]

    def arrays(self, layer: str) -> dict[str, np.ndarray]:
        """Returns the arrays of one layer, by weight name."""
        start = array_key(layer, self.methods[layer], "")
        return {
            key.removeprefix(start): value
            for key, value in self.file.arrays.items()
            if key.startswith(start)
        }


@dataclasses.dataclass
class _LayerSum:
    """The sum of adapters for one layer.

    Attributes:
        method: `Method`.
        arrays: what a file holds of it, by weight name.
        effect: (8,), see `adapter/fingerprint.py`.
        size: float, ‖ΔW‖ for low-rank methods; else 0.
        error: float, ‖ΔW - A·B‖.
    """

    method: Method
    arrays: dict[str, np.ndarray]
    effect: np.ndarray
    size: float = 0.0
    error: float = 0.0


def compose(
    adapters: Mapping[str | os.PathLike[str], float], rank: int | None = None
) -> SavedAdapter:
    """Computes the weighted sum of adapters: ΔW = Σ weight · ΔW of each file.

    SVF, SVFT and LoRA-XS are linear in their trainable weights: these are
    added up, and the result is an adapter of the same method and size. PiSSA,
    MiLoRA, LoRA and AdaLoRA become one LoRA, exactly: with ΔW_i = A_i·B_i

        ΔW = [w₁·A₁ w₂·A₂ ...]·[B₁; B₂; ...]

    whose rank is the sum of the ranks (2r for PiSSA and MiLoRA), or the best
    approximation of a given rank. A layer that a file does not have counts as
    unchanged there.

    Args:
        adapters: weight of each file. `{path: 1.0}` is that adapter itself.
        rank: int or None. For low-rank methods, the rank of the result, or
            min(in, out) where that is less, by a singular value decomposition
            of ΔW; its relative error ‖ΔW - A·B‖ / ‖ΔW‖, in all and by layer,
            is then in `about["composition"]["relative_error"]`. None is exact.

    Returns:
        `SavedAdapter`, to `save(path)` or hand to `load_adapter`, which
        checks it against the model like any file.

    Raises:
        ValueError: a file cannot be read, the files belong to different base
            models or cannot be added, or a number or the sum is out of range.

    Example:

    ```python
    both = compose({"math.safetensors": 0.7, "pirate.safetensors": 0.3})
    gemma.backbone.load_adapter(both)
    both.save("math_pirate.safetensors")
    ```
    """
    if rank is not None:
        rank = check_whole_number("rank", rank, 1)
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            "`adapters` must be a dict from path to weight, not empty. "
            f"Received: {adapters!r}"
        )
    parts = [_File(path, weight) for path, weight in adapters.items()]
    if len(parts) == 1 and parts[0].weight == 1.0 and rank is None:
        return parts[0].file
    for part in parts:
        if part.file.statistics:
            raise ValueError(
                f"{part.file.source} holds moving statistics of "
                "BatchNormalization, which belong to its weights alone and "
                "cannot be added up."
            )
    linear = all(x.linear for p in parts for x in p.methods.values())
    if linear and len({part.method.name for part in parts}) > 1:
        raise ValueError(
            "Adapters of these methods add up only if their settings are the "
            "same. Received: "
            + ", ".join(f"{p.method} in {p.file.source}" for p in parts)
        )
    if linear and rank is not None:
        raise ValueError(
            f"`rank` is for low-rank methods; {parts[0].method.title} adds up "
            f"exactly without. Received: rank={rank!r}"
        )
    sums: dict[str, _LayerSum] = {}
    for layer in dict.fromkeys(x for part in parts for x in part.layers):
        having = [part for part in parts if layer in part.layers]
        _check_same_base(layer, having)
        sums[layer] = (
            _add(layer, having) if linear else _concatenate(layer, having, rank)
        )
    composition: Json = {
        "parts": {
            pathlib.Path(path).name: part.weight
            for path, part in zip(adapters, parts, strict=True)
        }
    }
    if rank is not None:
        composition["relative_error"] = _errors(sums)
    return _result(parts, sums, composition)


def _check_same_base(layer: str, parts: list[_File]) -> None:
    first, *others = parts
    for part in others:
        ours, theirs = first.layers[layer], part.layers[layer]
        if ours["kernel_shape"] != theirs["kernel_shape"] or not matches(
            first.row(FINGERPRINTS, layer),
            part.row(FINGERPRINTS, layer),
            ours["dtype"],
            theirs["dtype"],
        ):
            raise ValueError(
                f"{first.file.source} and {part.file.source} belong to "
                f"different base models: layer '{layer}' had other weights."
            )


def _errors(sums: dict[str, _LayerSum]) -> dict[str, float]:
    """Computes the relative error in all and of each layer."""
    size = math.hypot(*(x.size for x in sums.values()))
    error = math.hypot(*(x.error for x in sums.values()))
    by_layer = {k: x.error / x.size if x.size else 0.0 for k, x in sums.items()}
    return {"total": error / size if size else 0.0, **by_layer}


def _result(
    parts: list[_File], sums: dict[str, _LayerSum], composition: Json
) -> SavedAdapter:
    used = [x.method for x in sums.values()]
    method = used[0]
    if isinstance(method, LoRA):  # of different ranks
        method = max(used, key=lambda x: x.rank)  # type: ignore[attr-defined]
    elif parts[0].method.name == method.name:
        method = parts[0].method
    arrays: dict[str, np.ndarray] = {}
    layers, fingerprints = {}, []
    for layer, total in sums.items():
        part = next(p for p in parts if layer in p.layers)
        entry = {k: part.layers[layer][k] for k in ("kernel_shape", "dtype")}
        if total.method != method:
            entry["settings"] = total.method.settings()
        layers[layer] = entry
        fingerprints.append(part.row(FINGERPRINTS, layer))
        for name, value in total.arrays.items():
            arrays[array_key(layer, total.method, name)] = value
    arrays[FINGERPRINTS] = np.stack(fingerprints)
    arrays[EFFECTS] = np.stack([x.effect for x in sums.values()])
    arrays[EFFECTS] = arrays[EFFECTS].astype("float32")
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"'{key}' of the sum is not finite in float32. Give smaller "
                f"weights. Received: {[part.weight for part in parts]}"
            )
    about = parts[0].file.about | {
        "method": method.name,
        "settings": method.settings(),
        "layers": layers,
        "composition": composition,
    }
    sources = " and ".join(p.file.source for p in parts)
    return SavedAdapter(about, arrays, f"the sum of {sources}")


def _add(layer: str, parts: list[_File]) -> _LayerSum:
    """Adds up adapters of a method that is linear in its trainable weights."""
    first = parts[0]
    method = first.methods[layer]
    for part in parts[1:]:
        if part.methods[layer] != method:
            raise ValueError(
                "Adapters of these methods add up only if their settings are "
                f"the same. Layer '{layer}' has {method} in "
                f"{first.file.source} and {part.methods[layer]} in "
                f"{part.file.source}."
            )
    size = math.prod(first.layers[layer]["kernel_shape"])
    trained = {w.name for w in method.weights((size, size)) if w.trainable}
    total: Json = {}
    for part in parts:
        for name, value in part.arrays(layer).items():
            if name in trained:
                total[name] = total.get(name, 0.0) + part.weight * value
            elif not np.array_equal(total.setdefault(name, value), value):
                raise ValueError(
                    f"'{name}' of layer '{layer}' differs between the files: "
                    "they were trained with other singular vectors. Convert "
                    "them by `to_lora(model, rank)` where they load."
                )
    for name in trained:
        total[name] = total[name].astype("float32")
    effects = [part.weight * part.row(EFFECTS, layer) for part in parts]
    return _LayerSum(method, total, np.sum(effects, axis=0))


def _concatenate(layer: str, parts: list[_File], rank: int | None) -> _LayerSum:
    """Adds up adapters of low-rank methods: one LoRA, exact or of `rank`."""
    products = [_product(layer, part) for part in parts]
    if any(a.ndim > 2 for a, _ in products):
        raise ValueError(
            f"Layer '{layer}' is a bank of matrices. Of these only SVF, SVFT "
            "and LoRA-XS add up."
        )
    a = np.concatenate([a for a, _ in products], axis=1)
    b = np.concatenate([b for _, b in products], axis=0)
    n = min(a.shape[0], b.shape[1])
    size, error = _norm_of_product(a, b), 0.0
    rank = n if rank is None else min(rank, n)
    if a.shape[1] > rank:
        change = a @ b
        top = top_on_host(change, rank)
        assert top.u is not None and top.v is not None
        a, b = top.u * np.sqrt(top.s), np.sqrt(top.s)[:, None] * top.v.T
        error = float(np.linalg.norm(change - a.astype("float64") @ b))
    elif a.shape[1] == 0:  # AdaLoRA may leave a layer nothing
        a, b = np.zeros((len(a), 1)), np.zeros((1, b.shape[1]))
    arrays = {"a": a.astype("float32"), "b": b.astype("float32")}
    method = LoRA(rank=a.shape[1])
    return _LayerSum(method, arrays, effect_of_product(a, b), size, error)


def _norm_of_product(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the Frobenius norm ‖a·b‖ without the product."""
    return float(np.sqrt(max(np.vdot(a.T @ a, b @ b.T), 0.0)))


def _product(layer: str, part: _File) -> tuple[np.ndarray, np.ndarray]:
    """Returns weight·ΔW of one part as factors (a, b), float64."""
    method = part.methods[layer]
    if isinstance(method, ReplacesBase) and method.quantization:
        raise ValueError(
            f"{part.file.source} holds {method}, whose base was quantized for "
            "it alone. Such adapters do not add up."
        )
    arrays = part.arrays(layer)
    shape = (0, 0)  # a product does not ask for it
    tensors = {k: ops.convert_to_tensor(v) for k, v in arrays.items()}
    factors = method.low_rank_factors(WeightValues(shape, **tensors))
    if factors is None:
        why = (
            "it adds up with adapters of its own method and settings only"
            if method.linear
            else f"what {method.title} adds is neither linear in its weights "
            "nor of low rank, since every column has a norm of its own"
        )
        raise ValueError(
            f"{part.file.source} holds {method}, and {why}. Load it and "
            "convert it by `to_lora(model, rank)` first."
        )
    a, b = (ops.convert_to_numpy(x).astype("float64") for x in factors)
    return part.weight * a, b
