"""Checks that an adapter file belongs to a model, down to its effect."""

import numpy as np
from keras import ops

from keras_svdtune.adapter.fingerprint import (
    effect,
    fingerprint,
    matches,
    same_effect,
)
from keras_svdtune.adapter.plan import AdapterPlan, Values
from keras_svdtune.files.format import EFFECTS, FINGERPRINTS, SavedAdapter
from keras_svdtune.files.renumbered import Kernels, listed
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import (
    METHODS,
    Method,
    Weight,
    WeightValues,
    nearest,
)
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.model.checks import check_holders
from keras_svdtune.model.targets import layers_by_path
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Json, Model


def methods_of(adapter: SavedAdapter) -> tuple[Method, dict[str, Method]]:
    """Returns the file's method, and the method of each layer by its path.

    Raises a ValueError if this release has no such method, or if the file
    lacks what identifies its layers.
    """
    _check_rows(adapter)
    about, source = adapter.about, adapter.source
    method = _method(about["method"], about["settings"], source)
    return method, {
        layer_path: _method(about["method"], entry["settings"], source)
        if "settings" in entry
        else method
        for layer_path, entry in about["layers"].items()
    }


def _check_rows(adapter: SavedAdapter) -> None:
    """Checks that the file identifies the base of each of its layers."""
    count = len(adapter.about["layers"])
    for name, columns in ((FINGERPRINTS, 5), (EFFECTS, 8)):
        checked_array(adapter, name, (count, columns), "float32")


def _method(name: str, settings: Json, source: str) -> Method:
    if name not in METHODS:
        raise ValueError(
            f"{source} was saved with the method {name!r}, which this release "
            f"does not have. {nearest(name, list(METHODS))}"
        )
    try:
        return METHODS[name](**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source} has settings that {METHODS[name].__name__} does not "
            f"accept: {error}"
        ) from None


def find_targets_of(
    adapter: SavedAdapter, ours: dict[str, Target], root: Model
) -> dict[str, Target]:
    """Finds the model's target for each layer of the file, by path.

    `ours` holds the model's targets by path; `root`, the model, is for error
    messages. Raises a ValueError unless path and kernel shape agree.
    """
    targets = {}
    layers = adapter.about["layers"]
    kernels = _kernels_of(ours)
    for row, (path, entry) in enumerate(layers.items()):
        expected = tuple(entry["kernel_shape"])
        target = ours.get(path)
        # Of more layers than the model has, one has no target in any case: no
        # kernel is compared for a file of a million layers.
        if len(layers) <= len(ours) and (
            target is None or target.view.kernel_shape != expected
        ):
            target = _renumbered(adapter, path, row, ours, kernels) or target
        if target is None:
            other = layers_by_path(layers_in(root)).get(path)
            if other is not None:
                raise ValueError(
                    f"{adapter.source} does not fit. Layer '{path}' is a "
                    f"{type(other).__name__}, which cannot be adapted. Leave "
                    "it out of `target_layer_names`."
                )
            raise ValueError(
                f"{adapter.source} has an adapter for layer '{path}' of "
                f"a {adapter.about.get('model_class')}, which this model does "
                f"not have. {nearest(path, list(ours))}"
            )
        if target.view.kernel_shape != expected:
            raise ValueError(
                f"{adapter.source} was made for another model: layer "
                f"'{path}' has a kernel of shape {target.view.kernel_shape}, "
                f"expected {expected}."
            )
        targets[path] = target
    try:
        check_holders(root, targets)
    except ValueError as error:
        raise ValueError(f"{adapter.source} does not fit. {error}") from None
    return targets


def _kernels_of(ours: dict[str, Target]) -> Kernels:
    return Kernels(
        ((p, x.view.kernel_shape, x.base_dtype) for p, x in ours.items()),
        lambda path: fingerprint_of(ours[path]),
    )


def _renumbered(
    adapter: SavedAdapter,
    path: str,
    row: int,
    ours: dict[str, Target],
    kernels: Kernels,
) -> Target | None:
    """Finds the model's target for the `row`-th layer of a file by its kernel.

    Returns None if there is none; raises a ValueError if there are several.
    """
    entry = adapter.about["layers"][path]
    found = kernels.like(
        path,
        tuple(entry["kernel_shape"]),
        entry["dtype"],
        adapter.arrays[FINGERPRINTS][row],
    )
    if len(found) > 1:
        raise ValueError(
            f"{adapter.source} has an adapter for layer '{path}', which is "
            "ambiguous here: Keras has numbered the layers of this model "
            f"otherwise, and the kernels of {listed(found)} are equal. Build "
            "the model first in its process, or name its layers."
        )
    return ours[found[0]] if found else None


def values_for(
    adapter: SavedAdapter,
    targets: dict[str, Target],
    methods: dict[str, Method],
) -> dict[str, Values]:
    """Returns the file's arrays for each layer, by weight name, all checked."""
    values: dict[str, Values] = {}
    arrays = adapter.arrays
    known = {FINGERPRINTS, EFFECTS, *adapter.beside}
    for path, target in targets.items():
        method, view = methods[path], target.view
        values[path] = {}
        for weight in method.weights(view.shape):
            key = array_key(path, method, weight.name)
            if weight.saved or (key in arrays and not weight.overwritten):
                values[path][weight.name] = checked_array(
                    adapter,
                    key,
                    view.batch + weight.shape,
                    dtype_in_file(weight),
                )
                known.add(key)
    unknown = sorted(set(arrays) - known)
    if unknown:
        raise ValueError(
            f"{adapter.source} holds '{unknown[0]}', which belongs to none of "
            "its layers."
        )
    return values


