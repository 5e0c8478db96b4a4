"""Saves the adapter of a model, and loads it into its base again.

Loading checks everything before it changes anything: a file that does not
belong to this model never loads. `format.py` describes the file.
"""

import os

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import effect
from keras_svdtune.adapter.plan import AdapterPlan
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
    EFFECTS,
    FINGERPRINTS,
    FORMAT_VERSION,
    ROUNDED,
    STATISTICS,
    SavedAdapter,
    checked_path,
    read_adapter,
)
from keras_svdtune.files.statistics import set_statistics, statistics_for
from keras_svdtune.model.checks import check_fit
from keras_svdtune.model.enable import attach_plans
from keras_svdtune.model.planning import plan_adapters
from keras_svdtune.model.state import (
    adapted_part,
    enabled_method,
    require_adapted,
    statistics_of,
)
from keras_svdtune.model.targets import adapted_targets, matrices_in
from keras_svdtune.runtime.processes import shared, to_numpy
from keras_svdtune.runtime.types import Json, Model


def save_adapter(
    model: Model,
    path: str | os.PathLike[str],
    include_basis: bool = False,
) -> None:
    """Writes the trainable weights of the enabled adapter to one file.

    The file is written under a temporary name and renamed, so that `path`
    holds the old file or the new one, never half of one. With several
    processes all call this, and the first one writes.

    Moving statistics of BatchNormalization are not in the file: an enable
    freezes these layers. If you thaw one (`layer.trainable = True`), save its
    statistics yourself.

    Args:
        model: a model with an adapter.
        path: where to write, ending in `.safetensors`.
        include_basis: whether to write the frozen weights too (n² numbers a
            matrix for SVF and SVFT). Without them, loading computes the
            singular vectors again, from W rounded to bfloat16, and checks that
            they came out the same: in float32 and in bfloat16 they do. With
            them, it computes nothing and cannot differ, which a base in
            float16 may need.

    Raises:
        ValueError: the model has no adapter, or `path` another ending.
    """
    path = checked_path(path)
    saved = saved_adapter(model, include_basis)
    shared(0, lambda: saved.save(path))


def saved_adapter(model: Model, include_basis: bool = False) -> SavedAdapter:
    """Returns what `save_adapter` writes, in memory."""
    root = adapted_part(model)
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
            effect(adapter.method, adapter, target.matrix(), adapter.rounds)
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
    statistics = statistics_of(root)
    arrays |= {k: to_numpy(v.value) for k, (v, _) in statistics.items()}
    about = {
        "format_version": FORMAT_VERSION,
        "method": method.name,
        "settings": method.settings(),
        "model_class": type(root).__name__,
        "versions": {
            "keras": keras.version(),
            "keras_hub": keras_hub.__version__,
        },
        "layers": layers,
        STATISTICS: sorted(statistics),
    }
    return SavedAdapter(about, arrays, f"the adapter of '{root.name}'")


def load_adapter(
    model: Model, adapter: str | os.PathLike[str] | SavedAdapter
) -> None:
    """Loads an adapter file into the base model that it was trained on.

    If the model has no adapter yet, the file's method is enabled on the
    file's layers. If it has the same one, values are assigned and nothing is
    compiled anew. With several processes all call this, and the first one reads
    for all.

    Args:
        model: the base model, or the same with the same method enabled.
        adapter: a file that `save_adapter` wrote; the URI of what
            `push_adapter` uploaded, `"hf://user/name"`, also with
            `"@revision"`, or `"kaggle://user/model/keras/variation"`, also
            with `"/version"`; or what `compose` returned.

    Raises:
        ImportError: a URI needs `pip install keras_svdtune[hub]`.
        ValueError: the file is no adapter file; or it does not belong to this
            model, by its layers, shapes, method, base weights, or singular
            vectors that come out otherwise here; or the hub does not have
            it or does not answer. The model stays as it was.
    """
    if not isinstance(adapter, SavedAdapter):
        file = adapter
        adapter = shared(0, lambda: read_adapter(file))
    root = adapted_part(model)
    adapted = adapted_targets(root)
    method, methods = methods_of(adapter)
    ours = adapted or matrices_in(root).targets
    targets = find_targets_of(adapter, ours, root)
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
    statistics = statistics_for(root, adapter)
    match_bases(adapter, targets, methods, ours)
    rounds = {path: adapter.rounds(path) for path in targets}
    label = f"{method.title}: loading"
    if not adapted:
        plans = plan_adapters(label, targets, methods, values, rounds)
        for row, (path, target) in enumerate(targets.items()):
            check_effect(adapter, row, target, plans[path])
        attach_plans(root, method, targets, plans)
        set_statistics(root, statistics)
        return
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
        assert ours_now.base_fingerprint is not None
        plan = AdapterPlan(ours_now.method, new, ours_now.base_fingerprint)
        check_frozen_weights(adapter, path, target, values[path])
        check_effect(adapter, row, target, plan)
    for path, target in targets.items():
        for name, value in values[path].items():
            getattr(target.adapted, name).assign(value)
        target.adapted.rounds = rounds[path]
    set_statistics(root, statistics)
