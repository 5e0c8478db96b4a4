"""Checks whether a method can adapt a model, before anything is touched."""

import warnings
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_svdtune.hosts.embeddings import is_reversible, why_not_adaptable
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import METHODS, Method, has_reverse, nearest
from keras_svdtune.methods.data_method import DataMethod
from keras_svdtune.methods.dropout import dropout_of
from keras_svdtune.methods.pissa import QUANTIZATIONS
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.model.state import OfAdapters, enabled_method
from keras_svdtune.model.targets import (
    adapted_targets,
    find_targets,
    layers_by_path,
)
from keras_svdtune.runtime.keras_internals import layers_in, own_variables
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model, Tensor


def checked_method(method: Any) -> Method:
    """Returns `method`, or raises an error with advice if it is no `Method`."""
    if isinstance(method, Method):
        return method
    known = [cls.title for cls in METHODS.values()]
    if isinstance(method, type) and issubclass(method, Method):
        raise ValueError(
            f"Expected a method with its settings, `{method.__name__}(...)`. "
            f"Received the class: {method.__name__}"
        )
    raise ValueError(
        "`method` must be a config object such as `SVF()`. "
        f"Received: {method!r}. {nearest(str(method), known)}"
    )


def targets_for(
    root: Model,
    method: Method,
    target_layer_names: Iterable[str] | None,
    beside_others: bool = False,
    exclude: Iterable[str] = (),
) -> dict[str, Target]:
    """Returns the targets to adapt, having checked that `method` fits each.

    Args:
        beside_others: whether they may have adapters already. Then what the
            first of these was checked for is not checked again.
    """
    if adapted_targets(root) and not beside_others:
        raise ValueError(
            f"Model '{root.name}' already has an adapter "
            f"({enabled_method(root)}). Call `merge_adapter()` or "
            "`remove_adapter()` first; or give this one a `name`, to have "
            "both."
        )
    targets = find_targets(root, target_layer_names, beside_others, exclude)
    if target_layer_names is None and not method.banks:
        banks = [p for p, x in targets.items() if x.view.batch]
        targets = {p: x for p, x in targets.items() if p not in banks}
        if banks and targets:
            warnings.warn(
                f"{method.title} takes no banks of matrices; left out: {banks}",
                stacklevel=4,
            )
        elif banks:
            raise ValueError(
                f"{method.title} takes no bank of matrices, and model "
                f"'{root.name}' has nothing else."
            )
    if beside_others:
        return targets
    check_dropout(targets, method)
    for path, target in targets.items():
        check_fit(path, target, method)
    check_holders(root, targets)
    return targets


def check_holders(root: Model, targets: dict[str, Target]) -> None:
    """Checks that no other layer reads or writes what a target's owner has.

    A layer with an adapter computes W', and whoever else holds the kernel
    computes W, until the two are merged. Two adapters on one kernel would be
    merged into it one after the other.

    Raises:
        ValueError: a kernel has two holders, or a layer of the model writes to
            a kernel although that is frozen. The error names both layers.
    """
    kernels: dict[int, tuple[str, Target]] = {}
    for path, target in targets.items():
        name, before = kernels.setdefault(id(target.kernel), (path, target))
        if before is not target:
            raise ValueError(_shared(name, path))
    for path, layer in layers_by_path(layers_in(root)).items():
        if isinstance(layer, keras.layers.SpectralNormalization):
            raise ValueError(
                f"Layer '{path}' writes to the kernel of "
                f"'{layer.layer.path}' whenever it is called in training, "
                "frozen or not, so the base would not stay what it is. Build "
                "the model with the layer itself in place of its "
                "SpectralNormalization."
            )
        for held in (*vars(layer).values(), *own_variables(layer)):
            holder = kernels.get(id(held))
            if holder is not None and holder[1].owner is not layer:
                raise ValueError(_shared(holder[0], path))


def _shared(first: str, second: str) -> str:
    return (
        f"Layers '{first}' and '{second}' share one kernel. Before it is "
        "merged an adapter changes what one of them computes, and then what "
        "both do. Leave them out of `target_layer_names`, or give each a "
        "kernel of its own."
    )


def check_fit(path: str, target: Target, method: Method) -> None:
    """Raises a ValueError that names the layer if `method` cannot adapt it."""
    problem = _problem_of(target, method)
    if problem:
        raise ValueError(
            f"Layer '{path}' {problem}, or leave it out of "
            "`target_layer_names`."
        )
    check_dropout({path: target}, method)
    rows, columns = target.view.shape
    try:
        method.for_shape(target.view.shape)
        if target.view.count is not None and not method.banks:
            raise ValueError(f"{method.title} takes no bank of matrices.")
    except ValueError as error:
        raise ValueError(
            f"Layer '{path}', a matrix of {rows} x {columns}: {error}"
        ) from None