def checked_array(
    adapter: SavedAdapter, key: str, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """Returns an array of the file, having checked what it holds."""
    array = adapter.arrays.get(key)
    if array is None or array.shape != shape:
        found = "nothing" if array is None else f"shape {array.shape}"
        raise ValueError(
            f"{adapter.source} should hold '{key}' of shape {shape}. "
            f"Found: {found}"
        )
    if array.dtype != dtype or not np.isfinite(array).all():
        raise ValueError(
            f"'{key}' of {adapter.source} should hold finite {dtype} values. "
            f"Found: {array.dtype}"
        )
    return array


def match_bases(
    adapter: SavedAdapter,
    targets: dict[str, Target],
    methods: dict[str, Method],
    ours: dict[str, Target],
) -> None:
    """Checks that the kernels are the file's; renumbers targets by kernel."""
    kernels = _kernels_of(ours)
    for row, (path, target) in enumerate(targets.items()):
        entry = adapter.about["layers"][path]
        theirs = adapter.arrays[FINGERPRINTS][row]
        dtypes = (entry["dtype"], target.base_dtype)
        method = methods[path]
        if (
            isinstance(method, ReplacesBase)
            and method.quantization
            and len({*dtypes}) > 1
        ):
            raise ValueError(
                f"{adapter.source} was trained on a residual of a "
                f"{dtypes[0]} kernel, and layer '{path}' has a "
                f"{dtypes[1]} kernel, which leaves another. Load the base "
                f"model in {dtypes[0]}."
            )
        if not matches(fingerprint_of(target), theirs, *dtypes):
            other = _renumbered(adapter, path, row, ours, kernels)
            if other is not None:
                targets[path] = other
                continue
            raise ValueError(
                f"{adapter.source} was trained on other weights: the kernel of "
                f"layer '{path}' is not the one of its base "
                f"({adapter.about.get('model_class')}). Load the base model "
                "that it was trained on."
            )
    if len({id(x.kernel) for x in targets.values()}) < len(targets):
        raise ValueError(
            f"{adapter.source} has two layers for one of this model's, by "
            "their kernels. Load the base model that it was trained on."
        )


def check_effect(
    adapter: SavedAdapter, row: int, target: Target, plan: AdapterPlan
) -> None:
    """Checks that the weights to load have the effect they had in training."""
    base, method = plan.replaced, plan.method
    if base is not None and base.kernel is not None:
        matrix = base.kernel.matrix()
    else:
        matrix = target.matrix()
    weights = WeightValues(target.view.shape)
    for weight in method.weights(target.view.shape):
        value = plan.values.get(weight.name)
        dtype = weight.dtype or target.owner.variable_dtype
        if value is None:
            value = ops.zeros(target.view.batch + weight.shape)
        setattr(weights, weight.name, ops.cast(value, dtype))
    path = list(adapter.about["layers"])[row]
    dtypes = (adapter.about["layers"][path]["dtype"], target.base_dtype)
    if same_effect(
        effect(method, weights, matrix, adapter.rounds(path)),
        adapter.arrays[EFFECTS][row],
        float(plan.base_fingerprint[0]),
        *dtypes,
    ):
        return
    if isinstance(method, ReplacesBase) and method.quantization:
        raise ValueError(
            f"{adapter.source} would not do here what it did where it was "
            f"trained: the kernel of layer '{path}' is quantized "
            "otherwise here, perhaps by another release of Keras."
        )
    raise ValueError(
        f"{adapter.source} would not do here what it did where it was "
        f"trained: the singular vectors of layer '{path}' come out "
        "otherwise (another sign, or turned among singular values that "
        f"are nearly equal; there {dtypes[0]}, here {dtypes[1]}). Save it "
        "again with `save_adapter(path, include_basis=True)` where it was "
        "trained."
    )


def check_basis_can_change(
    adapter: SavedAdapter, path: str, target: Target
) -> None:
    """Checks that a basis made by another rule than the file's can be made."""
    if target.replaced and target.adapted.rounds != adapter.rounds(path):
        raise ValueError(
            f"{adapter.source} was written by an earlier release, which "
            f"computed other singular vectors of layer '{path}', and the "
            "kernel that they are of was replaced here. Call "
            "`remove_adapter()` first, then load."
        )


def check_frozen_weights(
    adapter: SavedAdapter, path: str, target: Target, values: Values
) -> None:
    """Checks that a replaced kernel fits the frozen weights of the file."""
    if not target.replaced:
        return
    ours = target.adapted
    trained = ours.variables_by_name(trainable=True)
    for name, value in values.items():
        key = f"{ours.method.name}_{name}"
        now = to_numpy(getattr(ours, name).value)
        if key not in trained and not np.array_equal(now, value):
            raise ValueError(
                f"{adapter.source} holds another '{name}' for layer "
                f"'{path}' than the one that this model's base was "
                "made for. Load it into the base model, before "
                "anything is enabled there."
            )


def fingerprint_of(target: Target) -> np.ndarray:
    """Returns the fingerprint of the W that an adapter file belongs to."""
    adapter = target.adapter
    if adapter is not None and adapter.replaced is not None:
        return adapter.replaced.float_fingerprint
    if adapter is not None and adapter.base_fingerprint is not None:
        return adapter.base_fingerprint
    return fingerprint(ops.convert_to_numpy(target.host_matrix()))


def array_key(path: str, method: Method, weight: str) -> str:
    """Returns the key of one array in an adapter file."""
    return f"{path}/{method.name}_{weight}"


def dtype_in_file(weight: Weight) -> str:
    """Returns the dtype of a weight in adapter files, whatever the model's."""
    return "int32" if weight.dtype == "int32" else "float32"
