"""The metadata of an adapter file, which `format.py` describes."""

import keras
import keras_hub

from keras_svdtune.files.format import FORMAT_VERSION
from keras_svdtune.methods.base import Method
from keras_svdtune.runtime.types import Json, Model


def about_of(method: Method, root: Model, layers: Json) -> Json:
    """Returns the metadata of an adapter of a model, but for the digest."""
    return {
        "format_version": FORMAT_VERSION,
        "method": method.name,
        "settings": method.settings(),
        "model_class": type(root).__name__,
        "versions": {
            "keras": keras.version(),
            "keras_hub": keras_hub.__version__,
        },
        "layers": layers,
    }
