"""Digests of arrays, and files that are written whole or not at all."""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np


def digest_of(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256, in hexadecimal, of a text and of named arrays.

    Name, dtype, shape and bytes of each array count, but not their order.
    """
    digest = hashlib.sha256(text.encode())
    for key, array in sorted(arrays.items()):
        digest.update(f"\n{key} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that `path` holds the old one or the new one."""
    # The file may exist: a process that was killed may have left it, and in
    # a container the next process has the same id.
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
