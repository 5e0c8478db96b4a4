"""A digest of a text and the arrays that belong to it."""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np


def digest_of(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, of a text and of named arrays.

    Args:
        text: str.
        arrays: by name; of each its name, dtype, shape and bytes count.
    """
    digest = hashlib.sha256(text.encode())
    for key, array in sorted(arrays.items()):
        digest.update(f"\n{key} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that `path` holds the old one or the new one."""
    # Not a name that must be new: a process that was killed may have left
    # one, and in a container the next has the same id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
