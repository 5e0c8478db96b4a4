"""Adapter files: one `.safetensors` file of kilobytes.

The file holds one array for each trainable weight, under the key
`<layer path>/<method>_<weight>`, e.g.
`decoder_block_0/attention/query/svf_delta`; and two arrays with a row for
each layer, in the order of the metadata: `base_fingerprints` identifies the
base kernels, `effects` what the adapter does to them
(`adapter/fingerprint.py`). The metadata is one JSON text under `keras_svdtune`:

    {"format_version": 1, "method": "svf", "settings": {},
     "model_class": "Gemma3Backbone",
     "versions": {"keras": "3.15.1", "keras_hub": "0.32.0"},
     "layers": {"decoder_block_0/attention/query":
                {"kernel_shape": [4, 640, 256], "dtype": "float32",
                 "basis": "bfloat16"}, ...},
     "sha256": "..."}

A layer's entry has `"basis": "bfloat16"` if the frozen weights that the file
does not hold are computed from the kernel rounded to bfloat16. Without it, as
in files of release 0.1, they are computed from the kernel as it is.

The digest is of all arrays and of that text without the digest. A layer's entry
has `settings` of its own where they were decided for it. The file also holds
frozen weights that cannot be computed again, or were asked for; and what
trained besides the adapters, such as the head of a Task, under
`<layer path>/<variable>`: `beside` has these keys (`beside.py`).
"""

import dataclasses
import json
import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from keras_svdtune.files import hub_client
from keras_svdtune.runtime.storage import digest_of, write_atomically
from keras_svdtune.runtime.types import Json

FORMAT_VERSION = 1
FINGERPRINTS, EFFECTS = "base_fingerprints", "effects"
BESIDE, STATISTICS = "beside", "statistics"
BASIS, ROUNDED = "basis", "bfloat16"
_KEY, _DIGEST = "keras_svdtune", "sha256"
# A safetensors file begins with the length of its header in bytes. An adapter
# of a thousand layers has a quarter of a megabyte; one of a million would take
# a minute to look through.
_LENGTH, _LONGEST_HEADER = 8, 2**23


@dataclasses.dataclass
class SavedAdapter:
    """The contents of an adapter file; `load_adapter` takes it like a path.

    Attributes:
        about: dict, the metadata.
        arrays: dict from key to NumPy array.
        source: str, the name of the file in errors.
    """

    about: Json
    arrays: dict[str, np.ndarray]
    source: str

    @property
    def beside(self) -> list[str]:
        """Keys of what the file holds besides the adapters."""
        old: list[str] = self.about.get(STATISTICS, [])
        return [*self.about.get(BESIDE, {}), *old]

    def rounds(self, layer: str) -> bool:
        """Returns whether a layer's basis is that of its kernel rounded."""
        return BASIS in self.about["layers"][layer]

    def __repr__(self) -> str:
        return (
            f"<SavedAdapter {self.source}: {self.about['method']} on "
            f"{len(self.about['layers'])} layers of a "
            f"{self.about.get('model_class')}>"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the adapter to a file, as `save_adapter` does.

        Raises:
            ValueError: `path` does not end in `.safetensors`.
        """
        path = checked_path(path)
        digest = digest_of(_text(self.about), self.arrays)
        metadata = {_KEY: _text({**self.about, _DIGEST: digest})}
        data = safetensors.numpy.save(self.arrays, metadata)
        _check_header(data[:_LENGTH], self.source)
        write_atomically(path, data)


def read_adapter(
    path: str | os.PathLike[str], source: str | None = None
) -> SavedAdapter:
    """Reads an adapter file, from a hub if `path` is a URI.

    Errors call it `source`. Raises a ValueError if the file is no adapter file,
    is damaged, has another format, or could not be fetched.
    """
    source = source or f"'{path}'"
    path = checked_path(
        hub_client.fetch(str(path)) if hub_client.is_uri(path) else path
    )
    try:
        with open(path, "rb") as start:
            length = start.read(_LENGTH)
    except FileNotFoundError:
        raise ValueError(f"There is no file {source}.") from None
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error}") from None
    _check_header(length, source)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(
            f"{source} is not a safetensors file, or is damaged: {error}"
        ) from None
    try:
        about = json.loads(metadata[_KEY])
        version = about["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(
            f"{source} is a safetensors file, but not an adapter that "
            f"`save_adapter` wrote: its metadata has no valid '{_KEY}'. Of an "
            "adapter of PEFT's, give the folder."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{source} has format version {version}; this release reads "
            f"version {FORMAT_VERSION}. Update keras_svdtune."
        )
    if about.pop(_DIGEST, None) != digest_of(_text(about), arrays):
        raise ValueError(
            f"{source} is damaged, or was changed after it was written: its "
            f"contents do not agree with its '{_DIGEST}'."
        )
    _check_about(about, arrays, source)
    return SavedAdapter(about, arrays, source)


def _check_header(length: bytes, source: str) -> None:
    """Raises a ValueError if a file's header is longer than any adapter's."""
    found = int.from_bytes(length, "little")
    if found > _LONGEST_HEADER:
        raise ValueError(
            f"{source} has a header of {found:,} bytes, or is damaged. An "
            f"adapter's has at most {_LONGEST_HEADER:,}, enough for ten "
            "thousands of layers."
        )


def _check_about(
    about: Json, arrays: dict[str, np.ndarray], source: str
) -> None:
    expected = {"method": str, "settings": dict, "layers": dict}
    for key, kind in expected.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"The metadata of {source} has no valid '{key}'.")
    beside, statistics = about.get(BESIDE, {}), about.get(STATISTICS, [])
    if (
        not isinstance(beside, dict)
        or not isinstance(statistics, list)
        or not all(isinstance(x, str) and x in arrays for x in statistics)
        or not all(_is_beside(x) for x in beside.values())
        or not set(beside) <= set(arrays)
    ):
        raise ValueError(
            f"The metadata of {source} has no valid '{BESIDE}' or "
            f"'{STATISTICS}': {beside!r}, {statistics!r}"
        )
    for layer_path, entry in about["layers"].items():
        if (
            not isinstance(entry, dict)
            or not isinstance(shape := entry.get("kernel_shape"), list)
            or not all(isinstance(n, int) for n in shape)
            or not isinstance(entry.get("dtype"), str)
            or not isinstance(entry.get("settings", {}), dict)
            or entry.get(BASIS, ROUNDED) != ROUNDED
        ):
            raise ValueError(
                f"The metadata of {source} has no valid entry for layer "
                f"'{layer_path}': {entry!r}"
            )


def _is_beside(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("inside"), bool)
        and isinstance(entry.get("index"), int)
        and isinstance(entry.get("count"), int)
        and 0 <= entry["index"] < entry["count"]
    )


def _text(about: Json) -> str:
    return json.dumps(about, separators=(",", ":"))


def checked_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns `path`; raises a ValueError if it cannot name an adapter file."""
    if hub_client.is_uri(path):
        raise ValueError(
            "A file is saved here; `push_adapter` uploads one to a hub. "
            f"Received: path='{path}'"
        )
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"An adapter file ends in '.safetensors'. Received: path='{path}'"
        )
    return path
