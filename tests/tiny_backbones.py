"""A tiny configuration of every backbone that KerasHub exports.

`TINY` has, by the name of the class, a function that builds the model, with
the random weights of Keras' initializers, and inputs for it as NumPy arrays.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras_hub import models
from tiny_backbones_language import TINY_LANGUAGE
from tiny_backbones_multimodal import TINY_MULTIMODAL
from tiny_backbones_text import TINY_TEXT
from tiny_backbones_vision import TINY_VISION

from keras_svdtune.runtime.keras_internals import value_or_none

ABSTRACT = ("Backbone", "FeaturePyramidBackbone")
# These read the values of an input, and so cannot be compiled: no `predict`.
EAGER_ONLY = ("Qwen3_5Backbone", "Qwen3_5MoeBackbone")


def awake(build: Callable[[], tuple[models.Backbone, Any]]):
    """The model with random weights where zeros would stop all gradients.

    Some matrices start as zeros: those of Gemma 4's experts, the queries of
    BLIP-2, the last layers of D-FINE's heads. So does the vector that scales
    what Gemma 3n's layers read from the inputs for each layer.
    """

    @functools.wraps(build)
    def built():
        model, inputs = build()
        initializer = keras.initializers.RandomNormal(stddev=0.1, seed=0)
        for weight in model.trainable_weights:
            matrix = len(weight.shape) > 1 or "output_scale" in weight.path
            if value_or_none(weight) is None:
                continue  # built without values
            if matrix and not keras.ops.convert_to_numpy(weight).any():
                weight.assign(initializer(weight.shape, weight.dtype))
        return model, inputs

    return built


TINY: dict[str, Callable[[], tuple[models.Backbone, Any]]] = {
    name: awake(build)
    for name, build in sorted(
        (TINY_TEXT | TINY_VISION | TINY_LANGUAGE | TINY_MULTIMODAL).items()
    )
}


def exported() -> dict[str, type]:
    """The backbones of KerasHub by name; a class may have two names."""
    classes = {name: getattr(models, name) for name in dir(models)}
    return {
        name: cls
        for name, cls in classes.items()
        if isinstance(cls, type)
        and issubclass(cls, models.Backbone)
        and name not in ABSTRACT
    }


def missing() -> list[str]:
    """The exported backbones for which there is no tiny configuration."""
    return sorted(exported().keys() - TINY.keys())
