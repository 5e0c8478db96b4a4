"""Disables or merges adapters, or gives each example its own, for a while."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_svdtune.hosts import attach
from keras_svdtune.model.checks import check_merged
from keras_svdtune.model.named_adapters import (
    Choice,
    NamedAdapters,
    named_adapters,
)
from keras_svdtune.model.recompile import (
    bring_up_to_date,
    note_change_for_a_while,
)
from keras_svdtune.model.state import (
    DISABLED,
    MERGED,
    PER_EXAMPLE,
    SEARCH,
    Block,
    adapted_part,
    beside_of,
    enabled_models,
    require_adapted,
)
from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.keras_internals import Structure
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model

# The weights of each row of a batch, by path and name: arrays (rows, ...).
Tables = dict[str, dict[str, np.ndarray]]


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
    root = adapted_part(model)
    owners = enabled_models(root, targets, DISABLED, SEARCH)
    beside = [
        (variable, base, to_numpy(variable.value).copy())
        for _, variable, base in beside_of(owners)
    ]
    block = Block((x.owner for x in targets.values()), DISABLED)

    def restore() -> None:
        for variable, value in trained:
            variable.assign(value)
        for variable, _, value in beside:
            variable.assign(value)
        block.leave()

    neutral: list[np.ndarray] = []
    after: list[np.ndarray] = []
    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        block.enter()
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
    beside = beside_of(enabled_models(root, targets, DISABLED))
    check_merged(targets, beside)
    owners = [x.owner for x in targets.values()]
    structure = Structure(owners)
    before = [(x, ops.copy(x.value)) for _, x, _ in beside]
    undone = note_change_for_a_while(owners, "merged")
    block = Block(owners, MERGED)

    def restore() -> None:
        for variable, value in before:
            variable.assign(value)
        structure.restore()
        block.leave()
        undone()
        bring_up_to_date(root)

    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        block.enter()
        for target in targets.values():
            before += [
                (variable, ops.copy(variable.value))
                for variable in target.kernel_variables().values()
            ]
            attach.Merge(target)()
        bring_up_to_date(root)
        yield


@contextlib.contextmanager
def adapter_per_example(
    model: Model, adapters: Sequence[Choice]
) -> Iterator[None]:
    """Temporarily lets each example of a batch have an adapter of its own.

    Within, `predict`, `evaluate`, `generate` and a plain call compute row i of
    every batch with the i-th adapter, to float32 rounding as if that were set
    alone. So all batches must have as many rows as there are adapters; with
    another number of rows the call is an error. The base model computes all
    rows together.

    Other adapters compile nothing anew on JAX, if there are as many of them; on
    the other backends each block compiles its own functions, and computes what
    an adapter adds row by row. At the end all is as before, compiled functions
    included.

    Each row takes as much memory as an adapter does by itself: for SVF, n
    numbers a matrix. What the model has trained besides the adapters, such as a
    head, is not one for each row: adapters that have trained it are refused,
    unless it has these values now.

    Args:
        model: a model with adapters.
        adapters: what is to be set for each row: a name, None for the base
            model, or a sum as for `set_adapter`.

    Example:

    ```python
    with adapter_per_example(gemma, ["pirate", "spanish", None]):
        answers = gemma.generate(["Hello", "Hello", "Hello"])
    ```

    Raises:
        ValueError: the model has no such adapter; or it has one in a bank of
            matrices, in a kernel that another layer reads, or in a layer whose
            einsum equation says that its first axis is not that of the examples
            (of other layers this cannot be known). Later, a batch has another
            number of rows, or the model is trained.
    """
    named = named_adapters(model)
    if isinstance(adapters, (str, Mapping)) or not len(adapters):
        raise ValueError(
            "`adapters` must be a list with one for each row of a batch. "
            f"Received: {adapters!r}"
        )
    rows = [named.checked(x) for x in adapters]
    check_by_example(named)
    with weights_by_row(named, named.tables(rows)):
        yield


def check_by_example(named: NamedAdapters) -> None:
    """Raises a ValueError if a layer cannot have an adapter for each row."""
    for path, target in named.targets.items():
        if target.direct or not target.view.by_example:
            raise ValueError(
                f"Layer '{path}' cannot have an adapter for each example: "
                "it computes with one merged kernel for all of them, or its "
                "first axis is not that of the examples. Leave it out of "
                "`target_layer_names`."
            )


@contextlib.contextmanager
def weights_by_row(
    named: NamedAdapters, tables: Tables
) -> Iterator[Callable[[Tables], None]]:
    """Temporarily gives each row of a batch weights of its own.

    Args:
        named: the adapters of a model.
        tables: an array (rows, ...) for each weight, by path and name. They
            are taken out of it one by one.

    Yields:
        A function that assigns other values of the same shapes, with which
        nothing is compiled anew.
    """
    names = "+".join(next(iter(tables.values())))
    structure = Structure(x.adapted for x in named.targets.values())
    undone = note_change_for_a_while(
        [x.owner for x in named.targets.values()],
        f"{PER_EXAMPLE} {names}",
        again=keras.backend.backend() == "jax",
        training=False,
    )
    block = Block((x.owner for x in named.targets.values()), PER_EXAMPLE)

    def restore() -> None:
        structure.restore()
        block.leave()
        undone()
        bring_up_to_date(named.owner)

    def assign(tables: Tables) -> None:
        for path, target in named.targets.items():
            target.adapted.assign_each_example(tables[path])

    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        block.enter()
        for path, target in named.targets.items():
            target.adapted.give_each_example(tables.pop(path))
        bring_up_to_date(named.owner)
        yield assign


@contextlib.contextmanager
def values_back(named: NamedAdapters) -> Iterator[None]:
    """Puts back the values that the adapters' variables have, at the end."""
    before = named.now()
    block = Block((x.owner for x in named.targets.values()), SEARCH)

    def restore() -> None:
        named.put(before)
        block.leave()

    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        block.enter()
        yield
