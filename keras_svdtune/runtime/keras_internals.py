"""Everything that this package relies on of Keras' internals, in one place.

A KerasHub backbone is a Functional graph that calls its layers by reference, so
a layer cannot be replaced. But it can change its class, and its sublayers and
variables can change after it is built. Keras has no public way to do that.

`RELIED_ON` lists every private name that is used, with the reason, including
those that the classes of `hosts/` define or read because Keras asks for them.
`missing_internals` returns the ones that a release of Keras lacks.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.legacy.saving import legacy_h5_format

from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.types import (
    Layer,
    Model,
    Optimizer,
    Tensor,
    Variable,
)

# Attributes in which a model keeps its compiled functions. KerasHub's causal
# language models have `generate_function`.
COMPILED_FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)

# Writes `model.save("model.h5")`, by its function `save_model_to_hdf5`.
h5_writer = legacy_h5_format

# What has an attribute, the attribute, and what this package needs it for.
RELIED_ON = (
    ("a layer", "_tracker", "giving a built layer a sublayer, and taking it"),
    ("a layer", "_open_name_scope", "the paths of an adapter's variables"),
    ("a layer", "_layers", "going through the layers of a model in order"),
    ("a layer", "_flatten_layers", "the numbers of layers in a .lora.h5"),
    ("a layer", "_trainable_variables", "freezing a layer's own variables"),
    ("a layer", "_non_trainable_variables", "thawing a layer's own variables"),
    ("a layer", "_untrack_variable", "quantizing a given kernel"),
    ("a layer", "_remat_mode", "dropout, and seeing what comes into a layer"),
    ("a layer", "quantization_mode", "knowing whether a kernel is quantized"),
    ("a Dense layer", "_kernel", "reading and writing the kernel"),
    ("a Dense layer", "_int8_call", "computing on an int8 kernel"),
    ("a Dense layer", "_int4_call", "computing on an int4 kernel"),
    ("a Dense layer", "quantized_call", "the product of a quantized kernel"),
    ("a Dense layer", "_get_kernel_with_merged_lora", "full saves"),
    ("an EinsumDense layer", "_get_kernel_with_merged_lora", "full saves"),
    ("an Embedding layer", "_get_embeddings_with_merged_lora", "full saves"),
    ("a tracker", "config", "moving variables between its lists"),
    ("a tracker", "stored_ids", "moving variables between its lists"),
    ("a tracker", "locked", "locking a built layer again"),
    ("a tracker", "untrack", "taking a sublayer away"),
    ("a variable", "_value", "knowing whether it has a value, giving it back"),
    ("a variable", "_layout", "putting it on the devices of another one"),
    ("an optimizer", "_variables", "building it for other variables"),
    ("an optimizer", "_trainable_variables", "building it for others"),
    ("an optimizer", "_trainable_variables_indices", "the same"),
    ("an optimizer", "_iterations", "counting its steps from 0"),
    ("an optimizer", "_learning_rate", "keeping it, and telling a schedule"),
    ("an optimizer", "_tracker", "forgetting what it was built for"),
    ("an optimizer", "save_own_variables", "telling its state from a base's"),
    ("an optimizer", "load_own_variables", "telling its state from a base's"),
    ("the h5 writer", "save_model_to_hdf5", "writing `model.h5` merged"),
)


def missing_internals() -> list[str]:
    """Lists what this release of Keras lacks of `RELIED_ON`."""
    dense = keras.layers.Dense(1)
    with contextlib.suppress(AttributeError):  # of what is listed below
        dense.build((None, 1))
    owners = {
        "a layer": dense,
        "a Dense layer": dense,
        "an EinsumDense layer": keras.layers.EinsumDense,
        "an Embedding layer": keras.layers.Embedding,
        "a tracker": getattr(dense, "_tracker", None),
        "a variable": getattr(dense, "bias", None),
        "an optimizer": keras.optimizers.SGD(),
        "the h5 writer": h5_writer,
    }
    return [
        f"In Keras {keras.version()}, {owner} has no `{name}`, which this "
        f"package needs for {why}."
        for owner, name, why in RELIED_ON
        if not hasattr(owners[owner], name)
    ]


def sublayers(layer: Layer) -> list[Layer]:
    """Returns the layers that a layer holds directly, in order."""
    return list(layer._layers)


def layers_in(model: Model) -> list[Layer]:
    """Returns the model and every layer inside it, in order, each once."""
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


def layers_as_keras_counts(model: Model) -> list[Layer]:
    """Returns every layer inside a model in the order of Keras' own lists."""
    return list(model._flatten_layers(include_self=False))


