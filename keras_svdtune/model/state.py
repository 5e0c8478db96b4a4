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

# The `with` block in which each example has its own adapter.
PER_EXAMPLE = "adapter_per_example"
# The name of an adapter that was enabled or loaded without one.
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """The values of one named adapter of a model, on the host.

    Attributes:
        weights: its own weights, by the path of their layer and their name.
        beside: values of `Enabled.beside`, by key; those of the base, if left
            out.
        bases: identifies the kernel and the basis that it is for, by path.
    """

    weights: dict[str, dict[str, np.ndarray]]
    beside: dict[str, np.ndarray]
    bases: dict[str, np.ndarray]


@dataclasses.dataclass
class Enabled:
    """What `enable_adapter` did to a model.

    Attributes:
        method: the method, with the user's settings.
        unfreeze: function that restores what was trainable before.
        beside: what belongs to the adapters besides their layers, such as the
            head of a Task, by key: the variable, and its value in the base.
        biases: those of adapted layers that train (`train_bias`), by key; they
            are in `beside` too.
        names: the adapters by name; None for the one whose values are in the
            variables of the model.
        chosen: the weight of each adapter that is set. Empty for the base.
        as_set: the values that were set, unless they are those of one adapter:
            if the variables have others, a sum of adapters, or the base, was
            trained.
        within: the `with` block that is open, in which the variables hold what
            no adapter does; or None.
    """

    method: Method
    unfreeze: Callable[[], None]
    beside: dict[str, tuple[Variable, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )
    biases: dict[str, Variable] = dataclasses.field(default_factory=dict)
    names: dict[str, StoredAdapter | None] = dataclasses.field(
        default_factory=lambda: {DEFAULT: None}
    )
    chosen: dict[str, float] = dataclasses.field(
        default_factory=lambda: {DEFAULT: 1.0}
    )
    as_set: StoredAdapter | None = None
    within: str | None = None


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
        ValueError: the adapters are of a model that holds `root` and more, or
            each example has its own at the moment.
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
    found = [m for m in _ENABLED if id(m) in inside]
    if any(record_of(x).within == PER_EXAMPLE for x in found):
        raise ValueError(
            f"Leave the `with {PER_EXAMPLE}(...):` first, in which each "
            f"example has an adapter of its own in '{root.name}'."
        )
    return found


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
