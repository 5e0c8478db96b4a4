"""Sums the adapters of several files for one layer: ΔW = Σ weight·ΔW_i."""

import dataclasses
import math
import os

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import effect_of_product
from keras_svdtune.files.compatibility import array_key, methods_of
from keras_svdtune.files.format import EFFECTS, read_adapter
from keras_svdtune.matrix.decompose import top_on_host
from keras_svdtune.methods.base import Method, WeightValues
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.runtime.types import Json


class Part:
    """One adapter file, its weight in the sum, and its layers' methods."""

    def __init__(self, path: str | os.PathLike[str], weight: object):
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
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
class Sum:
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


def add(layer: str, parts: list[Part]) -> Sum:
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
    return Sum(method, total, np.sum(effects, axis=0))


def concatenate(layer: str, parts: list[Part], rank: int | None) -> Sum:
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
    if rank is not None and (type(rank) is not int or not 1 <= rank <= n):
        raise ValueError(
            f"`rank` must be an integer from 1 to {n}, or None, for layer "
            f"'{layer}'. Received: rank={rank!r}"
        )
    size, error = _norm_of_product(a, b), 0.0
    if a.shape[1] > (rank or n):
        change = a @ b
        top = top_on_host(change, rank or n)
        assert top.u is not None and top.v is not None
        a, b = top.u * np.sqrt(top.s), np.sqrt(top.s)[:, None] * top.v.T
        error = float(np.linalg.norm(change - a.astype("float64") @ b))
    elif a.shape[1] == 0:  # AdaLoRA may leave a layer nothing
        a, b = np.zeros((len(a), 1)), np.zeros((1, b.shape[1]))
    arrays = {"a": a.astype("float32"), "b": b.astype("float32")}
    method = LoRA(rank=a.shape[1])
    return Sum(method, arrays, effect_of_product(a, b), size, error)


def _norm_of_product(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the Frobenius norm ‖a·b‖ without the product."""
    return float(np.sqrt(max(np.vdot(a.T @ a, b @ b.T), 0.0)))


def _product(layer: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
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
