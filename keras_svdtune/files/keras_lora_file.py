"""Reads a `.lora.h5` that `save_lora_weights` of KerasHub wrote.

Keras' LoRA adds a·b to a kernel, where b (r, last) runs along the last axis of
the kernel and a (..., r) along all others. In a query kernel (in, heads, dim)
each head has its own a and all share b: as a matrix that is

    [a₁·b  a₂·b  ...] = [a₁ a₂ ...]·diag(b, b, ...)

of rank heads·r. The file names a layer by its place among the layers of the
backbone that have weights.
"""

import os

import h5py
import numpy as np

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.files.low_rank_files import LowRankFile, LowRankLayer, thin
from keras_svdtune.hosts.target import Target
from keras_svdtune.model.targets import matrices_in
from keras_svdtune.runtime.keras_internals import layers_as_keras_counts
from keras_svdtune.runtime.types import Model

ENDING = ".lora.h5"


def is_keras_lora(path: object) -> bool:
    """Says whether a path has the ending that KerasHub asks for."""
    return str(path).endswith(ENDING)


def read_keras_lora(path: str | os.PathLike[str], root: Model) -> LowRankFile:
    """Reads a file for the KerasHub backbone `root`.

    Raises a ValueError if it is no such file or is damaged, or if its layers
    are not those of the backbone.
    """
    source = f"'{path}'"
    try:
        with h5py.File(path, "r") as file:
            pairs = {
                int(number): tuple(
                    np.asarray(layer["vars"][x], "float32")
                    for x in ("lora_kernel_a", "lora_kernel_b")
                )
                for number, layer in file["lora"].items()
                if number.isdigit()
            }
    except FileNotFoundError:
        raise ValueError(f"There is no file {source}.") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} is not a file that `save_lora_weights` wrote, or is "
            f"damaged: {error}"
        ) from None
    if not pairs:
        raise ValueError(f"{source} adapts no layer.")
    targets = matrices_in(root, adapted=True).targets
    by_owner = {id(x.owner): p for p, x in targets.items()}
    numbered = [
        x
        for x in layers_as_keras_counts(root)
        if x.weights and not isinstance(x, Adapter)
    ]
    layers = {}
    for number, (a, b) in sorted(pairs.items()):
        layer = numbered[number] if number < len(numbered) else None
        path_here = by_owner.get(id(layer))
        if path_here is None:
            found = "no layer" if layer is None else f"'{layer.path}'"
            raise ValueError(
                f"{source} adapts layer {number}, which is {found} of "
                f"'{root.name}' and cannot be adapted. Load the backbone that "
                "it was saved from."
            )
        layers[path_here] = _layer(path_here, targets[path_here], a, b, source)
    return LowRankFile(source, layers)


def _layer(
    path: str, target: Target, a: np.ndarray, b: np.ndarray, source: str
) -> LowRankLayer:
    """Returns factors of the matrix whose product is that of the kernel's."""
    shape, view = target.view.kernel_shape, target.view
    last = len(shape) - 1
    rank = b.shape[0] if b.ndim == 2 else -1
    if a.shape != (*shape[:-1], rank) or b.shape != (rank, shape[-1]):
        raise ValueError(
            f"{source} was made for another model: its factors of layer "
            f"'{path}' have the shapes {a.shape} and {b.shape}, and the kernel "
            f"is {shape}."
        )
    inner, outer = view.kernel_dims("in"), view.kernel_dims("out")
    if view.count is not None or outer[-1:] != (last,):
        raise ValueError(
            f"{source} adapts layer '{path}', whose kernel {shape} does not "
            "end with an axis of its output."
        )
    heads = outer[:-1]
    count = int(np.prod([shape[i] for i in heads], dtype="int64"))
    # (in, heads, r) -> (in, heads·r); one b for each head.
    whole_a = a.transpose(*inner, *heads, last).reshape(-1, count * rank)
    whole_b = np.kron(np.eye(count, dtype="float32"), b)
    return thin(LowRankLayer(whole_a, whole_b, 1.0))
