"""Compares paths of layers without the numbers that Keras appends.

Keras numbers layers without a name in the order in which a process makes them:
`conv2d_8` is `conv2d_21` in the second model.
"""

import re

# The numbers that Keras appends to layer names, and ours to equal paths.
_NUMBER = re.compile(r"_\d+(?=[/#]|$)|#\d+(?=/|$)")


def without_numbers(path: str) -> str:
    """Returns a path, or a key below it, without such numbers."""
    return _NUMBER.sub("", path)
