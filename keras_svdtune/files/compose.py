"""The sum of adapter files, as an adapter. No model is needed."""

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import coarsest, effect_of_product
from keras_svdtune.files.compatibility import array_key, methods_of
from keras_svdtune.files.format import (
    BASIS,
    EFFECTS,
    FINGERPRINTS,
    ROUNDED,
    SavedAdapter,
    read_adapter,
)
from keras_svdtune.files.renumbered import Kernels, listed, stem_of
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

# Of kernels, a second's worth: ten thousand layers in each of two files.
_MOST_COMPARISONS = 10**8


class _File:
    """One adapter file, its weight in the sum, and its layers' methods.

    Attributes:
        layers: the file's entry of each layer, and
        methods: its method; both by the path that it has in the sum.
    """

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
        # The path that the file itself has for each layer, and its row.
        self._own = {layer: (layer, i) for i, layer in enumerate(self.layers)}
        self._keys: dict[str, list[str]] = {}
        for key in self.file.arrays:
            layer, _, name = key.rpartition("/")
            self._keys.setdefault(layer, []).append(name)

    def rename(self, names: dict[str, str]) -> None:
        """Gives each layer the path that it has in the sum."""
        self.layers = {names[k]: v for k, v in self.layers.items()}
        self.methods = {names[k]: v for k, v in self.methods.items()}
        self._own = {names[k]: v for k, v in self._own.items()}

    def rounds(self, layer: str) -> bool:
        """Returns whether the layer's basis is that of its kernel rounded."""
        return BASIS in self.layers[layer]

    def row(self, table: str, layer: str) -> np.ndarray:
        """Returns the layer's row of `base_fingerprints` or `effects`."""
        return self.file.arrays[table][self._own[layer][1]]

    def kernel(self, layer: str) -> tuple[tuple[int, ...], str]:
        """Returns shape and dtype of the layer's kernel."""
        entry = self.layers[layer]
        return tuple(entry["kernel_shape"]), entry["dtype"]

    def arrays(self, layer: str) -> dict[str, np.ndarray]:
        """Returns the arrays of one layer, by weight name."""
        own, _ = self._own[layer]
        method = self.methods[layer]
        start = f"{method.name}_"
        found = {
            name.removeprefix(start): self.file.arrays[f"{own}/{name}"]
            for name in self._keys.get(own, [])
            if name.startswith(start)
        }
        size = math.prod(self.layers[layer]["kernel_shape"])
        for weight in method.weights((size, size)):
            if weight.saved and weight.name not in found:
                raise ValueError(
                    f"{self.file.source} should hold "
                    f"'{array_key(own, method, weight.name)}'. Found: nothing"
                )
        return found


@dataclasses.dataclass
class _LayerSum:
    """The sum of adapters for one layer.

    Attributes:
        method: `Method`.
        arrays: what a file holds of it, by weight name.
        effect: (8,), see `adapter/fingerprint.py`.
        rounds: whether its basis is that of the kernel rounded to bfloat16.
        size: float, ‖ΔW‖ for low-rank methods; else 0.
        error: float, ‖ΔW - A·B‖.
    """

    method: Method
    arrays: dict[str, np.ndarray]
    effect: np.ndarray
    rounds: bool = False
    size: float = 0.0
    error: float = 0.0


