"""Keeps decompositions on disk, so that each matrix is decomposed once.

Enabling a model again, by any method that needs the same part of the
decomposition, reads them: a fraction of the time, the same bits. An entry is
one file,

    <folder>/<key>.safetensors

whose key is the SHA-256 of W and of the request. Its metadata repeat the key
and hold a digest of key and arrays, so that a damaged or renamed file is
noticed and written anew. (The digest is no signature: whoever may write to the
folder may change what you compute.) Files are written under a temporary name
and renamed, so processes may share a folder. The least recently used entries
are removed first.

Nothing that goes wrong here is an error: at worst the work is done again.
"""

import contextlib
import os
import pathlib
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import safetensors
import safetensors.numpy

from keras_svdtune.runtime.storage import digest_of, write_atomically

Arrays = dict[str, np.ndarray]

_KEY, _DIGEST = "key", "sha256"
_MAX_BYTES = 4 * 2**30
# The smallest min(in, out) to keep: below, LAPACK is as fast as a file (1 ms).
SMALLEST = 100


def set_decomposition_cache(
    folder: str | os.PathLike[str] | bool = True, max_bytes: int = _MAX_BYTES
) -> None:
    """Sets the folder that keeps decompositions between runs, or none.

    By default it is `keras_svdtune/decompositions` in `$KERAS_HOME`
    (`~/.keras`), up to 4 GiB. The environment variable `KERAS_SVDTUNE_CACHE`
    sets the first `folder`, or `0` for none.

    Args:
        folder: a path; False for none, True for the default folder.
        max_bytes: int, 0 or more. Beyond it the least recently used entries
            are removed.

    Raises:
        ValueError: `max_bytes` is no such integer.

    Example:

    ```python
    keras_svdtune.set_decomposition_cache(False)
    ```
    """
    global _store
    if type(max_bytes) is not int or max_bytes < 0:
        raise ValueError(
            "`max_bytes` must be an integer, 0 or more. "
            f"Received: max_bytes={max_bytes!r}"
        )
    if folder is False:
        _store = None
        return
    if folder is True:
        folder = home_folder() / "decompositions"
    _store = _Store(pathlib.Path(folder).expanduser(), max_bytes)


def home_folder() -> pathlib.Path:
    """Returns this package's folder in `$KERAS_HOME`, or else in `~/.keras`."""
    home = os.environ.get("KERAS_HOME") or "~/.keras"
    return pathlib.Path(home).expanduser() / "keras_svdtune"


def recalled(
    w: np.ndarray,
    request: str,
    compute: Callable[[], Arrays],
    fits: Callable[[Arrays], bool],
) -> Arrays:
    """Returns what `compute` returns, from the cache if it is there.

    Args:
        w: (in, out) float32, finite: the matrix that it is computed from.
        request: str. What is computed, and the version of the algorithm.
        compute: function that does the work.
        fits: function that checks the keys and shapes of cached arrays.
    """
    store = _store
    if store is None or min(w.shape) < SMALLEST:
        return compute()
    key = digest_of(request, {"w": w})
    arrays = store.read(key)
    if arrays is None or not fits(arrays):
        arrays = compute()
        store.write(key, arrays)
    return arrays


class _Store:
    """A folder of entries; `size`, if known, is what they take in bytes."""

    def __init__(self, folder: pathlib.Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self.size: int | None = None
        self._lock = threading.Lock()
        self._warned = False

    def read(self, key: str) -> Arrays | None:
        path = self._path(key)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception:  # not there, or not a whole safetensors file
            return None
        if (about.get(_KEY), about.get(_DIGEST)) != (
            key,
            digest_of(key, arrays),
        ):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used just now
        return arrays

    def write(self, key: str, arrays: Arrays) -> None:
        about = {_KEY: key, _DIGEST: digest_of(key, arrays)}
        data = safetensors.numpy.save(arrays, about)
        if len(data) > self.max_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            write_atomically(self._path(key), data, durable=False)
        except OSError as error:
            self._warn(error)

    def _path(self, key: str) -> pathlib.Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, new: int) -> None:
        """Adds `new` to `size`, and removes entries if that is too much."""
        with self._lock:
            if self.size is None or self.size + new > self.max_bytes:
                # Measured again: other processes write and remove too.
                self.size = self._remove(self.max_bytes - new)
            self.size += new

    def _remove(self, limit: int) -> int:
        """Removes least recently used entries; returns the bytes left."""
        entries, total = [], 0
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # removed by another process
                about = path.stat()
                if path.suffix == ".safetensors":
                    entries.append((about.st_mtime_ns, about.st_size, path))
                    total += about.st_size
                elif (
                    path.suffix == ".tmp"
                    and time.time() - about.st_mtime > 3600
                ):
                    path.unlink()  # left by a process that was killed
        if total > limit:
            limit -= self.max_bytes // 10  # so that the next entries fit
        for _, size, path in sorted(entries):
            if total <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            total -= size
        return total

    def _warn(self, error: OSError) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(
                f"Decompositions cannot be kept in '{self.folder}' ({error}); "
                "they are computed every time. "
                "`keras_svdtune.set_decomposition_cache` takes another folder, "
                "or False.",
                stacklevel=2,
            )


def _initial() -> str | bool:
    value = os.environ.get("KERAS_SVDTUNE_CACHE") or True
    return value != "0" and value


_store: _Store | None = None
set_decomposition_cache(_initial())
