"""Packages that only the demo needs, imported when they are used."""

import importlib
from types import ModuleType

INSTALL = 'pip install "keras_svdtune[demo]"'
MODULES = ("arrr", "chatterbot_corpus", "yaml", "gguf", "matplotlib")


def require(module: str) -> ModuleType:
    """Imports `module`, or says how to install it.

    Args:
        module: str, a name to import, such as `"gguf"` or
            `"matplotlib.pyplot"`.

    Returns:
        The module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"The demo needs the Python module '{module}', which could not be "
            f"imported ({error}). Install what the demo needs with: {INSTALL}"
        ) from error
