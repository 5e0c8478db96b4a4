"""Enables, merges and removes adapters on a model.

Each verb computes everything that takes long first, and then changes the model
in one `commit`, so that an error or an interrupt leaves the model as it was.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

from keras import ops

from keras_svdtune.adapter.plan import AdapterPlan
from keras_svdtune.hosts import attach
from keras_svdtune.hosts.replace_base import put_in_place, remember_value
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.data_method import DataMethod
from keras_svdtune.model.beside import trained_beside
from keras_svdtune.model.capture import (
    check_data,
    starts_from_data,
    without_data,
)
from keras_svdtune.model.checks import (
    check_merged,
    checked_method,
    targets_for,
)
from keras_svdtune.model.commit import commit
from keras_svdtune.model.for_a_while import adapter_disabled
from keras_svdtune.model.freezing import biases_to_train, freeze
from keras_svdtune.model.named_adapters import check_name, join
from keras_svdtune.model.names import (
    add_untrained,
    check_alone,
    methods_beside,
)
from keras_svdtune.model.patterns import methods_by_path
from keras_svdtune.model.planning import plan_adapters
from keras_svdtune.model.recompile import bring_up_to_date, note_change
from keras_svdtune.model.state import (
    DEFAULT,
    Enabled,
    adapted_part,
    beside_of,
    check_no_block,
    enabled_models,
    enabled_record,
    keep_record,
    record_of,
    require_adapted,
)
from keras_svdtune.model.targets import adapted_targets
from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.types import Model, Variable


def enable_adapter(
    model: Model,
    method: Method,
    target_layer_names: Iterable[str] | None = None,
    name: str | None = None,
    *,
    exclude: Iterable[str] = (),
    rank_pattern: Mapping[str, float] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    train_bias: bool = False,
) -> None:
    """Adds an adapter to each target layer and freezes everything else.

    The kernels stay as they are, save for `PiSSA(rank, quantize="int4")`:
    before training every layer computes what it did, to the bit. (XLA may
    compile the ops around it into other loops, and round those differently:
    1e-6 relative on real models.) All targets are decomposed before the first
    is touched, so an error or an interrupt leaves the model as it was.
    Functions that the model, or a Task around it, had compiled are dropped. An
    optimizer in use stays the same object with the same settings, and begins
    anew with the new trainables. BatchNormalization is frozen too, as Keras'
    LoRA freezes it. `layer.trainable = True` thaws a layer that holds no
    adapter, such as a new head; of a whole model it thaws nothing.

    With a `name` an adapter can be put beside others, of the same method on the
    same layers; it shares their frozen weights, and is set (`set_adapter`).
    What trains in `model` besides, such as the head of a Task, belongs to it
    then: it changes with the adapter, and `remove_adapter` gives back what it
    was. Give the Task and not its backbone, to have its head with the adapter.

    Args:
        model: a KerasHub Backbone; a Task, which means its backbone; or any
            built `keras.Model`.
        method: the method with its settings, such as `SVF()`.
        target_layer_names: None for every Dense, EinsumDense and convolution
            and every bank of experts; or a list of layer names (`"query"`) and
            regular expressions that match a whole layer path (`".*ffw.*"`).
        name: str or None. What `set_adapter` calls the adapter. None for the
            only one.
        exclude: names and expressions like those of `target_layer_names`, of
            layers to leave out.
        rank_pattern: dict or None. The rank of some layers, by names and
            expressions like those of `target_layer_names`:
            `{"query": 16, ".*ffw.*": 4}`. The others have `method.rank`.
        alpha_pattern: the same for alpha.
        train_bias: bool. Whether the biases of the adapted layers train too, in
            the dtype that they have; those of banks of experts stay frozen.
            Beside other adapters, theirs train also without it. They belong to
            the adapter then, as the head of a Task does to one with a `name`:
            they are in its file, `adapter_summary` counts them,
            `adapter_disabled` and `remove_adapter` give back what they were,
            and several named adapters have each their own. To train on what a
            file holds, enable the adapter with `train_bias` before you load it.

    Raises:
        ValueError: an adapter is enabled already, a name or an expression
            matches nothing, the method has no such setting, a layer gets two
            numbers, a layer cannot be adapted, no layer has a bias to train, or
            a kernel holds NaN or infinity. With a `name`: the model has an
            adapter of that name, or those that it has are of another method,
            on other layers, or without the biases.

    Example:

    ```python
    enable_adapter(gemma, SVF(), target_layer_names=["query", "value"])
    ```
    """
    root = adapted_part(model)
    check_no_block(root)
    method = checked_method(method)
    check_data(model, method)
    if name is not None:
        check_name(name)
    beside_others = name is not None and bool(adapted_targets(root))
    targets = targets_for(
        root, method, target_layer_names, beside_others, exclude
    )
    methods = methods_by_path(
        method, targets, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    biases = _biases(root, targets, train_bias, beside_others)
    known = None
    what = "decomposing"
    if isinstance(method, DataMethod):
        without: contextlib.AbstractContextManager[None]
        without = contextlib.nullcontext()
        if name is not None and beside_others:
            # Checked before the data is read, which may take long.
            methods = methods_beside(model, name, method, methods)
            without = adapter_disabled(model)
        else:
            methods = {
                path: methods[path].for_shape(target.view.shape)
                for path, target in targets.items()
            }
        with without:
            known = starts_from_data(model, method, methods, targets)
        method, what = dataclasses.replace(method, data=None), "planning"
        methods = without_data(methods)
    if name is not None and beside_others:
        add_untrained(model, name, method, methods, known)
        return
    plans = plan_adapters(f"{method.title}: {what}", targets, methods, known)

    def join_what_trains(undo: contextlib.ExitStack) -> None:
        record = record_of(root)
        for bias in biases:
            bias.trainable = True
        ours = {id(x) for x in biases}
        for key, variable in trained_beside(root).items():
            if id(variable) in ours:
                record.biases[key] = variable
        join(record, record.biases, undo)
        if name is not None:
            join(record, trained_beside(model), undo)

    attach_plans(
        root, method, targets, plans, join_what_trains, name or DEFAULT
    )


def _biases(
    root: Model,
    targets: dict[str, Target],
    train_bias: bool,
    beside_others: bool,
) -> list[Variable]:
    """Returns the biases that are to train, and do not yet."""
    if not isinstance(train_bias, bool):
        raise ValueError(
            "`train_bias` must be True or False. Received: "
            f"train_bias={train_bias!r}"
        )
    if not train_bias:
        return []
    if not beside_others:
        return biases_to_train(root, targets)
    record = enabled_record(root)
    if record is not None and not record.biases:
        raise ValueError(
            "All adapters of a model train the same variables, and the first "
            f"of '{root.name}' was enabled without `train_bias`. Received: "
            "train_bias=True"
        )
    return []


def attach_plans(
    root: Model,
    method: Method,
    targets: dict[str, Target],
    plans: dict[str, AdapterPlan],
    also: Callable[[contextlib.ExitStack], None] | None = None,
    name: str = DEFAULT,
) -> None:
    """Attaches planned adapters to all layers, or on an error to none.

    Args:
        also: what else belongs to the change, given the stack on which to say
            how to undo it.
        name: the name of the adapter.
    """
    with commit(root) as undo:
        for path, target in targets.items():
            base = plans[path].replaced
            if base is not None and base.kernel is not None:
                undo.callback(remember_value(target, base.kernel))
                put_in_place(target, base.kernel)
        unfreeze = freeze(root, [x.owner for x in targets.values()])
        for path, target in targets.items():
            # pop, so that no value is held beside the variable made of it.
            adapter = attach.attach_plan(target, plans.pop(path))
            adapter.share = 1.0 / len(targets)
        enabled = Enabled(
            method, unfreeze, names={name: None}, chosen={name: 1.0}
        )
        keep_record(root, enabled)
        if also is not None:
            also(undo)
        note_change(x.owner for x in targets.values())
    bring_up_to_date(root)


def replace_adapters(
    root: Model, method: Method, plans: dict[str, AdapterPlan]
) -> None:
    """Gives every adapted layer a new adapter, or on an error none of them.

    Frozen variables stay frozen, and `remove_adapter` gives the same base back.

    Args:
        method: the method of the new adapters.
        plans: the new adapter of each adapted layer, by its path.

    Raises:
        ValueError: the model has no adapter of its own, or several.
    """
    targets = require_adapted(root)
    owners = enabled_models(root, targets)
    for owner in owners:
        check_alone(
            record_of(owner),
            "Only one can be replaced. Delete the others by `delete_adapter`, "
            "and set it.",
        )
    with commit(root):
        for path, target in targets.items():
            share = target.adapted.share
            attach.detach(target)
            attach.attach_plan(target, plans[path]).share = share
        for owner in owners:
            record = dataclasses.replace(record_of(owner), method=method)
            keep_record(owner, record)
        note_change(x.owner for x in targets.values())
    bring_up_to_date(root)


def merge_adapter(model: Model) -> None:
    """Merges the adapter into its kernels: W becomes W'.

    Of several, that is what is set (`set_adapter`); the others are lost. The
    layers are plain Keras layers again, with the outputs of the adapted
    ones (1e-5 relative in float32) and no overhead. What was trainable before
    the adapter was enabled is trainable again.

    Args:
        model: a model with an adapter.

    Raises:
        ValueError: the model has no adapter, or a merged kernel would hold NaN
            or infinity; then nothing is merged.
    """
    root = adapted_part(model)
    targets = require_adapted(root)
    owners = enabled_models(root, targets)
    check_merged(targets, beside_of(owners))
    # One layer after the other, so that no second copy of all kernels is held.
    # So it cannot be undone in the middle, and an interrupt waits for the end.
    steps: list[Callable[[], None]] = [
        attach.Merge(target) for target in targets.values()
    ]
    steps.append(functools.partial(_unfreeze, root, owners, targets))
    run_to_the_end(steps)
    bring_up_to_date(root)


def _unfreeze(
    root: Model, owners: list[Model], targets: dict[str, Target]
) -> None:
    """Gives back what was frozen, and forgets what was enabled."""
    with commit(root):
        for owner in owners:
            record = enabled_record(owner)
            if record is not None:
                record.unfreeze()
                keep_record(owner, None)
        note_change(x.owner for x in targets.values())


def remove_adapter(model: Model) -> None:
    """Removes all adapters: the base model again, bit for bit.

    After `PiSSA(rank, quantize="int4")` there is no W to give back. The layers
    stay quantized and compute, to one more rounding of the kernel, what the
    model did just after enabling.

    Args:
        model: a model with an adapter. What it learned is lost unless
            `save_adapter` wrote it to a file.

    Raises:
        ValueError: the model has no adapter.
    """
    root = adapted_part(model)
    targets = require_adapted(root)
    owners = enabled_models(root, targets)
    with commit(root) as undo:
        for _, variable, base in beside_of(owners):
            undo.callback(variable.assign, ops.copy(variable.value))
            variable.assign(base)
        for target in targets.values():
            if target.replaced:
                trained = target.adapted.variables_by_name(trainable=True)
                for variable in (
                    *trained.values(),
                    *target.kernel_variables().values(),
                ):
                    undo.callback(variable.assign, ops.copy(variable.value))
            attach.remove(target)
        _unfreeze(root, owners, targets)
    bring_up_to_date(root)
