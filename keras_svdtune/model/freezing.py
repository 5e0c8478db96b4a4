"""What trains: only the adapters, until the model is given back.

`model.trainable = False` will not do. A later `model.trainable = True` would
thaw the base, and a frozen BatchNormalization computes something else. So
each variable is moved, within its layer, from the list of trainables to that
of non-trainables, where the `trainable` setter does not reach it. The order
of `layer.weights`, which weights files rely on, stays the same.
"""

from collections.abc import Callable
from typing import Any

import keras


def freeze(model: keras.Model) -> Callable[[], None]:
    """Freezes every variable of `model`, biases and all.

    Args:
        model: a `keras.Model`. Its own `trainable` is set to True: a frozen
            root would hide the adapters from the optimizer.

    Returns:
        A function that puts everything back as it was.
    """
    was_trainable = model._trainable
    moved: list[tuple[keras.layers.Layer, list[Any]]] = []
    flags: dict[int, tuple[Any, bool]] = {}
    for layer in model._flatten_layers():
        variables = list(layer._trainable_variables)
        for variable in variables:
            flags.setdefault(id(variable), (variable, variable.trainable))
        moved.append((layer, variables))
        freeze_own_variables(layer)
    model._trainable = True

    def restore() -> None:
        model._trainable = was_trainable
        for layer, variables in moved:
            # Of those that it still has: Keras' `quantize` replaces kernels.
            held = {id(v) for v in layer._non_trainable_variables}
            for variable in variables:
                if id(variable) in held:
                    _move(layer, variable, "trainable_variables")
        for variable, trainable in flags.values():
            variable.trainable = trainable

    return restore


def freeze_own_variables(layer: keras.layers.Layer) -> None:
    """Freezes a layer's own variables, not those of its sublayers."""
    for variable in reversed(list(layer._trainable_variables)):
        variable.trainable = False
        _move(layer, variable, "non_trainable_variables")


def _move(layer: keras.layers.Layer, variable: Any, store: str) -> None:
    """Moves a variable to the front (frozen) or the end (trainable)."""
    tracker = layer._tracker
    tracker.untrack(variable)
    variables = tracker.config[store][1]
    position = 0 if store == "non_trainable_variables" else len(variables)
    variables.insert(position, variable)
    tracker.stored_ids[store].add(id(variable))
