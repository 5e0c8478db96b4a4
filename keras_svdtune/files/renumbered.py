"""The layers of an adapter file that have another number here.

Keras numbers what has no name of its own by the order in which a process makes
it: `conv2d_8` is `conv2d_21` in the second model. Such paths are equal without
their numbers; which of the layers it is, the fingerprint of its kernel tells.
"""

import re
from collections.abc import Callable
from typing import Any

from keras_svdtune.adapter.fingerprint import matches
from keras_svdtune.files.format import FINGERPRINTS, SavedAdapter

_NUMBER = re.compile(r"_\d+(?=[/#]|$)|#\d+$")


def renumbered(
    adapter: SavedAdapter,
    row: int,
    ours: dict[str, Any],
    describe: Callable[[Any], tuple[tuple[int, ...], Any, str]],
) -> Any | None:
    """The layer of this model that is the `row`-th one of a file.

    Args:
        adapter: the file.
        row: which of its layers.
        ours: the model's layers by path.
        describe: function from a layer to the shape of its kernel (empty
            where it has none), a function that gives its fingerprint, and
            its dtype.

    Returns:
        The only layer with such a path, shape and kernel; None if there is
        none, or more than one.
    """
    path, entry = list(adapter.about["layers"].items())[row]
    theirs = adapter.arrays[FINGERPRINTS][row]
    stem = _NUMBER.sub("", path)
    found = []
    for other, layer in ours.items():
        if _NUMBER.sub("", other) != stem:
            continue
        shape, fingerprint, dtype = describe(layer)
        if shape == tuple(entry["kernel_shape"]) and matches(
            fingerprint(), theirs, entry["dtype"], dtype
        ):
            found.append(layer)
    return found[0] if len(found) == 1 else None
