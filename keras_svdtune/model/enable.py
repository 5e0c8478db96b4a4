"""Enabling, merging, removing and switching off adapters on a model."""

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import keras_hub
import numpy as np
from keras.layers import Embedding

from keras_svdtune.adapter.plan import Plan
from keras_svdtune.hosts import attach, embeddings, host, quantized
from keras_svdtune.hosts.direct_kernels import RawKernel
from keras_svdtune.hosts.replace_base import put_in_place, remember
from keras_svdtune.methods.base import METHODS, Method, nearest
from keras_svdtune.model.freezing import freeze
from keras_svdtune.model.moving_statistics import Statistics
from keras_svdtune.model.planning import plan_layers
from keras_svdtune.model.recompile import prepare_reset
from keras_svdtune.model.targets import adapted_layers, all_layers, find_targets
from keras_svdtune.runtime.processes import to_numpy


@dataclasses.dataclass(frozen=True)
class _Enabled:
    """What was done to a model, kept until it is undone."""

    method: Method
    unfreeze: Callable[[], None]
    statistics: Statistics


# The models that have one. What was done is kept on the model itself: it holds
# the model too, so a dict from here would keep every model alive for ever.
_ENABLED: weakref.WeakSet[keras.Model] = weakref.WeakSet()
_RECORD = "_svdtune_enabled"


def _record(model: keras.Model) -> _Enabled:
    return getattr(model, _RECORD)


def _keep_record(model: keras.Model, enabled: _Enabled | None) -> None:
    # Not by setattr: Keras would look into it for layers and variables.
    if enabled is None:
        object.__delattr__(model, _RECORD)
        _ENABLED.discard(model)
    else:
        object.__setattr__(model, _RECORD, enabled)
        _ENABLED.add(model)


def enable_adapter(
    model: keras.Model,
    method: Method,
    target_layer_names: Iterable[str] | None = None,
) -> None:
    """Adds an adapter to each target layer and freezes everything else.

    The kernels stay as they are, save for `PiSSA(rank, quantize="int4")`:
    before training every layer computes what it did, to the bit. (XLA may
    compile the ops around it into other loops, and round those differently:
    1e-6 relative on real models.) All targets are decomposed before the first
    is touched, so an error or an interrupt leaves the model as it was.
    Functions that the model, or a Task around it, had compiled are dropped,
    and an optimizer in use is replaced by a fresh one with the same settings.

    Args:
        model: a KerasHub Backbone; a Task, which means its backbone; or any
            built `keras.Model`.
        method: the method with its settings, such as `SVF()`.
        target_layer_names: None for every Dense, EinsumDense and convolution
            and every bank of experts; or a list of layer names (`"query"`)
            and regular expressions that match a whole layer path (`".*ffw.*"`).

    Raises:
        ValueError: an adapter is enabled already, a target matches nothing,
            a layer cannot be adapted, or a kernel holds NaN or infinity.

    Example:

    ```python
    enable_adapter(gemma, SVF(), target_layer_names=["query", "value"])
    ```
    """
    root = adapted_part(model)
    method = checked_method(method)
    layers = targets_for(root, method, target_layer_names)
    plans = plan_layers(
        f"{method.title}: decomposing", layers, dict.fromkeys(layers, method)
    )
    attach_plans(root, method, layers, plans)


def attach_plans(
    root: keras.Model,
    method: Method,
    layers: dict[str, Any],
    plans: dict[str, Plan],
) -> None:
    """Attaches what `enable_adapter` has prepared, to all layers or none."""
    statistics = Statistics(root)
    reset = prepare_reset(attach.owner_of(x) for x in layers.values())
    with contextlib.ExitStack() as undo:
        for path, layer in layers.items():
            base = plans[path].replaced
            if base is not None and base.kernel is not None:
                undo.callback(remember(layer, base.kernel))
                put_in_place(layer, base.kernel)
        unfreeze = freeze(root)
        undo.callback(unfreeze)
        undo.callback(_detach_all, layers)
        for path, layer in layers.items():
            # pop: once an array is a variable, it is held once, not twice.
            attach.attach_plan(layer, plans.pop(path))
            layer.adapter.share = 1.0 / len(layers)
            layer.adapter.statistics = statistics
        undo.pop_all()
    _keep_record(root, _Enabled(method, unfreeze, statistics))
    reset()


def _detach_all(layers: dict[str, Any]) -> None:
    for layer in layers.values():
        if attach.adapter_of(layer) is not None:
            attach.detach(layer)


