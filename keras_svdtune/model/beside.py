"""Finds what trains in a model besides its adapters.

The head of a Task does; so does a layer around a backbone, or one that the user
thawed, and the moving statistics of a BatchNormalization that is not frozen.
They are known by `<layer path>/<variable name>`.
"""

import dataclasses

import keras

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.model.state import adapted_part, every_beside
from keras_svdtune.model.targets import layers_by_path, numbered
from keras_svdtune.runtime.keras_internals import layers_in, own_variables
from keras_svdtune.runtime.types import Model, Variable


@dataclasses.dataclass(frozen=True)
class Beside:
    """A variable of a model that belongs to no adapter.

    Attributes:
        variable: the `keras.Variable`.
        inside: bool. Whether it is in the part of the model that is adapted:
            in the backbone of a Task, not in its head.
        trains: bool. Whether training changes it.
    """

    variable: Variable
    inside: bool
    trains: bool


def variables_beside(model: Model) -> dict[str, Beside]:
    """Returns all variables of a model that belong to no adapter, by key."""
    root = adapted_part(model)
    inside = {id(layer) for layer in layers_in(root)}
    trains = {id(x) for x in model.trainable_variables}
    found, seen = [], set()
    for path, layer in layers_by_path(layers_in(model)).items():
        if isinstance(layer, Adapter):
            continue
        moves = (
            isinstance(layer, keras.layers.BatchNormalization)
            and layer.trainable
            and layer.built
        )
        moving = (
            {id(layer.moving_mean), id(layer.moving_variance)}
            if moves
            else set()
        )
        for variable in own_variables(layer):
            if id(variable) not in seen:
                seen.add(id(variable))
                trained = id(variable) in trains | moving
                beside = Beside(variable, id(layer) in inside, trained)
                found.append((f"{path}/{variable.name}", beside))
    by_key = numbered(found, lambda x: x[0])
    return {key: beside for key, (_, beside) in by_key.items()}


def kept_beside(model: Model) -> dict[str, Beside]:
    """Returns what belongs to the adapters besides their layers, by key.

    That is what trains in `model` now, and what is in the `Enabled.beside` of
    any model: what an adapter file has set, though it may not train.
    """
    kept = {id(variable) for _, variable, _ in every_beside()}
    return {
        key: x
        for key, x in variables_beside(model).items()
        if x.trains or id(x.variable) in kept
    }


def trained_beside(model: Model) -> dict[str, Variable]:
    """Returns what trains in a model besides its adapters, by key."""
    return {
        k: x.variable for k, x in variables_beside(model).items() if x.trains
    }
