"""All that this package relies on of Keras' internals, in one place.

A KerasHub backbone is a Functional graph that calls its layers by reference,
so a layer cannot be replaced; it can change its class, and its sublayers and
variables can change after it is built. Keras has no public way for that.

Each function says what it relies on, and `missing_internals` names what a
release of Keras no longer has. `RELIED_ON` also lists the names that the
classes of `hosts/` define or read because Keras asks for them.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.backend import set_keras_mask
from keras.src.backend.common import global_state

from keras_svdtune.runtime.types import (
    Layer,
    Model,
    Optimizer,
    Tensor,
    Variable,
)

# The functions that a model compiles and keeps, by attribute. KerasHub's
# causal language models keep `generate_function`.
COMPILED_FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)

# An owner, an attribute of it, and what it is relied on for.
RELIED_ON: tuple[tuple[Callable[[], Any], str, str], ...] = (
    (lambda: _dense(), "_tracker", "a built layer gets and loses a sublayer"),
    (lambda: _dense()._tracker, "config", "variables move between its lists"),
    (lambda: _dense()._tracker, "stored_ids", "the same"),
    (lambda: _dense()._tracker, "locked", "a built layer is locked"),
    (lambda: _dense()._tracker, "untrack", "a sublayer is taken away"),
    (lambda: _dense(), "_open_name_scope", "paths of an adapter's variables"),
    (lambda: _dense(), "_layers", "the layers of a model, in order"),
    (lambda: _dense(), "_trainable_variables", "freezing a layer's own"),
    (lambda: _dense(), "_non_trainable_variables", "the same"),
    (lambda: _dense(), "_untrack_variable", "quantizing a given kernel"),
    (lambda: _dense(), "_kernel", "where a Dense layer holds its kernel"),
    (lambda: _dense(), "quantization_mode", "whether a kernel is quantized"),
    (lambda: _dense(), "_int8_call", "what a quantized layer calls"),
    (lambda: _dense(), "_int4_call", "the same"),
    (lambda: _dense(), "quantized_call", "the product of a quantized kernel"),
    (lambda: _dense(), "_get_kernel_with_merged_lora", "what is saved"),
    (lambda: keras.layers.EinsumDense, "_get_kernel_with_merged_lora", "same"),
    (lambda: keras.layers.Embedding, "_get_embeddings_with_merged_lora", "-"),
    (lambda: _dense().bias, "_value", "whether a variable has a value yet"),
    (lambda: _dense().bias, "_layout", "on which devices a variable is"),
    (lambda: keras.optimizers.SGD(), "_learning_rate", "keeping a schedule"),
)


def missing_internals() -> list[str]:
    """What this release of Keras lacks of `RELIED_ON`; empty if nothing."""
    return [
        f"{owner()!r} has no `{name}` ({why})"
        for owner, name, why in RELIED_ON
        if not hasattr(owner(), name)
    ]


def _dense() -> Layer:
    layer = keras.layers.Dense(1)
    layer.build((None, 1))
    return layer


def sublayers(layer: Layer) -> list[Layer]:
    """The layers that a layer holds, in order (`Layer._layers`)."""
    return list(layer._layers)


def layers_in(model: Model) -> list[Layer]:
    """The model and the layers in it at any depth, in order, each once."""
    seen: set[int] = set()
    found = []
    # Keras' own `_flatten_layers` goes through siblings backwards.
    stack = [model]
    while stack:
        layer = stack.pop()
        if id(layer) not in seen:
            seen.add(id(layer))
            found.append(layer)
            stack.extend(reversed(sublayers(layer)))
    return found


@contextlib.contextmanager
def unlocked(layer: Layer) -> Iterator[None]:
    """Within it a built layer can get sublayers and variables, and lose them.

    A built layer's tracker is locked: it refuses both.
    """
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def build_inside(layer: Layer, sublayer: Layer) -> None:
    """Builds a layer in another one's name scope: paths of variables follow."""
    with layer._open_name_scope():
        sublayer.build(None)


def drop_sublayer(layer: Layer, name: str) -> None:
    """Takes a sublayer away; deleting the attribute alone keeps it tracked."""
    sublayer = getattr(layer, name)
    with unlocked(layer):
        delattr(layer, name)
        layer._tracker.untrack(sublayer)


