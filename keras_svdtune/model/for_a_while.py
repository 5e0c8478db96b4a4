"""Disables adapters, or merges them, for as long as a `with` block lasts."""

import contextlib
from collections.abc import Iterator

import numpy as np
from keras import ops

from keras_svdtune.hosts import attach
from keras_svdtune.model.checks import check_merged
from keras_svdtune.model.recompile import (
    bring_up_to_date,
    note_change_for_a_while,
)
from keras_svdtune.model.state import (
    adapted_part,
    enabled_models,
    record_of,
    require_adapted,
)
from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.keras_internals import Structure
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model, Tensor, Variable


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
    owners = enabled_models(adapted_part(model), targets)
    beside = [
        (variable, base, to_numpy(variable.value).copy())
        for owner in owners
        for variable, base in record_of(owner).beside.values()
    ]

    records = [record_of(owner) for owner in owners]
    outer = [record.within for record in records]

    def restore() -> None:
        for variable, value in trained:
            variable.assign(value)
        for variable, _, value in beside:
            variable.assign(value)
        for record, within in zip(records, outer, strict=True):
            record.within = within

    neutral: list[np.ndarray] = []
    after: list[np.ndarray] = []
    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        for record in records:
            record.within = "adapter_disabled"
        for adapter in adapters:
            adapter.reset()
        neutral = [to_numpy(v.value).copy() for v, _ in trained]
        for variable, base, _ in beside:
            variable.assign(base)
        yield
        after = [to_numpy(v.value).copy() for v, _ in trained]
    if not all(map(np.array_equal, after, neutral)):
        raise RuntimeError(
            "The adapter was trained or loaded while it was disabled. It has "
            "its earlier values again; train outside `adapter_disabled()`."
        )


@contextlib.contextmanager
def adapter_merged(model: Model) -> Iterator[None]:
    """Temporarily merges the adapter: the layers are plain Keras layers.

    Within, every kernel is W' = W + ΔW, and the layers are those of the plain
    model. At the end the base is back bit for bit, and the adapter with what it
    learned, also after an error. W is kept meanwhile, so this takes as much
    memory as the adapted kernels.

    What is trained within, or changed in a layer that has an adapter, is lost.

    Args:
        model: a model with an adapter.

    Example:

    ```python
    with adapter_merged(gemma):
        answer = gemma.generate("Hello")
    ```

    Raises:
        ValueError: the model has no adapter, it was enabled on a model around
            this one, or a trained weight holds NaN or infinity.
    """
    root = adapted_part(model)
    targets = require_adapted(root)
    enabled_models(root, targets)  # or it is an error
    check_merged(targets)
    owners = [x.owner for x in targets.values()]
    structure = Structure(owners)
    before: list[tuple[Variable, Tensor]] = []
    undone = note_change_for_a_while(owners)

    def restore() -> None:
        for variable, value in before:
            variable.assign(value)
        structure.restore()
        undone()
        bring_up_to_date(root)

    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        for target in targets.values():
            before += [
                (variable, ops.copy(variable.value))
                for variable in target.kernel_variables().values()
            ]
            attach.Merge(target)()
        bring_up_to_date(root)
        yield
