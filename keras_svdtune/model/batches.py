"""Reads a few batches of data in the forms that `fit` takes."""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_svdtune.runtime.types import Model

# Rows of a batch that is cut from arrays.
_ROWS = 8


class Batch(NamedTuple):
    """One batch, preprocessed: nested arrays, or None."""

    x: Any
    y: Any
    sample_weight: Any


def read_batches(model: Model, data: Any, examples: int) -> list[Batch]:
    """Returns the first batches of `data`, as `model.fit` would have them.

    Args:
        model: a Task, whose preprocessor makes its inputs of texts, say; or
            any other model.
        data: arrays, or nested ones, with one row for each example; a list of
            texts; a tuple `(x, y)` or `(x, y, sample_weight)` of these; or an
            iterable of batches: a `tf.data.Dataset`, a `PyDataset`, a
            `DataLoader`, a generator.
        examples: int. So many rows are read, or the batches that have as many.

    Raises:
        ValueError: `data` is none of these, is empty or does not fit the model.
    """
    found: list[Batch] = []
    rows = 0
    for raw in _raw_batches(data, examples):
        # A list is x: texts, or the arrays of a model with several inputs.
        parts = raw if isinstance(raw, tuple) else (raw,)
        parts = keras.utils.unpack_x_y_sample_weight(parts)
        count = _rows_of(parts[0], data)
        found.append(_preprocessed(model, parts))
        rows += count
        if rows >= examples:
            break
    if not rows:
        raise ValueError("`data` must hold an example. Received none.")
    return found


def _raw_batches(data: Any, examples: int) -> Iterator[Any]:
    if isinstance(data, keras.utils.PyDataset):
        count = data.num_batches
        index = 0
        while count is None or index < count:
            yield _with_tuples(data[index])
            index += 1
    elif _is_loader(data):
        yield from map(_with_tuples, data)
    elif isinstance(data, (list, tuple, dict)) or hasattr(data, "shape"):
        count = min(_rows_of(data, data), examples)
        for first in range(0, count, _ROWS):
            part = slice(first, min(first + _ROWS, count))
            yield _map(operator.itemgetter(part), data)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        yield from data
    else:
        raise ValueError(
            "`data` must be what `fit` takes: a list of texts, arrays, a tuple "
            "`(x, y)`, or an iterable of batches such as a `tf.data.Dataset`. "
            f"Received: data={str(data)[:100]!r}"
        )


def _is_loader(data: Any) -> bool:
    """Says whether this is a DataLoader of torch, or a dataset of Grain."""
    return any(
        cls.__name__ in ("DataLoader", "MapDataset", "IterDataset")
        and cls.__module__.startswith(("torch.", "grain."))
        for cls in type(data).__mro__
    )


def _with_tuples(batch: Any) -> Any:
    """Returns a batch with a tuple for the list that `fit` takes for one.

    But texts, or numbers, are in a list, also where a DataLoader has put those
    of its examples into a tuple.
    """
    if isinstance(batch, (list, tuple)) and not _are_values(batch):
        return tuple(
            list(x) if isinstance(x, tuple) and _are_values(x) else x
            for x in batch
        )
    return batch


def _are_values(x: list[Any] | tuple[Any, ...]) -> bool:
    """Says whether these are texts or numbers, one for each example."""
    kinds = (str, bytes, int, float, np.generic)
    return bool(x) and all(isinstance(v, kinds) for v in x)


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """Applies a function to each array, or list of texts or numbers, in x."""
    if isinstance(x, dict):
        return {k: _map(function, v) for k, v in x.items()}
    arrays = isinstance(x, list) and all(getattr(v, "ndim", 0) for v in x)
    if isinstance(x, tuple) or (arrays and x):
        return type(x)(_map(function, v) for v in x)
    return x if x is None else function(x)


def _rows_of(x: Any, data: Any) -> int:
    counts: list[int] = []

    def count(leaf: Any) -> None:
        shape = getattr(leaf, "shape", None)
        if shape is not None and len(shape) == 0 or isinstance(leaf, str):
            raise ValueError(
                "`data` must have a first axis for the examples: put a single "
                "one into a list, and batch a dataset. Received: "
                f"data={str(data)[:100]!r}"
            )
        counts.append(len(leaf) if shape is None else int(shape[0]))

    _map(count, x)
    if len(set(counts)) > 1:
        raise ValueError(
            f"All arrays of `data` must have as many rows. Received: {counts}"
        )
    return counts[0] if counts else 0


def _preprocessed(model: Model, parts: tuple[Any, Any, Any]) -> Batch:
    if isinstance(model, keras_hub.models.Task):
        parts = keras.utils.unpack_x_y_sample_weight(
            model.preprocess_samples(*parts)
        )
    batch = Batch(*(_map(_to_array, x) for x in parts))
    if any(x.dtype.kind in "OSU" for x in keras.tree.flatten(batch.x)):
        raise ValueError(
            f"'{model.name}' takes no text. Call this on the Task, whose "
            "preprocessor makes tokens of it, `task.enable_eva(...)`, and not "
            "on its backbone; or give what the preprocessor returns."
        )
    return batch


def _to_array(x: Any) -> np.ndarray:
    found = ops.convert_to_numpy(x) if ops.is_tensor(x) else np.asarray(x)
    # As JAX has them; float64 would not meet a float32 model elsewhere.
    narrower = {"float64": "float32", "int64": "int32"}.get(found.dtype.name)
    return found if narrower is None else found.astype(narrower)
