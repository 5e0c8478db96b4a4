"""Several processes of one program, as JAX has them. Elsewhere there is one."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import keras
import numpy as np
from keras import ops

from keras_svdtune.runtime.types import Array

T = TypeVar("T")


def to_numpy(x: Array) -> np.ndarray:
    """A tensor as an array, whole; all processes call this together."""
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
    """(index, count) of this process among those of one program."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def shared(owner: int, make: Callable[[], T]) -> T:
    """What `make` returns in process `owner`, in all of them.

    An error there is raised everywhere, so that no process waits for one that
    has stopped.

    Args:
        owner: index of a process.
        make: called in that process only. What it returns is pickled.

    Raises:
        Whatever `make` raises.
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
    if failure is not None:  # the very one, with its traceback
        raise failure
    if theirs is not None:
        raise theirs
    return outcome


def _pickled(outcome: object, failure: Exception | None) -> bytes:
    try:
        data = pickle.dumps((outcome, failure))
        pickle.loads(data)  # some errors are pickled but do not come back
    except Exception as error:
        cause = failure or error
        text = f"{type(cause).__name__}: {cause}"
        return pickle.dumps((None, RuntimeError(text)))
    return data


def _broadcast(array: np.ndarray, is_source: bool) -> np.ndarray:
    from jax.experimental import multihost_utils

    # As bytes: JAX has 32-bit integers, and sums floats (-0.0 would be 0.0).
    data = np.ascontiguousarray(array).view("uint8")
    data = multihost_utils.broadcast_one_to_all(data, is_source)
    return np.asarray(data).view(array.dtype)
