"""Freezes all of a model but its adapters, until the model is given back.

`model.trainable = False` will not do: a later `model.trainable = True` would
thaw the base. So each variable moves, within its layer, from the list of
trainables to that of non-trainables, where the `trainable` setter does not
reach it. The order of `layer.weights`, which weights files rely on, stays.

BatchNormalization is frozen too, as Keras' LoRA freezes it: in training it
computes by its moving statistics, which stay. Few small batches make poor
statistics, and an adapter does not hold them. `layer.trainable = True` thaws
one.
"""

from collections.abc import Callable

import keras

from keras_svdtune.hosts.target import Target
from keras_svdtune.runtime.keras_internals import (
    layers_in,
    move_variable,
    own_trainables,
    own_variables,
    set_own_trainable_flag,
)
from keras_svdtune.runtime.types import Layer, Model, Variable


def freeze(model: Model) -> Callable[[], None]:
    """Freezes every variable of `model`, biases and all.

    Args:
        model: a `keras.Model`. Its own `trainable` is set to True: a frozen
            root would hide the adapters from the optimizer.

    Returns:
        A function that puts everything back as it was.
    """
    layers_before: list[tuple[Layer, bool]] = []
    moved: list[tuple[Layer, list[Variable]]] = []
    flags: dict[int, tuple[Variable, bool]] = {}
    for layer in layers_in(model):
        variables = own_trainables(layer)
        for variable in variables:
            flags.setdefault(id(variable), (variable, variable.trainable))
        moved.append((layer, variables))
        freeze_own_variables(layer)
        if isinstance(layer, keras.layers.BatchNormalization):
            before = set_own_trainable_flag(layer, False)
            layers_before.append((layer, before))
    layers_before.append((model, set_own_trainable_flag(model, True)))

    def restore() -> None:
        for layer, flag in layers_before:
            set_own_trainable_flag(layer, flag)
        for layer, variables in moved:
            # Only those it still has: Keras' `quantize` replaces kernels.
            held = {id(v) for v in own_variables(layer)}
            for variable in variables:
                if id(variable) in held:
                    move_variable(layer, variable, trainable=True)
        for variable, trainable in flags.values():
            variable.trainable = trainable

    return restore


def biases_to_train(model: Model, targets: dict[str, Target]) -> list[Variable]:
    """Returns the biases of layers that are to be adapted; none is frozen yet.

    Raises:
        ValueError: no layer has one.
    """
    found: dict[int, Variable] = {}
    for target in targets.values():
        bias = getattr(target.owner, "bias", None)
        # A layer may hold several of the kernels, or `bias` be no variable.
        for variable in own_trainables(target.owner):
            if variable is bias:
                found[id(bias)] = bias
    if not found:
        raise ValueError(
            f"No layer of '{model.name}' that is adapted has a bias. Leave "
            "out `train_bias`."
        )
    return list(found.values())


def freeze_own_variables(layer: Layer) -> None:
    """Freezes a layer's own variables, not those of its sublayers."""
    for variable in reversed(own_trainables(layer)):
        variable.trainable = False
        move_variable(layer, variable, trainable=False)