def replace_adapters(
    root: keras.Model, method: Method, plans: dict[str, Plan]
) -> None:
    """Gives every adapted layer of `root` another adapter, or none of them.

    What is frozen stays frozen, and `remove_adapter` gives the same base back.

    Args:
        root: a model with an adapter.
        method: what the model is adapted by from now on.
        plans: an adapter for each adapted layer, by its path.

    Raises:
        ValueError: the model has no adapter of its own.
    """
    layers = require_adapted(root)
    owners = _owners(root, layers)
    before = {
        path: (x.adapter, type(attach.owner_of(x)))
        for path, x in layers.items()
    }
    reset = prepare_reset(attach.owner_of(x) for x in layers.values())
    try:
        for path, layer in layers.items():
            attach.detach(layer)
            attach.attach_plan(layer, plans[path])
            layer.adapter.share = before[path][0].share
            layer.adapter.statistics = before[path][0].statistics
    except BaseException:
        for path, layer in layers.items():
            attach.put_back(layer, *before[path])
        raise
    reset()
    for owner in owners:
        _keep_record(owner, dataclasses.replace(_record(owner), method=method))


def merge_adapter(model: keras.Model) -> None:
    """Folds every adapter into its kernel: W becomes W'.

    The layers are plain Keras layers again, with the outputs of the adapted
    ones (1e-5 relative in float32), no overhead, and what was trainable before
    the adapter was enabled is trainable again.

    Args:
        model: a model with an adapter.

    Raises:
        ValueError: the model has no adapter.
    """
    for enabled in _give_back(model, attach.merge):
        enabled.unfreeze()


def remove_adapter(model: keras.Model) -> None:
    """Takes every adapter away: the base model again, bit for bit.

    After `PiSSA(rank, quantize="int4")` there is no W to give back. Then it
    leaves plain quantized layers that compute, to one more rounding of the
    kernel, what the model did just after enabling.

    Args:
        model: a model with an adapter. What it learned is lost unless
            `save_adapter` wrote it to a file.

    Raises:
        ValueError: the model has no adapter.
    """
    for enabled in _give_back(model, attach.take_away):
        enabled.statistics.assign()
        enabled.unfreeze()


def _give_back(
    model: keras.Model, end: Callable[[Any], None]
) -> list[_Enabled]:
    root = adapted_part(model)
    layers = require_adapted(root)
    owners = _owners(root, layers)
    reset = prepare_reset(attach.owner_of(x) for x in layers.values())
    for layer in layers.values():
        end(layer)
    reset()
    done = [_record(owner) for owner in owners]
    for owner in owners:
        _keep_record(owner, None)
    return done


def _owners(root: keras.Model, layers: dict[str, Any]) -> list[keras.Model]:
    """The models in `root` that `layers` were enabled on."""
    inside = {id(x) for x in all_layers(root)}
    ours = [id(attach.owner_of(x)) for x in layers.values()]
    for owner in list(_ENABLED):
        if id(owner) not in inside and any(
            id(attach.owner_of(x)) in ours
            for x in adapted_layers(owner).values()
        ):
            raise ValueError(
                f"The adapter was enabled on '{owner.name}', which holds "
                f"'{root.name}' and more. Call this on '{owner.name}'."
            )
    return [m for m in _ENABLED if id(m) in inside]


@contextlib.contextmanager
def adapter_disabled(model: keras.Model) -> Iterator[None]:
    """Within it the model computes what the base computes, to the bit.

    Or what it did just after enabling, if that quantized the base.

    The trainables are set to values that change nothing, and back at the
    end; so functions that were compiled stay valid. What is trained within is
    refused at the end, since it could not be kept.

    Args:
        model: a model with an adapter.

    Example:

    ```python
    with adapter_disabled(gemma):
        before = gemma.generate("Hello")
    ```

    Raises:
        ValueError: the model has no adapter, or it was enabled on a model
            around this one.
        RuntimeError: the trainables changed within.
    """
    adapters = [x.adapter for x in require_adapted(model).values()]
    pairs = [
        (v, to_numpy(v.value).copy())
        for adapter in adapters
        for v in adapter.variables_by_name(trainable=True).values()
    ]
    root = adapted_part(model)
    known = [_record(x).statistics for x in _owners(root, adapted_layers(root))]
    moved = [statistics.moved() for statistics in known]
    neutral: list[Any] = []
    after: list[Any] = []
    try:
        for adapter in adapters:
            adapter.reset()
        neutral = [to_numpy(v.value).copy() for v, _ in pairs]
        for statistics in known:
            statistics.assign()
        yield
        after = [to_numpy(v.value).copy() for v, _ in pairs]
    finally:
        for variable, value in pairs:
            variable.assign(value)
        for statistics, values in zip(known, moved, strict=True):
            statistics.assign(values)
    if not all(map(np.array_equal, after, neutral)):
        raise RuntimeError(
            "The adapter was trained or loaded while it was disabled. It has "
            "its earlier values again; train outside `adapter_disabled()`."
        )


