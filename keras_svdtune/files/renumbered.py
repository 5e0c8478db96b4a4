"""Finds the layers of a model or a file that Keras has numbered otherwise.

Keras numbers layers without a name in the order in which a process makes them:
`conv2d_8` is `conv2d_21` in the second model. Such paths are equal without
their numbers.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np

from keras_svdtune.adapter.fingerprint import which_match

# The numbers that Keras appends to layer names, and ours to equal paths.
_NUMBER = re.compile(r"_\d+(?=[/#]|$)|#\d+(?=/|$)")


def stem_of(path: str) -> str:
    """Returns a path, or a key below it, without the numbers in it."""
    return _NUMBER.sub("", path)


class Kernels:
    """The layers of a model or a file, to be found by their kernels.

    Paths that are equal without their numbers are told apart by the shape and
    the fingerprint of the kernel.

    Args:
        layers: path, kernel shape and dtype of each.
        fingerprint_of: function from a path to the kernel's fingerprint. It is
            called for those layers alone that may be a wanted one.
    """

    def __init__(
        self,
        layers: Iterable[tuple[str, tuple[int, ...], str]],
        fingerprint_of: Callable[[str], np.ndarray],
    ):
        self._groups: dict[tuple[str, tuple[int, ...]], dict[str, str]] = {}
        for path, shape, dtype in layers:
            self._groups.setdefault((stem_of(path), shape), {})[path] = dtype
        self._fingerprint_of = fingerprint_of
        self._fingerprints: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def like(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: str,
        fingerprint: np.ndarray,
    ) -> list[str]:
        """Returns the paths of all layers that may be this one."""
        key = stem_of(path), shape
        group = self._groups.get(key)
        if group is None:
            return []
        if key not in self._fingerprints:
            self._fingerprints[key] = np.stack(
                [self._fingerprint_of(other) for other in group]
            )
        dtypes = {dtype, *group.values()}
        found = which_match(self._fingerprints[key], fingerprint, *dtypes)
        return [path for path, same in zip(group, found, strict=True) if same]


def listed(paths: list[str]) -> str:
    """Returns the first of these paths, in words."""
    return " and ".join(f"'{path}'" for path in paths[:3])
