"""Keeps what was enabled on a model, until it is undone."""

import dataclasses
import weakref
from collections.abc import Callable

import keras
import keras_hub
import numpy as np

from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.model.targets import adapted_targets
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.types import Model, Variable


@dataclasses.dataclass
class Enabled:
    """What `enable_adapter` did to a model.

    Attributes:
        method: the method, with the user's settings.
        unfreeze: function that restores what was trainable before.
        beside: what an adapter file has set besides the adapters, such as the
            head of a Task, by key: the variable, and its value without the
            file.
    """

    method: Method
    unfreeze: Callable[[], None]
    beside: dict[str, tuple[Variable, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )


# The models that have a record. It is kept on the model itself: it refers to
# the model, so a dict from here would keep every model alive for ever.
_ENABLED: weakref.WeakSet[Model] = weakref.WeakSet()
_RECORD = "_svdtune_enabled"


def record_of(model: Model) -> Enabled:
    """Returns the record of a model on which an adapter was enabled."""
    found: Enabled = getattr(model, _RECORD)
    return found


def enabled_record(model: Model) -> Enabled | None:
    """Returns the record of a model, or None if it has none."""
    return model.__dict__.get(_RECORD)


def keep_record(model: Model, enabled: Enabled | None) -> None:
    """Keeps the record of a model on it; None deletes it."""
    # Not by setattr: Keras would look into it for layers and variables.
    if enabled is None:
        _ENABLED.discard(model)
        model.__dict__.pop(_RECORD, None)
    else:
        object.__setattr__(model, _RECORD, enabled)
        _ENABLED.add(model)


def remember_enabled() -> Callable[[], None]:
    """Returns a function that restores the records that models have now."""
    before = [(model, record_of(model)) for model in list(_ENABLED)]

    def restore() -> None:
        for model in list(_ENABLED):
            keep_record(model, None)
        for model, enabled in before:
            keep_record(model, enabled)

    return restore


def enabled_models(root: Model, targets: dict[str, Target]) -> list[Model]:
    """Returns the models in `root` on which adapters were enabled.

    Raises:
        ValueError: the adapters are of a model that holds `root` and more.
    """
    inside = {id(x) for x in layers_in(root)}
    ours = {id(x.owner) for x in targets.values()}
    for owner in list(_ENABLED):
        if id(owner) not in inside and any(
            id(x.owner) in ours for x in adapted_targets(owner).values()
        ):
            raise ValueError(
                f"The adapter was enabled on '{owner.name}', which holds "
                f"'{root.name}' and more. Call this on '{owner.name}'."
            )
    return [m for m in _ENABLED if id(m) in inside]


def adapted_part(model: Model) -> Model:
    """Returns the backbone of a Task; any other model itself."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a keras.Model, a keras_hub Backbone or a Task. "
            f"Received: {model!r} (of type {type(model).__name__})"
        )
    return model.backbone if isinstance(model, keras_hub.models.Task) else model


def require_adapted(model: Model) -> dict[str, Target]:
    """Returns the adapted matrices by path; raises if there are none."""
    targets = adapted_targets(adapted_part(model))
    if not targets:
        raise ValueError(
            f"Model '{model.name}' has no adapter. Enable one first, e.g. with "
            "`enable_svf()`."
        )
    return targets


def enabled_method(model: Model) -> Method:
    """Returns the method enabled on `model`, with the user's settings."""
    root = adapted_part(model)
    if root in _ENABLED:
        return record_of(root).method
    return next(iter(require_adapted(root).values())).adapted.method


def set_beside(model: Model) -> dict[str, tuple[Variable, np.ndarray]]:
    """Returns the `Enabled.beside` of a model, or of a part of it.

    Empty, and kept nowhere, if neither has a record: layers that are declared
    with their method have none.
    """
    root = adapted_part(model)
    records = [enabled_record(x) for x in layers_in(root)]
    return next((x.beside for x in records if x is not None), {})
