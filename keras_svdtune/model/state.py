"""Keeps what was enabled on a model, until it is undone."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable

import keras
import keras_hub
import numpy as np

from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.model.targets import adapted_targets
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Layer, Model, Variable

# The `with` blocks in which layers compute what no adapter does, or otherwise.
DISABLED = "adapter_disabled"
MERGED = "adapter_merged"
PER_EXAMPLE = "adapter_per_example"
SEARCH = "search_mixture"
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


# What is in the `beside` of some models: key, variable, its value in the base.
OfAdapters = list[tuple[str, Variable, np.ndarray]]

# The models that have a record. It is kept on the model itself: it refers to
# the model, so a dict from here would keep every model alive for ever.
_ENABLED: weakref.WeakSet[Model] = weakref.WeakSet()
_RECORD = "_svdtune_enabled"
# The open `with` block of layers that compute in it what no adapter does, or
# in another way.
_WITHIN: weakref.WeakKeyDictionary[Layer, str] = weakref.WeakKeyDictionary()


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


class Block:
    """A `with` block that layers are in, from `enter` to `leave`."""

    def __init__(self, layers: Iterable[Layer], name: str):
        self._before = {layer: _WITHIN.get(layer) for layer in layers}
        self._name = name

    def enter(self) -> None:
        """Notes that the layers are in the block."""
        _WITHIN.update(dict.fromkeys(self._before, self._name))

    def leave(self) -> None:
        """Notes the block that they were in before, if any."""
        for layer, outer in self._before.items():
            if outer is None:
                _WITHIN.pop(layer, None)
            else:
                _WITHIN[layer] = outer


def open_blocks(root: Model) -> set[str]:
    """Returns the `with` blocks that layers of `root` are in."""
    return {_WITHIN[x] for x in layers_in(root) if x in _WITHIN}


def check_no_block(root: Model, *allowed: str) -> None:
    """Raises a ValueError if a `with` block of ours is open in `root`."""
    for name in open_blocks(root) - set(allowed):
        raise ValueError(
            f"Leave the `with {name}(...):` first: within, '{root.name}' "
            "does not have its adapter as it is."
        )


def enabled_models(
    root: Model, targets: dict[str, Target], *allowed: str
) -> list[Model]:
    """Returns the models in `root` on which adapters were enabled.

    Args:
        allowed: the `with` blocks in which this may be called.

    Raises:
        ValueError: the adapters are of a model that holds `root` and more, or
            a `with` block is open.
    """
    check_no_block(root, *allowed)
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
        check_no_block(model)  # within `adapter_merged` there is none
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


def beside_of(owners: Iterable[Model]) -> OfAdapters:
    """Returns what belongs to the adapters of models besides their layers."""
    return [
        (key, variable, base)
        for owner in owners
        for key, (variable, base) in record_of(owner).beside.items()
    ]


def every_beside() -> OfAdapters:
    """Returns the same of all models that have adapters."""
    return beside_of(_ENABLED)


def take_as_base(model: Model) -> None:
    """Takes what is in the `beside` of adapters in `model` for the base's."""
    inside = {id(x) for x in model.variables}
    for owner in _ENABLED:
        beside = record_of(owner).beside
        for key, (variable, _) in beside.items():
            if id(variable) in inside:
                beside[key] = (variable, to_numpy(variable.value).copy())
