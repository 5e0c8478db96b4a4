"""Brings models up to date after some of their layers changed.

After a layer has changed its class and a model its trainables, a `fit` that was
compiled before would train detached variables (TensorFlow) or fail in mid-step,
when Keras on JAX has already given up the weights. An optimizer knows other
variables, and on torch `model.parameters()` lists them.

A layer does not know the models that hold it: a KerasHub Backbone does not know
the Task around it. So a change is only noted, and a model compares notes when
it is used next: when one of the attributes below is read, or one of torch's
methods called.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_svdtune.runtime.keras_internals import (
    COMPILED_FUNCTIONS,
    built_for,
    forget_trainables,
    keep_values,
    layers_in,
    track_parameters,
)
from keras_svdtune.runtime.types import Layer, Model

_STEPS = ("train_function", "test_function", "predict_function")
_TORCH_METHODS = ("named_parameters", "state_dict", "load_state_dict", "export")

_ticks = itertools.count(1)
_now = 0
# The change that a layer has seen last, by number.
_CHANGED: weakref.WeakKeyDictionary[Layer, int] = weakref.WeakKeyDictionary()
# The number of a change that will be undone, by its kind and the number of the
# change before; 0 is none.
_FOR_A_WHILE: dict[tuple[str, int], int] = {}
# Those of which nothing that is compiled meanwhile can be used again.
_ONCE: set[int] = set()
# Those during which a model must not be trained.
_NO_TRAINING: set[int] = set()


class _Known:
    """What is known of one model: when it was looked at, and its functions."""

    def __init__(self) -> None:
        self.looked_at = 0
        self.changes: frozenset[int] = frozenset()
        # Compiled functions, by the changes of the layers that they are for.
        self.aside: dict[frozenset[int], dict[str, Any]] = {}


# It is kept on the model itself: functions refer to their model, so a dict from
# here would keep every model alive for ever.
_KNOWN = "_svdtune_known"


def note_change(layers: Iterable[Layer]) -> None:
    """Notes that layers have changed, for all models that hold them."""
    global _now
    _now = next(_ticks)
    for layer in layers:
        _CHANGED[layer] = _now


def note_change_for_a_while(
    layers: Iterable[Layer],
    kind: str,
    again: bool = True,
    training: bool = True,
) -> Callable[[], None]:
    """Notes a change that will be undone; returns how to note that.

    What models had compiled is used again then.

    Args:
        kind: what kind of change it is.
        again: whether what they compile meanwhile can be used at the next
            change of this kind.
        training: whether they may be trained meanwhile.
    """
    global _now
    before = {layer: _CHANGED.get(layer) for layer in layers}
    _now = next(_ticks)
    if not again:
        _ONCE.add(_now)
        kind = f"{kind} {_now}"
    for layer, change in before.items():
        number = _FOR_A_WHILE.setdefault((kind, change or 0), _now)
        _CHANGED[layer] = number
        if not training:
            _NO_TRAINING.add(number)

    def undone() -> None:
        global _now
        for layer, change in before.items():
            if change is None:  # a declared layer
                _CHANGED.pop(layer, None)
            else:
                _CHANGED[layer] = change
        _now = next(_ticks)

    return undone


def bring_up_to_date(model: Model) -> None:
    """Makes a model ready for use, if one of its layers has changed.

    What it compiled is dropped. Its optimizer stays the same object, and
    forgets the variables that it was built for if they are not the model's
    trainables any more.
    """
    known = model.__dict__.setdefault(_KNOWN, _Known())
    if known.looked_at == _now:
        return
    now = _now
    try:
        layers = layers_in(model)
    except AttributeError:
        return  # its constructor has not come to its layers yet
    changes = frozenset(_CHANGED[x] for x in layers if x in _CHANGED)
    if changes != known.changes:
        _update(model, layers, known, changes)
    # Last, so that what was interrupted is done again.
    known.changes, known.looked_at = changes, now


def _update(
    model: Model,
    layers: list[Layer],
    known: _Known,
    changes: frozenset[int],
) -> None:
    before, held = known.changes, model.__dict__
    for_a_while = not (changes | before).isdisjoint(_FOR_A_WHILE.values())
    if not for_a_while:
        known.aside.clear()
    elif before.isdisjoint(_ONCE):
        known.aside[before] = {x: held.get(x) for x in COMPILED_FUNCTIONS}
    found = known.aside.get(changes, {})
    for name in COMPILED_FUNCTIONS:
        if name in held:
            held[name] = found.get(name)
    track_parameters(layers)
    optimizer = held.get("optimizer")
    if optimizer is None or not optimizer.built or for_a_while:
        return
    trained = [id(x) for x in model.trainable_variables]
    if [id(x) for x in built_for(optimizer)] != trained:
        forget_trainables(optimizer)


class _UpToDate:
    """An attribute of models that is read after `bring_up_to_date`."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, model: Model | None, cls: type | None = None) -> Any:
        if model is None:
            return self
        bring_up_to_date(model)
        try:
            value = model.__dict__[self._name]
        except KeyError:
            raise AttributeError(
                f"'{type(model).__name__}' object has no attribute "
                f"'{self._name}'"
            ) from None
        known = model.__dict__.get(_KNOWN)
        if (
            self._name == "train_function"
            and known is not None
            and not known.changes.isdisjoint(_NO_TRAINING)
        ):
            # Not in a step, which has taken the values from the variables.
            raise ValueError(
                f"'{model.name}' cannot be trained within "
                "`adapter_per_example`. Leave the `with` block, and set the "
                "adapter to train."
            )
        return value

    def __set__(self, model: Model, value: Any) -> None:
        known = model.__dict__.get(_KNOWN)
        if (
            value is not None
            and self._name in _STEPS
            and known is not None
            and known.changes
            and keras.backend.backend() == "jax"
        ):
            value = functools.partial(keep_values, model, value)
        model.__dict__[self._name] = value

    def __delete__(self, model: Model) -> None:
        model.__dict__.pop(self._name, None)


def _after_update(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def updated(model: Model, *args: Any, **kwargs: Any) -> Any:
        bring_up_to_date(model)
        return method(model, *args, **kwargs)

    return updated


@functools.cache
def watch_models() -> None:
    """Lets every `keras.Model` bring itself up to date when it is used."""
    for name in (*COMPILED_FUNCTIONS, "optimizer"):
        setattr(keras.Model, name, _UpToDate(name))
    if keras.backend.backend() == "torch":
        for name in _TORCH_METHODS:
            method = getattr(keras.Model, name)
            setattr(keras.Model, name, _after_update(method))
