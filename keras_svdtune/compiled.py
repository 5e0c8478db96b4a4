"""Functions that were compiled before the model changed.

After a layer has changed its class and the model its trainables, a compiled
`fit` would train detached variables (TensorFlow) or fail in mid-step, when
Keras on JAX has already given up the weights. And a KerasHub Backbone does
not know the Task around it. So every live model that holds one of the changed
layers is found, and whatever it compiled is dropped.
"""

import gc
from collections.abc import Iterable

import keras

from keras_svdtune.devices import follow, undistributed


def reset_compiled(layers: Iterable[keras.layers.Layer]) -> None:
    """Makes every live model that holds one of `layers` compile anew.

    An optimizer that has seen other trainables is replaced by a fresh one
    with the same settings; `fit` then works without another `compile`.
    """
    changed = {id(layer) for layer in layers}
    for model in _live_models():
        try:
            layers = list(model._flatten_layers())
        except AttributeError:
            # Its constructor raised, or has not come to Layer's yet: it holds
            # no layers and has compiled nothing.
            continue
        if not any(id(layer) in changed for layer in layers):
            continue
        for name in (
            "train_function",
            "test_function",
            "predict_function",
            "generate_function",
        ):
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and optimizer.built:
            with undistributed():
                fresh = type(optimizer).from_config(optimizer.get_config())
            # Its counters go where the old ones are, whatever
            # `keras.distribution` is in effect now.
            for ours, theirs in zip(
                fresh.variables, optimizer.variables, strict=False
            ):
                follow(ours, theirs)
            model.optimizer = fresh


def _live_models() -> list[keras.Model]:
    # type() and not isinstance(): the latter asks an object for __class__,
    # and a lazy proxy among all live objects would import its module.
    return [x for x in gc.get_objects() if issubclass(type(x), keras.Model)]
