"""Warns of a learning rate at which an adapter learns nothing."""

import warnings
import weakref

import keras

from keras_svdtune.model.targets import adapted_targets
from keras_svdtune.runtime.keras_internals import constant_rate
from keras_svdtune.runtime.types import Model

# A rate below this share of what a method suggests is too small for any task.
_SHARE = 1 / 30
_WARNED: weakref.WeakSet[Model] = weakref.WeakSet()


def warn_of_rate(model: Model) -> None:
    """Warns once for each model whose Adam has far too small a rate.

    KerasHub's default `compile()` of a causal language model has one: 2e-5,
    for training all weights. Rates of a schedule are not looked at, nor those
    of other optimizers, which mean something else.
    """
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, keras.optimizers.Adam) or model in _WARNED:
        return
    targets = adapted_targets(model)
    rate = constant_rate(optimizer)
    if not targets or not rate:
        return
    method = next(iter(targets.values())).adapted.method
    suggested = method.suggested_learning_rate
    if rate >= suggested * _SHARE:
        return
    _WARNED.add(model)
    warnings.warn(
        f"'{model.name}' trains with a learning rate of {rate:g}, at which "
        f"{method.title} learns next to nothing. Adapters want far larger "
        f"rates than all weights do: start from {suggested:g}, as in "
        f"`compile(optimizer=keras.optimizers.Adam({suggested:g}), ...)`.",
        stacklevel=4,
    )