def check_dropout(targets: dict[str, Target], method: Method) -> None:
    """Checks that all targets have a branch, of whose x some can be dropped.

    Embeddings have none either, but there dropout is left out, as in PEFT.

    Raises:
        ValueError: the method has dropout, and layers compute with one merged
            kernel. The error names them.
    """
    if not dropout_of(method):
        return
    merged = {
        path: target
        for path, target in targets.items()
        if target.direct or target.view.count is not None
    }
    if merged:
        names = list(dict.fromkeys(x.name for x in merged.values()))
        paths = list(merged)
        raise ValueError(
            f"{method} drops a part of the input of its branch in training, "
            f"and {len(paths)} layers have no branch, since they compute with "
            f"a merged kernel: {', '.join(paths[:3])}"
            f"{' ...' if len(paths) > 3 else ''}. Leave them out by "
            f"`exclude={names}`, or enable {method.title} without `dropout`."
        )


def _problem_of(target: Target, method: Method) -> str:
    """Returns why a layer cannot be adapted, and a remedy; empty if it can."""
    layer = target.owner
    if (theirs := target.adapter_of_keras) is not None:
        return f"has Keras {theirs} enabled; load the model without it"
    if target.quantization_mode not in (None, *QUANTIZATIONS):
        return (
            f"is quantized to {target.quantization_mode}, and adapters know "
            f"{' and '.join(QUANTIZATIONS)} only"
        )
    if isinstance(method, ReplacesBase) and (
        why := _not_to_replace(target, method)
    ):
        return f"{why}; enable {method.title} without `{method.option}`"
    if isinstance(method, DataMethod) and (why := _unseen(target, method)):
        return f"{why}; name it in `exclude`"
    if target.constraint is not None:
        return (
            "has a constraint on its kernel, which an adapter cannot respect; "
            "build it without one"
        )
    if target.is_embedding and (problem := why_not_adaptable(layer)):
        return problem
    if target.is_embedding and not method.embeddings:
        return f"is an embedding, which {method.title} does not adapt"
    tied = is_reversible(layer) and layer.tie_weights
    if tied and not has_reverse(method):
        return (
            f"multiplies by its table backwards too, and {method.title} has "
            "no `reverse`; write one for the method"
        )
    return ""


def _unseen(target: Target, method: DataMethod) -> str:
    """Returns why data says nothing of a kernel; empty if it does."""
    if method.statistic == "inputs" and target.direct:
        return (
            "is a kernel that another layer reads, so that "
            f"{method.title} does not see what comes into it"
        )
    if method.statistic == "gradient" and target.quantization_mode is not None:
        return (
            f"is quantized to {target.quantization_mode}, and has no gradient "
            f"for {method.title} to start from"
        )
    return ""


def _not_to_replace(target: Target, method: ReplacesBase) -> str:
    """Returns why a layer cannot get another kernel; empty if it can."""
    if target.direct:
        return "is a kernel that another layer reads, not a layer"
    if target.quantization_mode is not None:
        return f"is quantized to {target.quantization_mode} already"
    if type(target.owner) not in (keras.layers.Dense, keras.layers.EinsumDense):
        return (
            f"is a {type(target.owner).__name__}, and only Dense and "
            "EinsumDense layers get another base"
        )
    if not method.quantization and target.kernel.dtype == "float64":
        return "holds a float64 kernel, and the one in its place is of float32"
    if method.quantization and target.owner.compute_dtype == "float16":
        return "computes in float16, which Keras does not quantize"
    return ""


def check_merged(targets: dict[str, Target], beside: OfAdapters) -> None:
    """Raises a ValueError that names what would be merged and is not finite.

    It goes through all layers: once the first is merged, its W is lost. And
    through what trains besides, as `beside_of` has it.
    """
    check_trained(targets, "merged")
    for key, variable, _ in beside:
        if not is_finite(variable.value):
            raise ValueError(
                f"'{key}', which trains besides the adapter, holds NaN or "
                "infinity, so the adapter cannot be merged. The training "
                "diverged: take a lower learning rate, or "
                "`remove_adapter()`. The model is as it was."
            )
    for path, target in targets.items():
        if not is_finite(target.merged_kernel()):
            raise ValueError(
                f"The adapter of layer '{path}' gives a kernel too large for "
                f"{target.base_dtype}. Load or train it again, or call "
                "`remove_adapter()`. The model is as it was."
            )


def check_trained(targets: dict[str, Target], verb: str) -> None:
    """Raises a ValueError that names a layer whose adapter is not finite."""
    for path, target in targets.items():
        for name, variable in target.adapted.variables_by_name(True).items():
            if not is_finite(variable.value):
                raise ValueError(
                    f"'{name}' of layer '{path}' holds NaN or infinity, so the "
                    f"adapter cannot be {verb}. The training diverged: take a "
                    "lower learning rate, or `remove_adapter()`. The model is "
                    "as it was."
                )


def is_finite(x: Tensor) -> bool:
    """Says whether a tensor holds neither NaN nor infinity."""
    return bool(to_numpy(ops.all(ops.isfinite(x))))
