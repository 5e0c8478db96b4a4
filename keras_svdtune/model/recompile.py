"""Drops functions that were compiled before the model changed.

After a layer has changed its class and the model its trainables, a compiled
`fit` would train detached variables (TensorFlow) or fail in mid-step, when
Keras on JAX has already given up the weights. And a KerasHub Backbone does not
know the Task around it. So every live model that holds a changed layer is
found, and its compiled functions are dropped.
"""

import gc
from collections.abc import Callable, Iterable

import keras

from keras_svdtune.runtime.keras_internals import (
    COMPILED_FUNCTIONS,
    copy_decay_exclusions,
    layers_in,
    optimizer_config,
)
from keras_svdtune.runtime.placement import place_like, undistributed
from keras_svdtune.runtime.types import Layer, Model, Optimizer


def prepare_reset(layers: Iterable[Layer]) -> Callable[[], None]:
    """Finds every live model that holds one of `layers`, to recompile it.

    Call this before the layers change, since it may raise: an optimizer that
    has seen other trainables is replaced by a fresh one with the same settings,
    so that `fit` works without another `compile`.

    Returns:
        A function that makes those models compile anew. It does not fail.

    Raises:
        ValueError: an optimizer cannot be made again from its config.
    """
    changed = {id(layer) for layer in layers}
    found: list[tuple[Model, Optimizer | None]] = []
    for model in _live_models():
        try:
            inside = layers_in(model)
        except AttributeError:
            # Its constructor raised, or has not reached `Layer.__init__` yet:
            # it holds no layers and has compiled nothing.
            continue
        if not any(id(layer) in changed for layer in inside):
            continue
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and optimizer.built:
            found.append((model, _fresh(optimizer, model)))
        else:
            found.append((model, None))

    def reset() -> None:
        for model, optimizer in found:
            for name in COMPILED_FUNCTIONS:
                if getattr(model, name, None) is not None:
                    setattr(model, name, None)
            if optimizer is not None:
                model.optimizer = optimizer

    return reset


def _fresh(optimizer: Optimizer, model: Model) -> Optimizer:
    """Returns an optimizer with the same settings that is not built."""
    try:
        with undistributed():
            fresh = _again(optimizer)
    except Exception as error:
        raise ValueError(
            f"Model '{model.name}' is compiled with {optimizer!r}, which must "
            "be made anew for other trainables, and its config does not allow "
            f"it ({type(error).__name__}: {error}). Mend its `get_config`, or "
            "compile the model with another optimizer first. The model is as "
            "it was."
        ) from error
    # Its counters go to the devices of the old ones, whatever
    # `keras.distribution` is in effect now.
    for ours, theirs in zip(fresh.variables, optimizer.variables, strict=False):
        place_like(ours, theirs)
    return fresh


def _again(optimizer: Optimizer) -> Optimizer:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return type(optimizer)(
            _again(optimizer.inner_optimizer),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    fresh = type(optimizer).from_config(optimizer_config(optimizer))
    copy_decay_exclusions(optimizer, fresh)
    return fresh


def _live_models() -> list[Model]:
    # type() and not isinstance(): the latter asks an object for __class__,
    # and a lazy proxy among all live objects would import its module. There
    # are far fewer types than objects.
    objects = gc.get_objects()
    models = {x for x in set(map(type, objects)) if issubclass(x, keras.Model)}
    return [x for x in objects if type(x) in models]
