"""Saves the adapter of a model, and loads it into its base again.

Loading checks everything before it changes anything: a file that does not
belong to this model never loads. `format.py` describes the file.
"""

import contextlib
import functools
import os
import warnings

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import effect
from keras_svdtune.adapter.plan import AdapterPlan
from keras_svdtune.files import hub_client
from keras_svdtune.files.beside import (
    Assignments,
    assign_beside,
    find_beside,
    saved_beside,
)
from keras_svdtune.files.compatibility import (
    array_key,
    check_basis_can_change,
    check_effect,
    check_frozen_weights,
    dtype_in_file,
    find_targets_of,
    fingerprint_of,
    match_bases,
    methods_of,
    values_for,
)
from keras_svdtune.files.format import (
    BASIS,
    BESIDE,
    EFFECTS,
    FINGERPRINTS,
    ROUNDED,
    SavedAdapter,
    checked_path,
    read_adapter,
)
from keras_svdtune.files.keras_lora_file import is_keras_lora, read_keras_lora
from keras_svdtune.files.low_rank_files import LowRankFile
from keras_svdtune.files.metadata import about_of
from keras_svdtune.files.peft_folder import read_peft
from keras_svdtune.hosts.target import Target
from keras_svdtune.model.beside import trained_beside, variables_beside
from keras_svdtune.model.checks import check_fit, check_trained
from keras_svdtune.model.commit import commit
from keras_svdtune.model.enable import attach_plans
from keras_svdtune.model.named_adapters import (
    NamedAdapters,
    check_name,
    join,
    named_adapters,
)
from keras_svdtune.model.names import (
    adapter_set,
    adapter_weights,
    note_saved,
)
from keras_svdtune.model.planning import plan_adapters
from keras_svdtune.model.state import (
    DEFAULT,
    PER_EXAMPLE,
    adapted_part,
    check_no_block,
    enabled_method,
    enabled_record,
    require_adapted,
)
from keras_svdtune.model.targets import adapted_targets, matrices_in
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.processes import shared, to_numpy
from keras_svdtune.runtime.types import Json, Model


def save_adapter(
    model: Model,
    path: str | os.PathLike[str],
    include_basis: bool = False,
    adapter_only: bool = False,
    name: str | None = None,
) -> None:
    """Writes the trainable weights of the enabled adapter to one file.

    Of several adapters, that is what is set (`set_adapter`), also a sum of
    them, or the one with this `name`.

    What else trains in `model` is in the file too: the head of a Task, layers
    around a backbone or thawed by hand, moving statistics of a
    BatchNormalization that is not frozen. Give the Task and not its backbone,
    to have its head in the file.

    The file is written under a temporary name and renamed, so that `path`
    holds the old file or the new one, never half of one. With several
    processes all call this, and the first one writes.

    Args:
        model: a model with an adapter.
        path: where to write, ending in `.safetensors`.
        include_basis: whether to write the frozen weights too (n² numbers a
            matrix for SVF and SVFT). Without them, loading computes the
            singular vectors again, from W rounded to bfloat16, and checks that
            they came out the same: in float32 and in bfloat16 they do. With
            them, it computes nothing and cannot differ, which a base in
            float16 may need.
        adapter_only: whether to leave out what trains besides the adapter.
        name: str or None. Which adapter to save; None for what is set.

    Raises:
        ValueError: the model has no adapter, or none of that `name`; `path` has
            another ending, or what trained holds NaN or infinity.
    """
    path = checked_path(path)
    saved = saved_adapter(model, include_basis, adapter_only, name)
    shared(0, lambda: saved.save(path))
    if name is None:
        note_saved(model, adapter_only)


def saved_adapter(
    model: Model,
    include_basis: bool = False,
    adapter_only: bool = False,
    name: str | None = None,
) -> SavedAdapter:
    """Returns what `save_adapter` writes, in memory."""
    if name is not None:
        with adapter_set(model, name):
            return saved_adapter(model, include_basis, adapter_only)
    root = adapted_part(model)
    check_no_block(root, PER_EXAMPLE)  # which leaves the weights as they are
    check_trained(require_adapted(root), "saved")
    method = enabled_method(root)
    arrays: dict[str, np.ndarray] = {}
    layers: Json = {}
    fingerprints, effects = [], []
    for path, target in require_adapted(root).items():
        adapter = target.adapted
        for weight in adapter.method.weights(adapter.shape):
            if weight.saved or (include_basis and not weight.overwritten):
                value = getattr(adapter, weight.name).value
                value = ops.cast(value, dtype_in_file(weight))
                key = array_key(path, adapter.method, weight.name)
                arrays[key] = np.ascontiguousarray(to_numpy(value))
        fingerprints.append(fingerprint_of(target))
        effects.append(
            effect(
                adapter.method,
                adapter.current,
                target.matrix(),
                adapter.rounds,
            )
        )
        entry: Json = {
            "kernel_shape": list(target.view.kernel_shape),
            "dtype": target.base_dtype,
        }
        if adapter.rounds:
            entry[BASIS] = ROUNDED
        if not adapter.method.trains_like(method):
            entry["settings"] = adapter.method.settings()
        layers[path] = entry
    arrays[FINGERPRINTS] = np.stack(fingerprints)
    arrays[EFFECTS] = np.stack(effects)
    beside, entries = ({}, {}) if adapter_only else saved_beside(model)
    arrays |= beside
    about = about_of(method, root, layers)
    if entries:
        about |= {"saved_from": type(model).__name__, BESIDE: entries}
    return SavedAdapter(about, arrays, f"the adapter of '{root.name}'")


