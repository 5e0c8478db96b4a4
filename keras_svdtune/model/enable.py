"""Enables, merges, removes and disables adapters on a model."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from keras import ops

from keras_svdtune.adapter.plan import AdapterPlan
from keras_svdtune.hosts import attach
from keras_svdtune.hosts.replace_base import put_in_place, remember
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.model.checks import checked_method, targets_for
from keras_svdtune.model.freezing import freeze
from keras_svdtune.model.planning import plan_adapters
from keras_svdtune.model.recompile import prepare_reset
from keras_svdtune.model.state import (
    Enabled,
    adapted_part,
    enabled_models,
    keep_record,
    record_of,
    require_adapted,
)
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model


def enable_adapter(
    model: Model,
    method: Method,
    target_layer_names: Iterable[str] | None = None,
) -> None:
    """Adds an adapter to each target layer and freezes everything else.

    The kernels stay as they are, save for `PiSSA(rank, quantize="int4")`:
    before training every layer computes what it did, to the bit. (XLA may
    compile the ops around it into other loops, and round those differently:
    1e-6 relative on real models.) All targets are decomposed before the first
    is touched, so an error or an interrupt leaves the model as it was.
    Functions that the model, or a Task around it, had compiled are dropped, and
    an optimizer in use is replaced by a fresh one with the same settings.
    BatchNormalization is frozen too, as Keras' LoRA freezes it;
    `layer.trainable = True` thaws a layer by hand.

    Args:
        model: a KerasHub Backbone; a Task, which means its backbone; or any
            built `keras.Model`.
        method: the method with its settings, such as `SVF()`.
        target_layer_names: None for every Dense, EinsumDense and convolution
            and every bank of experts; or a list of layer names (`"query"`) and
            regular expressions that match a whole layer path (`".*ffw.*"`).

    Raises:
        ValueError: an adapter is enabled already, a target matches nothing, a
            layer cannot be adapted, or a kernel holds NaN or infinity.

    Example:

    ```python
    enable_adapter(gemma, SVF(), target_layer_names=["query", "value"])
    ```
    """
    root = adapted_part(model)
    method = checked_method(method)
    targets = targets_for(root, method, target_layer_names)
    plans = plan_adapters(
        f"{method.title}: decomposing", targets, dict.fromkeys(targets, method)
    )
    attach_plans(root, method, targets, plans)


def attach_plans(
    root: Model,
    method: Method,
    targets: dict[str, Target],
    plans: dict[str, AdapterPlan],
) -> None:
    """Attaches planned adapters to all layers, or on an error to none."""
    reset = prepare_reset(x.owner for x in targets.values())
    with contextlib.ExitStack() as undo:
        for path, target in targets.items():
            base = plans[path].replaced
            if base is not None and base.kernel is not None:
                undo.callback(remember(target, base.kernel))
                put_in_place(target, base.kernel)
        unfreeze = freeze(root)
        undo.callback(unfreeze)
        undo.callback(_detach_all, targets)
        for path, target in targets.items():
            # pop, so that no value is held beside the variable made of it.
            adapter = attach.attach_plan(target, plans.pop(path))
            adapter.share = 1.0 / len(targets)
        undo.pop_all()
    keep_record(root, Enabled(method, unfreeze))
    reset()


def _detach_all(targets: dict[str, Target]) -> None:
    for target in targets.values():
        if target.adapter is not None:
            attach.detach(target)


def replace_adapters(
    root: Model, method: Method, plans: dict[str, AdapterPlan]
) -> None:
    """Gives every adapted layer a new adapter, or on an error none of them.

    Frozen variables stay frozen, and `remove_adapter` gives the same base back.

    Args:
        method: the method of the new adapters.
        plans: the new adapter of each adapted layer, by its path.

    Raises:
        ValueError: the model has no adapter of its own.
    """
    targets = require_adapted(root)
    owners = enabled_models(root, targets)
    before = {p: (x.adapted, type(x.owner)) for p, x in targets.items()}
    reset = prepare_reset(x.owner for x in targets.values())
    try:
        for path, target in targets.items():
            attach.detach(target)
            adapter = attach.attach_plan(target, plans[path])
            adapter.share = before[path][0].share
    except BaseException:
        for path, target in targets.items():
            attach.put_back(target, *before[path])
        raise
    reset()
    for owner in owners:
        keep_record(owner, dataclasses.replace(record_of(owner), method=method))


def merge_adapter(model: Model) -> None:
    """Merges every adapter into its kernel: W becomes W'.

    The layers are plain Keras layers again, with the outputs of the adapted
    ones (1e-5 relative in float32) and no overhead. What was trainable before
    the adapter was enabled is trainable again.

    Args:
        model: a model with an adapter.

    Raises:
        ValueError: the model has no adapter, or a merged kernel would hold NaN
            or infinity; then nothing is merged.
    """
    for path, target in require_adapted(model).items():
        # All of them before the first is merged: W would be lost.
        merged = target.merged_kernel()
        if not bool(to_numpy(ops.all(ops.isfinite(merged)))):
            raise ValueError(
                f"The adapter of layer '{path}' holds NaN or infinity, or "
                f"gives a kernel too large for {target.base_dtype}. Load or "
                "train it again, or call `remove_adapter()`."
            )
    for enabled in _give_back(model, attach.merge):
        enabled.unfreeze()


def remove_adapter(model: Model) -> None:
    """Removes every adapter: the base model again, bit for bit.

    After `PiSSA(rank, quantize="int4")` there is no W to give back. The layers
    stay quantized and compute, to one more rounding of the kernel, what the
    model did just after enabling.

    Args:
        model: a model with an adapter. What it learned is lost unless
            `save_adapter` wrote it to a file.

    Raises:
        ValueError: the model has no adapter.
    """
    for enabled in _give_back(model, attach.remove):
        for variable, base in enabled.statistics.values():
            variable.assign(base)
        enabled.unfreeze()


def _give_back(model: Model, end: Callable[[Target], None]) -> list[Enabled]:
    root = adapted_part(model)
    targets = require_adapted(root)
    owners = enabled_models(root, targets)
    reset = prepare_reset(x.owner for x in targets.values())
    for target in targets.values():
        end(target)
    reset()
    done = [record_of(owner) for owner in owners]
    for owner in owners:
        keep_record(owner, None)
    return done


@contextlib.contextmanager
def adapter_disabled(model: Model) -> Iterator[None]:
    """Temporarily disables the adapter: outputs equal the base's exactly.

    If enabling quantized the base, they equal those just after enabling.

    The trainables are set to values that change nothing, and restored at the
    end, so compiled functions stay valid. Training within is an error at the
    end, since it could not be kept.

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
    targets = require_adapted(model)
    adapters = [x.adapted for x in targets.values()]
    trained = [
        (v, to_numpy(v.value).copy())
        for adapter in adapters
        for v in adapter.variables_by_name(trainable=True).values()
    ]
    statistics = [
        (variable, base, to_numpy(variable.value).copy())
        for owner in enabled_models(adapted_part(model), targets)
        for variable, base in record_of(owner).statistics.values()
    ]
    neutral: list[np.ndarray] = []
    after: list[np.ndarray] = []
    try:
        for adapter in adapters:
            adapter.reset()
        neutral = [to_numpy(v.value).copy() for v, _ in trained]
        for variable, base, _ in statistics:
            variable.assign(base)
        yield
        after = [to_numpy(v.value).copy() for v, _ in trained]
    finally:
        for variable, value in trained:
            variable.assign(value)
        for variable, _, value in statistics:
            variable.assign(value)
    if not all(map(np.array_equal, after, neutral)):
        raise RuntimeError(
            "The adapter was trained or loaded while it was disabled. It has "
            "its earlier values again; train outside `adapter_disabled()`."
        )