@contextlib.contextmanager
def unlocked(layer: Layer) -> Iterator[None]:
    """Temporarily lets a built layer gain and lose sublayers and variables."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def build_inside(layer: Layer, sublayer: Layer) -> None:
    """Builds `sublayer` so that its variables' paths begin with `layer`'s."""
    with layer._open_name_scope():
        sublayer.build(None)


def drop_sublayer(layer: Layer, name: str, sublayer: Layer) -> None:
    """Removes a sublayer; deleting the attribute alone keeps it tracked.

    It may be called again, if it was interrupted.
    """
    with unlocked(layer):
        if hasattr(layer, name):
            delattr(layer, name)
        layer._tracker.untrack(sublayer)


def own_variables(layer: Layer) -> list[Variable]:
    """Returns a layer's own variables, in the order of its weights file."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def own_trainables(layer: Layer) -> list[Variable]:
    """Returns a layer's own trainable variables, without its sublayers'."""
    return list(layer._trainable_variables)


def move_variable(layer: Layer, variable: Variable, trainable: bool) -> None:
    """Moves a variable to a layer's list of trainable or of frozen variables.

    It goes to the end of the trainable list or to the front of the frozen one,
    which keeps the order of `layer.weights` that weights files rely on. Keras'
    setter `layer.trainable` does not reach a variable in the frozen list.
    """
    store = "trainable_variables" if trainable else "non_trainable_variables"
    tracker = layer._tracker
    tracker.untrack(variable)
    variables = tracker.config[store][1]
    variables.insert(len(variables) if trainable else 0, variable)
    tracker.stored_ids[store].add(id(variable))


def set_own_trainable_flag(layer: Layer, flag: bool) -> bool:
    """Sets a layer's own flag, not its sublayers'; returns the old value."""
    before: bool = layer._trainable
    layer._trainable = flag
    return before


def let_trainable_be_set(layer: Layer) -> None:
    """Lets `layer.trainable = True` reach variables that are frozen.

    TensorFlow leaves an attribute alone that is set to the very value that it
    has. So the flag is False there, but for the layer's config.
    """
    if keras.backend.backend() != "tensorflow" or not layer.trainable:
        return
    set_own_trainable_flag(layer, False)
    layer.__dict__["get_config"] = functools.partial(_trainable_config, layer)


def forget_trainable_was_set(layer: Layer) -> None:
    """Undoes `let_trainable_be_set`, but for the flag."""
    layer.__dict__.pop("get_config", None)


def _trainable_config(layer: Layer) -> dict[str, Any]:
    return type(layer).get_config(layer) | {"trainable": True}


class Structure:
    """The structure of some layers, to be restored: all but variables' values.

    That is their classes, attributes, sublayers and variables in order, and
    which variables are trainable.
    """

    def __init__(self, layers: Iterable[Layer]):
        self._layers = []
        self._trainable = []
        self._contents: list[tuple[Any, Any]] = []
        for layer in layers:
            tracker = layer._tracker
            self._layers.append((layer, type(layer), dict(layer.__dict__)))
            self._trainable += [(v, v.trainable) for v in own_variables(layer)]
            # Lists such as `_layers`, and torch's dicts of modules: whatever
            # is not replaced as a whole when a layer changes.
            for x in (
                *layer.__dict__.values(),
                *tracker.stored_ids.values(),
                *(store for _, store in tracker.config.values()),
            ):
                if type(x) in (list, dict, set):
                    self._contents.append((x, x.copy()))
            self._contents.append((tracker.__dict__, dict(tracker.__dict__)))

    def restore(self) -> None:
        """Puts everything back. It may be called again."""
        for layer, cls, attributes in self._layers:
            object.__setattr__(layer, "__class__", cls)
            _refill(layer.__dict__, attributes)
        for container, contents in self._contents:
            _refill(container, contents)
        for variable, trainable in self._trainable:
            variable.trainable = trainable


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


def forget_variable(layer: Layer, variable: Variable) -> None:
    """Stops tracking a variable, which stays an attribute of the layer."""
    layer._untrack_variable(variable)


def value_or_none(variable: Variable) -> Tensor | None:
    """Returns a variable's value, or None if it was built without one."""
    return getattr(variable, "_value", variable)


def autocast_dtype() -> str | None:
    """Returns the dtype to which variables are cast where they are read now.

    None if they are not cast. In a model of a mixed policy that is so inside
    embeddings, unless they are called by themselves.
    """
    scope = get_autocast_scope()
    return None if scope is None else scope.dtype