def compose(
    adapters: Mapping[str | os.PathLike[str], float], rank: int | None = None
) -> SavedAdapter:
    """Computes the weighted sum of adapters: ΔW = Σ weight · ΔW of each file.

    SVF, SVFT, LoRA-XS and MiCA are linear in their trainable weights: these are
    added up, and the result is an adapter of the same method and size. PiSSA,
    MiLoRA, CorDA, LoRA-GA, LoRA, EVA and AdaLoRA become one LoRA, exactly:
    with ΔW_i = A_i·B_i

        ΔW = [w₁·A₁ w₂·A₂ ...]·[B₁; B₂; ...]

    whose rank is the sum of the ranks (2r for the first four), or the best
    approximation of a given rank. A layer that a file does not have counts as
    unchanged there. A layer that Keras has numbered otherwise in another file
    (`conv2d_8` and `conv2d_21`) is known by its kernel, and has the path of the
    first file that has it.

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
            models or cannot be added, it is ambiguous which of their layers are
            the same, or a number or the sum is out of range.

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
        if part.file.beside:
            raise ValueError(
                f"{part.file.source} also holds what trained besides the "
                f"adapter ({', '.join(part.file.beside[:3])} ...), which "
                "cannot be added up. Save it with `adapter_only=True`."
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
    _give_common_paths(parts)
    sums: dict[str, _LayerSum] = {}
    for layer in dict.fromkeys(x for part in parts for x in part.layers):
        having = [part for part in parts if layer in part.layers]
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


def _give_common_paths(parts: list[_File]) -> None:
    """Renames layers, so that the same ones have the same path in all files."""
    own = [dict(part.layers) for part in parts]
    names: list[dict[str, str]] = []
    for i, part in enumerate(parts):
        found: dict[str, str] = {}
        for before, their_names in zip(parts[:i], names, strict=True):
            for layer, theirs in _same_layers(before, part).items():
                found.setdefault(layer, their_names[theirs])
        taken = {path for x in names for path in x.values()}
        for layer in own[i]:
            path, count = found.get(layer, layer), 0
            while layer not in found and path in taken:
                count += 1
                path = f"{layer}#{count}"
            found[layer] = path
            taken.add(path)
        names.append(found)
    for part, new in zip(parts, names, strict=True):
        part.rename(new)


def _same_layers(first: _File, second: _File) -> dict[str, str]:
    """Returns which layers of two files are the same: second's -> first's.

    Layers whose paths are equal without numbers are told apart by their paths
    if these agree in both files, else by their kernels.

    Raises:
        ValueError: the files belong to different base models, or more than one
            layer has the kernel that is looked for.
    """
    if len(first.layers) * len(second.layers) > _MOST_COMPARISONS:
        raise ValueError(
            f"{first.file.source} and {second.file.source} have "
            f"{len(first.layers)} and {len(second.layers)} layers, too many "
            "to compare."
        )
    ours = Kernels(
        ((path, *first.kernel(path)) for path in first.layers),
        lambda path: first.row(FINGERPRINTS, path),
    )
    like = {
        path: ours.like(
            path, *second.kernel(path), second.row(FINGERPRINTS, path)
        )
        for path in second.layers
    }
    counts = collections.Counter(x for found in like.values() for x in found)
    groups: dict[str, list[str]] = {}
    for path in second.layers:
        groups.setdefault(stem_of(path), []).append(path)
    same: dict[str, str] = {}
    for group in groups.values():
        equal = [path for path in group if path in like[path]]
        # Then the numbers agree: all layers have the path that they have in
        # the first file, or one has whose kernel is no other's.
        if len(equal) == len(group) or any(
            like[path] == [path] and counts[path] == 1 for path in equal
        ):
            same |= {path: path for path in equal}
            continue
        for path in group:
            if len(like[path]) > 1 or any(counts[x] > 1 for x in like[path]):
                raise ValueError(
                    f"Which layer of {first.file.source} is '{path}' of "
                    f"{second.file.source} is ambiguous: Keras has numbered "
                    "the layers otherwise, and several have equal kernels "
                    f"({listed(like[path])}). Save both from models built "
                    "first in their process, or name the layers."
                )
            if like[path]:
                same[path] = like[path][0]
    matched = set(same.values())
    for path in second.layers:
        if path in first.layers and path not in same and path not in matched:
            raise ValueError(
                f"{first.file.source} and {second.file.source} belong to "
                f"different base models: layer '{path}' had other weights."
            )
    return same


def _check_same_basis(layer: str, parts: list[_File]) -> None:
    """Checks that the parts were trained with the same singular vectors."""
    first, *others = parts
    for part in others:
        if _basis_of(layer, part) != _basis_of(layer, first):
            old, new = sorted((first, part), key=lambda x: x.rounds(layer))
            raise ValueError(
                f"{old.file.source} was written by an earlier release and "
                "trained with the singular vectors of a "
                f"{old.layers[layer]['dtype']} kernel in layer '{layer}', "
                f"{new.file.source} with others. Load each into its base "
                "model, convert it by `to_lora(model, rank)`, save it, and "
                "add up those files; or train the first one again."
            )


def _basis_of(layer: str, part: _File) -> str:
    """Returns the dtype of the matrix whose singular vectors a part has."""
    dtype: str = part.layers[layer]["dtype"]
    return ROUNDED if part.rounds(layer) else dtype


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
        having = [p for p in parts if layer in p.layers]
        part = having[0]
        entry = {
            "kernel_shape": part.layers[layer]["kernel_shape"],
            # What was measured on a rounded kernel is no more exact than that.
            "dtype": coarsest(p.layers[layer]["dtype"] for p in having),
        }
        if total.rounds:
            entry[BASIS] = ROUNDED
        if not total.method.trains_like(method):
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
    _check_same_basis(layer, parts)
    for part in parts[1:]:
        if not part.methods[layer].trains_like(method):
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
    rounds = any(part.rounds(layer) for part in parts)
    return _LayerSum(method, total, np.sum(effects, axis=0), rounds)


def _concatenate(layer: str, parts: list[_File], rank: int | None) -> _LayerSum:
    """Adds up adapters of low-rank methods: one LoRA, exact or of `rank`."""
    products = [_product(layer, part) for part in parts]
    if any(a.ndim > 2 for a, _ in products):
        raise ValueError(
            f"Layer '{layer}' is a bank of matrices. Of these only SVF, SVFT, "
            "LoRA-XS and MiCA add up."
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
    change = effect_of_product(a, b)
    return _LayerSum(method, arrays, change, size=size, error=error)


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
            else f"what {method.title} adds is not linear in its weights, and "
            "the file alone does not give it as a product of two thin matrices"
        )
        raise ValueError(
            f"{part.file.source} holds {method}, and {why}. Load it and "
            "convert it by `to_lora(model, rank)` first."
        )
    a, b = (ops.convert_to_numpy(x).astype("float64") for x in factors)
    return part.weight * a, b
