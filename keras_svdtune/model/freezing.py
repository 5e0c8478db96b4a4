"""Freezes all of a model but its adapters, until the model is given back.

`model.trainable = False` will not do: a later `model.trainable = True` would
thaw the base. Two things keep it frozen.

A layer that holds an adapter never trains anything else: its own variables
move, within the layer, from the list of trainables to that of non-trainables,
where the `trainable` setter does not reach them. The order of `layer.weights`,
which weights files rely on, stays.

Any other layer is thawed by `layer.trainable = True`, such as a new head. But
the same of the whole model, or of one around it, gives back what trained before
and thaws nothing.

BatchNormalization is frozen too, as Keras' LoRA freezes it: in training it
computes by its moving statistics, which stay. Few small batches make poor
statistics, and an adapter does not hold them.
"""

import functools
from collections.abc import Callable, Iterable

import keras

from keras_svdtune.hosts.target import Target
from keras_svdtune.runtime.keras_internals import (
    forget_trainable_was_set,
    layers_in,
    let_trainable_be_set,
    move_variable,
    own_trainables,
    own_variables,
    set_own_trainable_flag,
)
from keras_svdtune.runtime.types import Layer, Model, Variable

# It is kept on the model itself, as its layers may refer to the model.
_FROZEN = "_svdtune_frozen"


class _Frozen:
    """The layers of a model that can be thawed, and those that were."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._layers: list[Layer] = []
        self._thawed: set[int] = set()

    def freeze(self, layer: Layer) -> None:
        """Freezes a layer's own variables, and how it normalizes a batch."""
        self._layers.append(layer)
        _thaw(layer, set())

    def thawed(self) -> set[int]:
        """Returns the ids of what trains, or did until all was frozen."""
        for layer in self._layers:
            trained = [x for x in own_trainables(layer) if x.trainable]
            if _normalizes(layer) and layer.trainable:
                trained.append(layer)
            self._thawed.update(id(x) for x in trained)
        return set(self._thawed)

    def thaw(self, thawed: set[int]) -> None:
        """Lets train what has these ids, and nothing else."""
        for layer in self._layers:
            _thaw(layer, thawed)
        set_own_trainable_flag(self._model, True)
        self._thawed.clear()


def _thaw(layer: Layer, thawed: set[int]) -> None:
    variables = own_trainables(layer)
    for variable in variables:
        variable.trainable = id(variable) in thawed
    if _normalizes(layer):
        set_own_trainable_flag(layer, id(layer) in thawed)
    elif variables and thawed.isdisjoint(id(x) for x in variables):
        let_trainable_be_set(layer)


def _normalizes(layer: Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def freeze(model: Model, owners: Iterable[Layer]) -> Callable[[], None]:
    """Freezes every variable of `model`, biases and all.

    Args:
        model: a `keras.Model`. Its own `trainable` is set to True: a frozen
            root would hide the adapters from the optimizer.
        owners: the layers that are to hold adapters.

    Returns:
        A function that puts everything back as it was.
    """
    flags_before: list[tuple[Layer, bool]] = []
    moved: list[tuple[Layer, list[Variable]]] = []
    trainable: dict[int, tuple[Variable, bool]] = {}
    adapted = {id(x) for owner in owners for x in own_variables(owner)}
    frozen = _Frozen(model)
    for layer in layers_in(model):
        variables = own_trainables(layer)
        for variable in variables:
            trainable.setdefault(id(variable), (variable, variable.trainable))
        flags_before.append((layer, layer.trainable))
        # A kernel may belong to a layer that is not adapted, too.
        if adapted.isdisjoint(id(x) for x in variables):
            frozen.freeze(layer)
        else:
            moved.append((layer, variables))
            freeze_own_variables(layer)
    set_own_trainable_flag(model, True)
    model.__dict__[_FROZEN] = frozen

    def restore() -> None:
        model.__dict__.pop(_FROZEN, None)
        for layer, flag in flags_before:
            set_own_trainable_flag(layer, flag)
            forget_trainable_was_set(layer)
        for layer, variables in moved:
            # Only those it still has: Keras' `quantize` replaces kernels.
            held = {id(v) for v in own_variables(layer)}
            for variable in variables:
                if id(variable) in held:
                    move_variable(layer, variable, trainable=True)
        for variable, flag in trainable.values():
            variable.trainable = flag

    return restore


@functools.cache
def guard_trainable() -> None:
    """Lets `model.trainable = True` thaw nothing of an adapted model."""
    plain = keras.Model.trainable

    def setter(model: Model, value: bool) -> None:
        try:
            layers = layers_in(model)
        except AttributeError:
            layers = []  # its constructor has not come to its layers yet
        frozen = [x.__dict__[_FROZEN] for x in layers if _FROZEN in x.__dict__]
        # Of each its own copy: a model inside this one clears what is noted.
        before = [each.thawed() for each in frozen]
        plain.fset(model, value)
        if value:
            for each, thawed in zip(frozen, before, strict=True):
                each.thaw(thawed)

    keras.Model.trainable = plain.setter(setter)


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