def in_training() -> bool | Tensor:
    """Says whether Keras calls the present layer in training.

    Every layer inherits that from the layer that calls it, also one whose
    `call` has no such argument. Within what JAX computes twice, for a
    `keras.RematScope`, it is a tensor whose value is not known yet.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    training = getattr(context, "training", None)
    return False if training is None else training


def recomputed(layer: Layer) -> bool:
    """Says whether a layer was made in a `keras.RematScope`.

    Then the backward pass may compute it again, or a layer around it.
    """
    return layer._remat_mode is not None


def set_mask(tensor: Tensor, mask: Tensor) -> None:
    """Attaches a mask to a tensor, as layers do to their outputs."""
    set_keras_mask(tensor, mask)


def mask_of(tensor: Tensor) -> Tensor | None:
    """Returns the mask that a layer attached to a tensor, or None."""
    return get_keras_mask(tensor)


@contextlib.contextmanager
def without_remat(layers: Iterable[Layer]) -> Iterator[None]:
    """Temporarily lets layers compute without `keras.RematScope`.

    Within it a layer is a program of its own, of which nothing but its outputs
    can be taken out.
    """
    before = [(x, x._remat_mode) for x in layers if x._remat_mode is not None]

    def restore() -> None:
        for layer, mode in before:
            layer._remat_mode = mode

    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        for layer, _ in before:
            layer._remat_mode = None
        yield


def float_kernel_shape(layer: Layer) -> tuple[int, ...] | None:
    """Returns the shape of the float kernel of a layer whose kernel is packed.

    int4 packs two numbers into a byte, and a quantized EinsumDense holds a
    matrix. Returns None if the kernel's own shape is the right one.
    """
    shape = getattr(layer, "original_kernel_shape", None)
    if shape is None and layer.quantization_mode == "int4":
        shape = (layer._orig_input_dim, layer._orig_output_dim)
    return None if shape is None else tuple(shape)


def constant_rate(optimizer: Optimizer) -> float | None:
    """Returns an optimizer's learning rate; None if it follows a schedule."""
    rate = optimizer._learning_rate
    return float(rate) if isinstance(rate, keras.Variable) else None


def forget_trainables(optimizer: Optimizer) -> None:
    """Makes an optimizer forget the variables that it was built for.

    It stays the same object with the same settings, counts its steps from 0,
    and is built anew by the next training. Variables that a subclass keeps as
    attributes of its own are kept.
    """
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scaled:
        forget_trainables(optimizer.inner_optimizer)
    if not optimizer.built:
        return
    kept = {id(optimizer._iterations), id(optimizer._learning_rate)}
    if not scaled:
        kept |= {id(x) for x in vars(optimizer).values()}
    for variable in list(optimizer._variables):
        if id(variable) not in kept:
            optimizer._tracker.untrack(variable)
    optimizer._trainable_variables = []
    optimizer._trainable_variables_indices = {}
    optimizer._iterations.assign(0)
    optimizer.built = False


def built_for(optimizer: Optimizer) -> list[Variable]:
    """Returns the variables that an optimizer was built for."""
    return list(optimizer._trainable_variables)


def keep_values(
    model: Model, function: Callable[..., Any], state: Any, *args: Any
) -> Any:
    """Returns `function(state, *args)`, a step of `fit` or `predict` on JAX.

    Keras takes the values from the variables before it calls the first
    step. If that is an error, as where a layer refuses its input, the model
    would lose them all; here it gets them back.
    """
    try:
        return function(state, *args)
    except Exception:
        variables = [model.trainable_variables, model.non_trainable_variables]
        if len(state) == 4:  # `fit`
            variables.append(model.optimizer.variables)
        variables.append(model.metrics_variables)
        # `predict` has no metrics.
        for ours, values in zip(variables, state, strict=False):
            for variable, value in zip(ours, values, strict=True):
                if value_or_none(variable) is None:
                    variable._value = value
        raise


def track_parameters(layers: Iterable[Layer]) -> None:
    """Brings the parameters that torch sees of layers up to date.

    A Keras layer on torch lists them when it is built. On other backends, or
    before that, there is nothing to do.
    """
    seen: set[Any] = set()
    for layer in layers:
        if not hasattr(layer, "_torch_params"):
            continue
        # A Sequential holds a model that is no sublayer in Keras.
        for _, module in list(layer.named_modules(memo=seen)):
            if hasattr(module, "_track_variables"):
                module._track_variables()


@contextlib.contextmanager
def built_without_values() -> Iterator[None]:
    """Temporarily builds variables with a shape and no value.

    This is for what depends on a model's structure alone: its layout on
    devices, or the program of a step that a compiler is to judge. A model of 9
    billion parameters takes a second to build, and no memory. It computes only
    inside a function that is given its values, such as `model.stateless_call`
    under `jax.jit`.

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
    # Keras numbers names (`vision_encoder_1`): these must not count.
    names = copy.copy(global_state.get_global_attribute("object_name_uids"))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Otherwise Keras would initialise them at the next chance.
        del waiting[before:]
        global_state.set_global_attribute("object_name_uids", names)