def own_variables(layer: Layer) -> list[Variable]:
    """A layer's own variables in the order of its weights file."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def own_trainables(layer: Layer) -> list[Variable]:
    """Those of them that are among the trainable ones."""
    return list(layer._trainable_variables)


def move_variable(layer: Layer, variable: Variable, trainable: bool) -> None:
    """Moves a variable between a layer's lists of trainable and frozen ones.

    It goes to the front of the frozen ones or to the end of the trainable
    ones, so that the order of `layer.weights`, which weights files rely on,
    stays. The setter `layer.trainable` does not reach a variable that is
    among the frozen ones.
    """
    store = "trainable_variables" if trainable else "non_trainable_variables"
    tracker = layer._tracker
    tracker.untrack(variable)
    variables = tracker.config[store][1]
    variables.insert(len(variables) if trainable else 0, variable)
    tracker.stored_ids[store].add(id(variable))


def set_own_trainable_flag(layer: Layer, flag: bool) -> bool:
    """Sets a layer's own flag, not those below it; returns what it was."""
    before: bool = layer._trainable
    layer._trainable = flag
    return before


def remember_state(layer: Layer) -> Callable[[], None]:
    """How a layer's attributes and variables are now, to come back to.

    Returns:
        A function that puts attributes, variables and their order back. The
        variables are the very same; their values are not touched.
    """
    attributes = dict(layer.__dict__)
    tracker = layer._tracker
    stores = {name: list(x) for name, (_, x) in tracker.config.items()}
    ids = {name: set(x) for name, x in tracker.stored_ids.items()}

    def restore() -> None:
        with unlocked(layer):
            for name in set(layer.__dict__) - set(attributes):
                delattr(layer, name)
            for name, value in attributes.items():
                if layer.__dict__.get(name) is not value:
                    setattr(layer, name, value)
            for name, (_, store) in tracker.config.items():
                store[:] = stores[name]
                tracker.stored_ids[name] = set(ids[name])
            if hasattr(layer, "_torch_params"):  # torch keeps its own list
                layer._track_variables()

    return restore


def forget_variable(layer: Layer, variable: Variable) -> None:
    """Stops tracking a variable, which stays an attribute of the layer."""
    layer._untrack_variable(variable)


def value_or_none(variable: Variable) -> Tensor | None:
    """A variable's value; None where it was built without one."""
    return getattr(variable, "_value", variable)


def set_mask(tensor: Tensor, mask: Tensor) -> None:
    """Attaches a mask to a tensor, as layers do to their outputs."""
    set_keras_mask(tensor, mask)


def float_kernel_shape(layer: Layer) -> tuple[int, ...] | None:
    """The shape of the float kernel of a layer whose kernel is packed.

    int4 holds two numbers in a byte, and a quantized EinsumDense a matrix.
    None where the kernel's own shape is the one.
    """
    shape = getattr(layer, "original_kernel_shape", None)
    if shape is None and layer.quantization_mode == "int4":
        shape = (layer._orig_input_dim, layer._orig_output_dim)
    return None if shape is None else tuple(shape)


def optimizer_config(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's config, with a schedule or a function kept as it is.

    `_learning_rate` holds them; a config of them need not exist.
    """
    rate = optimizer._learning_rate
    scheduled = callable(rate) and not isinstance(rate, keras.Variable)
    if scheduled:
        optimizer._learning_rate = None
    try:
        config: dict[str, Any] = optimizer.get_config()
    finally:
        optimizer._learning_rate = rate
    return config | {"learning_rate": rate} if scheduled else config


def copy_decay_exclusions(optimizer: Optimizer, other: Optimizer) -> None:
    """What `exclude_from_weight_decay` was told, which no config holds."""
    for name in ("", "_pattern"):
        name = f"_exclude_from_weight_decay{name}"
        if hasattr(optimizer, name):
            setattr(other, name, getattr(optimizer, name))


@contextlib.contextmanager
def built_without_values() -> Iterator[None]:
    """Within it, what is built has variables of a shape and no value.

    For what only the structure of a model decides: its layout on devices, or
    the program of a step that a compiler is to judge. A model of 9 billion
    parameters takes a second to make, and no memory. Nothing can be computed
    with it outside of a function that is given its values, such as
    `model.stateless_call` under `jax.jit`.

    Example:

    ```python
    with built_without_values():
        backbone = keras_hub.models.GemmaBackbone(**config)
    ```
    """
    waiting = global_state.get_global_attribute(
        "uninitialized_variables", [], set_to_default=True
    )
    before = len(waiting)
    # Names that Keras counts (`vision_encoder_1`) are left to real models.
    names = copy.copy(global_state.get_global_attribute("object_name_uids"))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Or Keras would give them values when it next has the chance.
        del waiting[before:]
        global_state.set_global_attribute("object_name_uids", names)
