"""Checks whether a method can adapt a model, before anything is touched."""

import warnings
from collections.abc import Iterable
from typing import Any

import keras

from keras_svdtune.hosts.embeddings import is_reversible, why_not_adaptable
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import METHODS, Method, has_reverse, nearest
from keras_svdtune.methods.pissa import QUANTIZATIONS
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.model.state import enabled_method
from keras_svdtune.model.targets import adapted_targets, find_targets
from keras_svdtune.runtime.types import Model


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
) -> dict[str, Target]:
    """Returns the targets to adapt, having checked that `method` fits each."""
    if adapted_targets(root):
        raise ValueError(
            f"Model '{root.name}' already has an adapter "
            f"({enabled_method(root)}). Call `merge_adapter()` or "
            "`remove_adapter()` first."
        )
    targets = find_targets(root, target_layer_names)
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
    for path, target in targets.items():
        check_fit(path, target, method)
    return targets


def check_fit(path: str, target: Target, method: Method) -> None:
    """Raises a ValueError that names the layer if `method` cannot adapt it."""
    problem = _problem_of(target, method)
    if problem:
        raise ValueError(
            f"Layer '{path}' {problem}, or leave it out of "
            "`target_layer_names`."
        )
    rows, columns = target.view.shape
    try:
        method.for_shape(target.view.shape)
        if target.view.count is not None and not method.banks:
            raise ValueError(f"{method.title} takes no bank of matrices.")
    except ValueError as error:
        raise ValueError(
            f"Layer '{path}', a matrix of {rows} x {columns}: {error}"
        ) from None


def _problem_of(target: Target, method: Method) -> str:
    """Returns why a layer cannot be adapted, and a remedy; empty if it can."""
    layer = target.owner
    if target.lora_enabled:
        return "has Keras LoRA enabled; load the model without it"
    if target.quantization_mode not in (None, *QUANTIZATIONS):
        return (
            f"is quantized to {target.quantization_mode}, and adapters know "
            f"{' and '.join(QUANTIZATIONS)} only"
        )
    if isinstance(method, ReplacesBase) and (
        why := _not_to_replace(target, method)
    ):
        return f"{why}; enable {method.title} without `{method.option}`"
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
