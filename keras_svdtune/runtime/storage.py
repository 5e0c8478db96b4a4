"""Digests of arrays, and files that are written whole or not at all."""

import hashlib
import os
import pathlib
import threading
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


def write_atomically(
    path: pathlib.Path, data: bytes, durable: bool = True
) -> None:
    """Writes a file so that `path` holds the old one or the new one.

    Processes and threads may write to one path at once: one of them wins.

    Args:
        path: where to write.
        data: the whole file.
        durable: bool. Whether it is to survive a loss of power.
    """
    # Of this thread alone. A process that was killed may have left the same
    # name, since in a container the next one has the same id.
    name = f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    temporary = path.with_name(name)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