def adapted_part(model: Any) -> keras.Model:
    """The backbone of a Task; any other model itself."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a keras.Model, a keras_hub Backbone or a Task. "
            f"Received: {model!r} (of type {type(model).__name__})"
        )
    return model.backbone if isinstance(model, keras_hub.models.Task) else model


def require_adapted(model: keras.Model) -> dict[str, Any]:
    """The adapted layers by path, or an error if there are none."""
    layers = adapted_layers(adapted_part(model))
    if not layers:
        raise ValueError(
            f"Model '{model.name}' has no adapter. Enable one first, e.g. with "
            "`enable_svf()`."
        )
    return layers


def statistics_of(model: keras.Model) -> Statistics:
    """The moving statistics of an adapted model, and what they were."""
    root = adapted_part(model)
    if root in _ENABLED:
        return _record(root).statistics
    return Statistics(root, known=False)


def enabled_method(model: keras.Model) -> Method:
    """The method that is enabled on `model`, with the user's settings."""
    root = adapted_part(model)
    if root in _ENABLED:
        return _record(root).method
    return next(iter(require_adapted(root).values())).adapter.method


def checked_method(method: Any) -> Method:
    """`method`, or an error that says how to write one."""
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
    root: keras.Model,
    method: Method,
    target_layer_names: Iterable[str] | None,
) -> dict[str, Any]:
    """The target layers, each fit for `method`; touches nothing."""
    if adapted_layers(root):
        raise ValueError(
            f"Model '{root.name}' already has an adapter "
            f"({enabled_method(root)}). Call `merge_adapter()` or "
            "`remove_adapter()` first."
        )
    layers = find_targets(root, target_layer_names)
    if target_layer_names is None and not method.banks:
        banks = [p for p, x in layers.items() if attach.view_of(x).batch]
        layers = {p: x for p, x in layers.items() if p not in banks}
        if banks and layers:
            warnings.warn(
                f"{method.title} takes no banks of matrices; left out: {banks}",
                stacklevel=4,
            )
        elif banks:
            raise ValueError(
                f"{method.title} takes no bank of matrices, and model "
                f"'{root.name}' has nothing else."
            )
    for path, layer in layers.items():
        check_layer(path, layer, method)
    return layers


def check_layer(path: str, layer: Any, method: Method) -> None:
    """Raises a ValueError that names the layer if `method` cannot adapt it."""
    if type(layer) not in host.HOSTS and not isinstance(layer, RawKernel):
        raise ValueError(
            f"Layer '{path}' is a {type(layer).__name__}, which cannot be "
            "adapted. Leave it out of `target_layer_names`."
        )
    check_fit(path, layer, method)


def check_fit(path: str, layer: Any, method: Method) -> None:
    """Raises a ValueError if the settings of layer and method do not fit."""
    if layer.lora_enabled:
        problem = "has Keras LoRA enabled; load the model without it"
    elif layer.quantization_mode not in (None, *quantized.MODES):
        problem = (
            f"is quantized to {layer.quantization_mode}, and adapters know "
            f"{' and '.join(quantized.MODES)} only"
        )
    elif method.replaces_base and (why := _not_to_replace(layer, method)):
        option = "replace_kernel" if method.base_mode is None else "quantize"
        problem = f"{why}; enable {method.title} without `{option}`"
    elif host.constraint_of(layer) is not None:
        problem = (
            "has a constraint on its kernel, which an adapter cannot respect; "
            "build it without one"
        )
    elif embeddings.problem_of(layer):
        problem = str(embeddings.problem_of(layer))
    elif isinstance(layer, Embedding) and not method.embeddings:
        problem = f"is an embedding, which {method.title} does not adapt"
    else:
        view = attach.view_of(layer)
        shape = view.shape
        try:
            method.check(shape)
            if view.count is not None and not method.banks:
                raise ValueError(f"{method.title} takes no bank of matrices.")
        except ValueError as error:
            raise ValueError(
                f"Layer '{path}', a matrix of {shape[0]} x {shape[1]}: {error}"
            ) from None
        return
    raise ValueError(
        f"Layer '{path}' {problem}, or leave it out of `target_layer_names`."
    )


def _not_to_replace(layer: Any, method: Method) -> str:
    """Why a layer cannot get another base; empty if it can."""
    if isinstance(layer, RawKernel):
        return "is a kernel that another layer reads, not a layer"
    if layer.quantization_mode is not None:
        return f"is quantized to {layer.quantization_mode} already"
    if type(layer) not in (keras.layers.Dense, keras.layers.EinsumDense):
        return (
            f"is a {type(layer).__name__}, and only Dense and EinsumDense "
            "layers get another base"
        )
    if method.base_mode and layer.compute_dtype == "float16":
        return "computes in float16, which Keras does not quantize"
    return ""
