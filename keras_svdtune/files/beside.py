"""Saves what trained besides the adapters, and finds it in a model again.

The metadata has a `beside`, by key: whether the variable is inside the part of
the model that is adapted, and which it is of how many that look alike. Keras
numbers layers without a name in the order in which a process makes them
(`dense_1` is `dense_4` in the second model), so that a key alone does not find
the variable of another model.

Files of release 0.1 have `statistics` instead, the keys of BatchNormalization's
moving statistics, which an enable did not freeze then.
"""

import contextlib
import re

import numpy as np
from keras import ops

from keras_svdtune.files.format import BESIDE, SavedAdapter
from keras_svdtune.files.renumbered import stem_of
from keras_svdtune.model.beside import Beside, kept_beside, variables_beside
from keras_svdtune.model.state import (
    enabled_record,
    record_of,
)
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Json, Model, Variable

# By key: the variable, and the value to assign.
Assignments = dict[str, tuple[Variable, np.ndarray]]
# Keys in the model's order, by what is equal of variables that look alike: the
# key without numbers, the shape, and `Beside.inside`.
Groups = dict[tuple[str, tuple[int, ...], bool], list[str]]


def saved_beside(model: Model) -> tuple[dict[str, np.ndarray], Json]:
    """Returns the arrays of what trained besides the adapters, and their entry.

    That is what trains in `model` now, and what an adapter file has set.

    Raises:
        ValueError: one of them holds NaN or infinity.
    """
    groups = _groups(variables_beside(model))
    arrays, entry = {}, {}
    for key, beside in kept_beside(model).items():
        variable = beside.variable
        value = variable.value
        if variable.dtype in ("bfloat16", "float16"):
            value = ops.cast(value, "float32")
        array = np.ascontiguousarray(to_numpy(value))
        if not np.isfinite(array).all():
            raise ValueError(
                f"'{key}', which trains besides the adapter, holds NaN or "
                "infinity, so it cannot be saved. The training diverged."
            )
        alike = groups[stem_of(key), tuple(variable.shape), beside.inside]
        arrays[key] = array
        entry[key] = {
            "inside": beside.inside,
            "index": alike.index(key),
            "count": len(alike),
        }
    return arrays, entry


def find_beside(model: Model, adapter: SavedAdapter) -> Assignments:
    """Returns the file's values, with the variables of `model` for them.

    Raises:
        ValueError: the model does not have such a variable.
    """
    everything = variables_beside(model)
    groups = _groups(everything)
    found: Assignments = {}
    for key in adapter.beside:
        value = adapter.arrays[key]
        beside = _found(key, value, adapter, everything, groups)
        if beside is None or not np.isfinite(value).all():
            raise ValueError(
                f"{adapter.source} holds '{key}' of shape {value.shape}, "
                f"finite: {np.isfinite(value).all()}. It trained besides the "
                f"adapter, in a {adapter.about.get('saved_from')}, and "
                f"'{model.name}', a {type(model).__name__}, has no such "
                "variable. Load the file into the model that it was saved "
                "from, or with `adapter_only=True` to leave it out."
            )
        found[key] = (beside.variable, value)
    return found


def assign_beside(
    root: Model, values: Assignments, undo: contextlib.ExitStack
) -> None:
    """Assigns the values of a file; those of an earlier file are undone first.

    Says to `undo` how to undo that.
    """
    owners = [x for x in layers_in(root) if enabled_record(x) is not None]
    for owner in owners:
        kept = record_of(owner).beside
        before = dict(kept)
        undo.callback(kept.update, before)
        undo.callback(kept.clear)
        for variable, base in before.values():
            undo.callback(variable.assign, ops.copy(variable.value))
            variable.assign(base)
        kept.clear()
    for key, (variable, value) in values.items():
        undo.callback(variable.assign, ops.copy(variable.value))
        # The part that has it, if parts were adapted one by one; a head is in
        # none. Layers that are declared with their method have no record.
        holders = [x for x in owners if any(variable is v for v in x.variables)]
        for owner in (holders or owners)[:1]:
            base = to_numpy(variable.value).copy()
            record_of(owner).beside[key] = (variable, base)
        variable.assign(value)


def _found(
    key: str,
    value: np.ndarray,
    adapter: SavedAdapter,
    everything: dict[str, Beside],
    groups: Groups,
) -> Beside | None:
    entry = adapter.about.get(BESIDE, {}).get(key)
    if entry is None:
        return _found_of_old_file(key, value, adapter, everything, groups)
    alike = groups.get((stem_of(key), value.shape, entry["inside"]), [])
    if len(alike) != entry["count"]:
        return None
    return everything[alike[entry["index"]]]


def _found_of_old_file(
    key: str,
    value: np.ndarray,
    adapter: SavedAdapter,
    everything: dict[str, Beside],
    groups: Groups,
) -> Beside | None:
    """Finds moving statistics of release 0.1, which says only their keys."""
    alike = groups.get((stem_of(key), value.shape, True), [])
    theirs = [x for x in adapter.beside if stem_of(x) == stem_of(key)]
    if set(theirs) <= set(alike):
        return everything[key]
    # Keras has numbered the layers of this model otherwise, but in order.
    theirs = [x for x in theirs if adapter.arrays[x].shape == value.shape]
    theirs.sort(key=lambda x: [int(n) for n in re.findall(r"\d+", x)])
    if len(theirs) != len(alike):
        return None
    return everything[alike[theirs.index(key)]]


def _groups(everything: dict[str, Beside]) -> Groups:
    """Returns the keys of variables that differ by their numbers alone."""
    groups: Groups = {}
    for key, x in everything.items():
        alike = stem_of(key), tuple(x.variable.shape), x.inside
        groups.setdefault(alike, []).append(key)
    return groups