def load_adapter(
    model: Model,
    adapter: str | os.PathLike[str] | SavedAdapter,
    adapter_only: bool = False,
    name: str | None = None,
) -> None:
    """Loads an adapter file into the base model that it was trained on.

    If the model has no adapter yet, the file's method is enabled on the
    file's layers. If it has the same one, values are assigned and nothing is
    compiled anew; its dropout stays what it is. With several processes all call
    this, and the first one reads for all.

    With a `name` the adapter comes beside those that the model has, which must
    be of the same method on the same layers, and is set (`set_adapter`).

    What trained besides the adapter, such as the head of a Task, is assigned
    too; `remove_adapter` undoes that. While this runs, no other thread may use
    the model.

    Args:
        model: the base model, or the same with the same method enabled.
        adapter: a file that `save_adapter` wrote; the URI of what
            `push_adapter` uploaded, `"hf://user/name"`, also with
            `"@revision"`, or `"kaggle://user/model/keras/variation"`, also
            with `"/version"`; or what `compose` returned. Or what another
            library wrote, which becomes a `LoRA` or `DoRA`: a folder of
            PEFT's (LoRA, DoRA, AdaLoRA), also on Hugging Face, or a
            `.lora.h5` of KerasHub's `save_lora_weights`. These do not say
            which weights they belong to: only shapes are checked.
        adapter_only: whether to leave out what trained besides the adapter.
        name: str or None. What `set_adapter` calls the adapter; one that has
            this name gets the file's values. None for the only one.

    Raises:
        ImportError: a URI needs `pip install keras_svdtune[hub]`.
        ValueError: the file is no adapter file; or it does not belong to this
            model, by its layers, shapes, method, base weights, or singular
            vectors that come out otherwise here; or the hub does not have
            it or does not answer; or the model has several adapters, and no
            `name` is given. The model stays as it was.

    Example:

    ```python
    gemma.backbone.load_adapter("pirate.safetensors", name="pirate")
    gemma.backbone.load_adapter("spanish.safetensors", name="spanish")
    gemma.backbone.set_adapter("pirate")
    ```
    """
    if name is not None:
        check_name(name)
    root = adapted_part(model)
    check_no_block(root)
    if not isinstance(adapter, SavedAdapter):
        adapter = _read(adapter, root)
    adapted = adapted_targets(root)
    named = _beside_others(root, name) if adapted else None
    method, methods = methods_of(adapter)
    ours = adapted or matrices_in(root).targets
    targets = find_targets_of(adapter, ours, root)
    methods = {
        path: methods[path].for_shape(target.view.shape)
        for path, target in targets.items()
    }
    if not adapted:
        for path, target in targets.items():
            try:
                check_fit(path, target, methods[path])
            except ValueError as error:
                raise ValueError(
                    f"{adapter.source} does not fit. {error}"
                ) from None
    elif len(adapted) != len(targets) or any(
        not x.adapted.method.trains_like(methods[p]) for p, x in targets.items()
    ):
        raise ValueError(
            f"{adapter.source} holds {method} on {len(targets)} layers; this "
            f"model has {enabled_method(root)} on {len(adapted)}. Call "
            "`remove_adapter()` first, then load."
        )
    values = values_for(adapter, targets, methods)
    beside = {} if adapter_only else find_beside(model, adapter)
    if not beside and not adapter_only:
        _warn_of_head(model, adapter)
    match_bases(adapter, targets, methods, ours)
    rounds = {path: adapter.rounds(path) for path in targets}
    label = f"{method.title}: loading"
    if not adapted:
        plans = plan_adapters(label, targets, methods, values, rounds)
        for row, (path, target) in enumerate(targets.items()):
            check_effect(adapter, row, target, plans[path])
        first = name or DEFAULT
        assign = functools.partial(_assign, model, beside, first, adapter_only)
        attach_plans(root, method, targets, plans, assign, first)
        return
    if named is not None:
        _check_same_basis(adapter, targets)
        values = {
            path: {
                w.name: values[path][w.name]
                for w in methods[path].weights(target.view.shape)
                if w.saved
            }
            for path, target in targets.items()
        }
    for path, target in targets.items():
        check_basis_can_change(adapter, path, target)
    others = {p: x for p, x in targets.items() if x.adapted.rounds != rounds[p]}
    plans = plan_adapters(label, others, methods, values, rounds)
    values |= {path: plan.values for path, plan in plans.items()}
    for row, (path, target) in enumerate(targets.items()):
        ours_now = target.adapted
        new = {
            w.name: getattr(ours_now, w.name).value
            for w in ours_now.method.weights(ours_now.shape)
        } | values[path]
        base = ours_now.base_fingerprint
        if base is None:  # of a declared layer
            base = fingerprint_of(target)
        plan = AdapterPlan(ours_now.method, new, base)
        check_frozen_weights(adapter, path, target, values[path])
        check_effect(adapter, row, target, plan)
    if named is not None:
        assert name is not None
        paths = {id(x.kernel): path for path, x in named.targets.items()}
        weights = {paths[id(x.kernel)]: values[p] for p, x in targets.items()}
        named.add(name, weights, beside, None if adapter_only else model)
        return
    only = next(iter(adapter_weights(root)), DEFAULT)
    with commit(root) as undo:
        for path, target in targets.items():
            for key, value in values[path].items():
                weight = getattr(target.adapted, key)
                undo.callback(weight.assign, ops.copy(weight.value))
                weight.assign(value)
            target.adapted.rounds = rounds[path]
        _assign(model, beside, only, adapter_only, undo)


