"""Keeps several adapters in one model, by name.

All of them have the method, the layers and the frozen weights of the first: an
adapter costs its own weights only, such as δ of SVF. To set another one assigns
values, so nothing is compiled anew, and a model with one adapter computes as
ever.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from keras_svdtune.adapter.plan import Values, first_values
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.dropout import dropout_of
from keras_svdtune.model.named_adapters import (
    Choice,
    NamedAdapters,
    chosen_as_text,
    host_array,
    listed,
    named_adapters,
    neutral_values,
    own_weights,
)
from keras_svdtune.model.state import (
    Enabled,
    adapted_part,
    enabled_record,
    keep_record,
    require_adapted,
)
from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model


def set_adapter(model: Model, adapter: Choice) -> None:
    """Sets which adapter the model computes with, and trains.

    Values are assigned, nothing is compiled anew. What was trained since the
    last call is kept: it belongs to the adapter that was set then. What trains
    besides the adapter, such as the head of a Task, changes with it.

    A dict sets a weighted sum, ΔW = Σ weight · ΔW of each. That is exact for
    SVF, SVFT, LoRA-XS and MiCA, which are linear in what they train, and an
    error for the other methods. A sum has no name, and neither has the base:
    what is trained while they are set belongs to no adapter, so that the next
    call is an error, until `save_adapter(path)` has written it to a file. To
    train a sum as an adapter of its own, make it one with `compose` and
    `load_adapter(..., name=...)`.

    An optimizer keeps the averages that it has gathered, as it does after
    `load_adapter`: call `compile` before you train another adapter.

    Args:
        model: a model with adapters.
        adapter: the name of one; `"default"` is the name of one that was given
            none. Or a dict from names to weights, any finite numbers. Or None
            for the base model.

    Raises:
        ValueError: the model has no such adapter, or no adapter; the method
            cannot add up; what was trained would be lost; the base has changed
            since. The model stays as it was.

    Example:

    ```python
    gemma.backbone.load_adapter("pirate.safetensors", name="pirate")
    gemma.backbone.load_adapter("spanish.safetensors", name="spanish")
    gemma.backbone.set_adapter("pirate")
    gemma.backbone.set_adapter({"pirate": 0.5, "spanish": 0.5})
    gemma.backbone.set_adapter(None)
    ```
    """
    named = named_adapters(model)
    chosen = named.checked(adapter)
    if len(chosen) == 1 and chosen == named.record.chosen:
        return
    now = named.now()
    named.choose(chosen, named.all_stored(now), now)


def delete_adapter(model: Model, name: str) -> None:
    """Deletes one of several adapters; if it is set, the base is set instead.

    Args:
        model: a model with several adapters. `remove_adapter` takes all away.
        name: the adapter's name.

    Raises:
        ValueError: the model has no such adapter, or no other; or it is part of
            a sum that was trained. The model stays as it was.
    """
    named = named_adapters(model)
    named.checked(name)
    if len(named.record.names) == 1:
        raise ValueError(
            f"'{name}' is the last adapter of '{named.owner.name}'. Call "
            "`remove_adapter()`."
        )
    record = named.record
    if name not in record.chosen:
        left = {k: x for k, x in record.names.items() if k != name}
        keep_record(named.owner, dataclasses.replace(record, names=left))
        return
    now = named.now()
    stored = named.all_stored(now)
    del stored[name]
    named.choose({}, stored, now)


def adapter_names(model: Model) -> list[str]:
    """Returns the names of the model's adapters, in the order of their arrival.

    One that was enabled or loaded without a name is `"default"`. A model
    without an adapter has none. `adapter_summary` says which is set.
    """
    return list(adapter_weights(model))


def adapter_weights(model: Model) -> dict[str, float]:
    """Returns the weight with which each adapter is set, by name; 0 if not."""
    records = [enabled_record(x) for x in layers_in(adapted_part(model))]
    return {
        name: record.chosen.get(name, 0.0)
        for record in records
        if record is not None
        for name in record.names
    }


def check_alone(record: Enabled, what: str) -> None:
    """Raises a ValueError unless a model's one adapter is set.

    `what` is what else could be done, for the message.
    """
    if len(record.names) > 1 or record.chosen != dict.fromkeys(
        record.names, 1.0
    ):
        raise ValueError(
            f"The model has the adapters {listed(record.names)}, of which "
            f"{chosen_as_text(record.chosen)} is set. {what}"
        )


def add_untrained(
    model: Model,
    name: str,
    method: Method,
    methods: dict[str, Method],
    known: dict[str, Values] | None = None,
) -> None:
    """Adds an adapter that changes nothing yet, beside others, and sets it.

    Args:
        method, methods: as for `methods_beside`.
        known: the first values of the weights, if data gave them, by path.

    Raises:
        ValueError: as for `methods_beside`. The model stays as it was.
    """
    methods_beside(model, name, method, methods)
    named = named_adapters(model)
    weights = {
        path: _first(x, (known or {}).get(path))
        for path, x in named.targets.items()
    }
    named.add(name, weights, {}, model)


def methods_beside(
    model: Model, name: str, method: Method, methods: dict[str, Method]
) -> dict[str, Method]:
    """Returns the method of each layer for an adapter beside others, by path.

    Args:
        methods: the layers that it is to be on, by path, and the method of
            each. Those that have `method` itself take what they have.

    Raises:
        ValueError: the model has one of that name; or another method, other
            settings or other layers.
    """
    named = named_adapters(model)
    if name in named.record.names:
        raise ValueError(
            f"Model '{named.owner.name}' has an adapter '{name}' already. Call "
            f"`set_adapter({name!r})` to train it on."
        )
    theirs = named.record.method
    if not theirs.trains_like(method):
        raise ValueError(
            "All adapters of a model have one method with the same settings, "
            f"since they share their frozen weights. '{named.owner.name}' has "
            f"{theirs}. Received: {method}"
        )
    if dropout_of(theirs) != dropout_of(method):
        raise ValueError(
            "All adapters of a model train with the same dropout, that of the "
            f"first. '{named.owner.name}' has {theirs}. Received: {method}"
        )
    different = set(methods) ^ set(named.targets)
    if different:
        raise ValueError(
            "All adapters of a model are on the same layers. Name those of "
            f"{listed(named.record.names)} in `target_layer_names`. They "
            f"differ in: {listed(sorted(different))}"
        )
    for path, target in named.targets.items():
        wanted = methods[path].for_shape(target.view.shape)
        ours = target.adapted.method
        if not (methods[path].trains_like(method) or ours.trains_like(wanted)):
            raise ValueError(
                "All adapters of a model have the same settings in each layer. "
                f"Layer '{path}' has {ours}. Received: {wanted}"
            )
    return {path: x.adapted.method for path, x in named.targets.items()}


def _first(target: Target, known: Values | None) -> dict[str, np.ndarray]:
    """Returns the own weights of an adapter that was just enabled."""
    adapter = target.adapted
    method, own = adapter.method, dict(own_weights(adapter))
    if known is not None:
        return {k: x for k, x in known.items() if k in own}
    trained = {w.name for w in method.weights(adapter.shape) if w.trainable}
    neutral = neutral_values(adapter)
    if method.needs(adapter.shape) is not None and trained <= set(neutral):
        # They start there; a decomposition would give the frozen ones only.
        values = {
            w.name: host_array(getattr(adapter, w.name))
            for w in method.weights(adapter.shape)
            if w.saved and not w.trainable
        }
        return values | neutral
    _, first = first_values(
        method, target.host_matrix(), target.path, adapter.rounds
    )
    return {k: np.asarray(to_numpy(first[k])) for k in own if k in first}


@contextlib.contextmanager
def adapter_set(model: Model, name: str) -> Iterator[None]:
    """Temporarily sets one adapter of a model; the values are back after."""
    named = named_adapters(model)
    chosen = named.checked(name)
    if chosen == named.record.chosen:
        yield
        return
    before, stored = named.now(), named.record.names[name]
    assert stored is not None  # it is not the one in the variables
    values = named.values_of(chosen, {name: stored})
    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [lambda: named.put(before)])
        named.put(values)
        yield


def note_saved(model: Model, adapter_only: bool) -> None:
    """Notes that what is set is in a file, so that it may be lost."""
    for owner in layers_in(adapted_part(model)):
        record = enabled_record(owner)
        if record is None or record.as_set is None:
            continue
        now = NamedAdapters(owner, record, require_adapted(owner)).now()
        if adapter_only:
            now = dataclasses.replace(now, beside=record.as_set.beside)
        keep_record(owner, dataclasses.replace(record, as_set=now))
