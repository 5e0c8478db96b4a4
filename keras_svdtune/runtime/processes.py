"""Shares values among JAX processes; other backends have one process."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import keras
import numpy as np
from keras import ops

from keras_svdtune.runtime.types import Array

T = TypeVar("T")


def to_numpy(x: Array) -> np.ndarray:
    """Returns a whole tensor as an array; all processes call this together."""
    if keras.backend.backend() == "jax":
        import jax

        if (
            isinstance(x, jax.Array)
            and not x.is_fully_addressable
            and not x.is_fully_replicated
        ):
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return ops.convert_to_numpy(x)


def processes() -> tuple[int, int]:
    """Returns (index, count) of this process among those of the program."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def shared(owner: int, make: Callable[[], T]) -> T:
    """Returns, in all processes, what `make` returns in process `owner`.

    An error there is raised everywhere, so that no process waits for one that
    has stopped.

    Args:
        owner: index of a process.
        make: called in that process only. Its result is pickled.
    """
    index, count = processes()
    if count == 1:
        return make()
    outcome, failure = None, None
    if index == owner:
        try:
            outcome = make()
        except Exception as error:
            failure = error
    ours = _pickled(outcome, failure) if index == owner else b""
    length = int(_broadcast(np.array([len(ours)], "int64"), index == owner)[0])
    bytes_ = np.zeros(length, "uint8")
    if index == owner:
        bytes_ = np.frombuffer(ours, "uint8")
    outcome, theirs = pickle.loads(_broadcast(bytes_, index == owner).tobytes())
    if failure is not None:  # the original, with its traceback
        raise failure
    if theirs is not None:
        raise theirs
    return outcome


def _pickled(outcome: object, failure: Exception | None) -> bytes:
    try:
        data = pickle.dumps((outcome, failure))
        pickle.loads(data)  # some errors can be pickled, not unpickled
    except Exception as error:
        cause = failure or error
        text = f"{type(cause).__name__}: {cause}"
        return pickle.dumps((None, RuntimeError(text)))
    return data


def _broadcast(array: np.ndarray, is_source: bool) -> np.ndarray:
    from jax.experimental import multihost_utils

    # As bytes: JAX truncates to 32 bits, and broadcasts by a sum, in which
    # -0.0 becomes 0.0.
    data = np.ascontiguousarray(array).view("uint8")
    data = multihost_utils.broadcast_one_to_all(data, is_source)
    return np.asarray(data).view(array.dtype)
