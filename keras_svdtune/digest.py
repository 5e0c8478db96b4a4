"""A digest of a text and the arrays that belong to it."""

import hashlib
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