def _read(file: str | os.PathLike[str], root: Model) -> SavedAdapter:
    """Reads a file of any kind; one process does, for all."""

    def contents() -> SavedAdapter | LowRankFile:
        source = f"'{file}'"
        path = hub_client.fetch(str(file)) if hub_client.is_uri(file) else file
        if os.path.isdir(path):
            return read_peft(path, root, source)
        if is_keras_lora(path):
            return read_keras_lora(path, root)
        return read_adapter(path, source)

    found = shared(0, contents)
    if isinstance(found, SavedAdapter):
        return found
    return found.as_saved(matrices_in(root, adapted=True).targets, root)


def _beside_others(root: Model, name: str | None) -> NamedAdapters | None:
    """Returns the adapters of a model, beside which one is to be loaded.

    None if the values of the only one are to be assigned.
    """
    weights = adapter_weights(root)
    if name is None:
        if weights and list(weights.values()) != [1.0]:
            raise ValueError(
                f"Model '{root.name}' has several adapters, or none of them is "
                f"set: {', '.join(map(repr, weights))}. Say by `name` which "
                "one to load."
            )
        return None
    return None if weights == {name: 1.0} else named_adapters(root)


def _check_same_basis(
    adapter: SavedAdapter, targets: dict[str, Target]
) -> None:
    """Checks that a file's adapter has the singular vectors of the others."""
    for path, target in targets.items():
        if target.adapted.rounds != adapter.rounds(path):
            raise ValueError(
                f"{adapter.source} and the adapters of this model were trained "
                f"with singular vectors of layer '{path}' that were computed "
                "otherwise: one of them by an earlier release, or on a "
                "quantized base. Load it into a model of its own, convert both "
                "by `to_lora(model, rank)`, and load those files."
            )


def _assign(
    model: Model,
    beside: Assignments,
    name: str,
    adapter_only: bool,
    undo: contextlib.ExitStack,
) -> None:
    """Assigns what a file holds besides the adapter, for one of this `name`."""
    root = adapted_part(model)
    assign_beside(root, beside, undo)
    for owner in layers_in(root):
        part = enabled_record(owner)
        if part is not None:  # also where the file has no biases
            join(part, part.biases, undo)
    record = enabled_record(root)
    if record is not None and name != DEFAULT and not adapter_only:
        join(record, trained_beside(model), undo)


def _warn_of_head(model: Model, adapter: SavedAdapter) -> None:
    """Warns of a head that trains here and is not in the file."""
    everything = variables_beside(model).items()
    head = [key for key, x in everything if x.trains and not x.inside]
    if head:
        warnings.warn(
            f"{adapter.source} holds the adapter alone. What '{model.name}' "
            f"has besides keeps its values: {', '.join(head[:4])}"
            f"{' ...' if len(head) > 4 else ''}. `adapter_only=True` says "
            "that you know.",
            stacklevel=3,
        )
