"""The sum of adapter files, as an adapter. No model is needed."""

import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from keras_svdtune.adapter.fingerprint import matches
from keras_svdtune.files.compatibility import array_key
from keras_svdtune.files.format import EFFECTS, FINGERPRINTS, SavedAdapter
from keras_svdtune.files.sums import Part, Sum, add, concatenate
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.runtime.types import Json


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
        rank: int or None. For low-rank methods, the rank of the result, by a
            singular value decomposition of ΔW; its relative error
            ‖ΔW - A·B‖ / ‖ΔW‖, in all and by layer, is then in
            `about["composition"]["relative_error"]`. None is exact.

    Returns:
        `SavedAdapter`, to `save(path)` or hand to `load_adapter`, which
        checks it against the model like any file.

    Raises:
        ValueError: a file cannot be read, the files belong to different base
            models or cannot be added, or `rank` does not fit.

    Example:

    ```python
    both = compose({"math.safetensors": 0.7, "pirate.safetensors": 0.3})
    gemma.backbone.load_adapter(both)
    both.save("math_pirate.safetensors")
    ```
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(
            "`adapters` must be a dict from path to weight, not empty. "
            f"Received: {adapters!r}"
        )
    parts = [Part(path, weight) for path, weight in adapters.items()]
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
    sums: dict[str, Sum] = {}
    for layer in dict.fromkeys(x for part in parts for x in part.layers):
        having = [part for part in parts if layer in part.layers]
        _check_same_base(layer, having)
        sums[layer] = (
            add(layer, having) if linear else concatenate(layer, having, rank)
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


def _check_same_base(layer: str, parts: list[Part]) -> None:
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


def _errors(sums: dict[str, Sum]) -> dict[str, float]:
    """Computes the relative error in all and of each layer."""
    size = math.hypot(*(x.size for x in sums.values()))
    error = math.hypot(*(x.error for x in sums.values()))
    by_layer = {k: x.error / x.size if x.size else 0.0 for k, x in sums.items()}
    return {"total": error / size if size else 0.0, **by_layer}


def _result(
    parts: list[Part], sums: dict[str, Sum], composition: Json
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
    about = parts[0].file.about | {
        "method": method.name,
        "settings": method.settings(),
        "layers": layers,
        "composition": composition,
    }
    sources = " and ".join(p.file.source for p in parts)
    return SavedAdapter(about, arrays, f"the sum of {sources}")
