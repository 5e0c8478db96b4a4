"""What Keras and KerasHub do with a model that holds adapters.

Some of their calls know nothing of an adapter, and would lose it, or go by it,
without a word. Once this package is imported they are these:

- `enable_lora`, `enable_dora`, `load_lora_weights` of a Backbone or a Task, and
  `quantize`: an error.
- `export_to_transformers`, and `save("model.h5")`: they write the merged
  kernels. KerasHub's exporters read `layer.weights[0]`, which is W.
- An optimizer's state in a `.keras` or `.weights.h5` file is one array instead
  of one for each variable. A plain model, which has as many trainables by
  chance, would take it for its own; now it leaves it out, as it does with that
  of Keras' LoRA. The adapted model reads it back.
- `load_weights` of a plain model's file: what belongs to adapters besides their
  layers, such as biases, has its values in the base from there.
- `fit`: a warning, once, of a learning rate at which nothing is learned.
- `model.trainable = True`: gives back what trained before, and thaws nothing.

Models without an adapter are not touched.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_svdtune.model.for_a_while import adapter_merged
from keras_svdtune.model.freezing import guard_trainable
from keras_svdtune.model.learning_rate import warn_of_rate
from keras_svdtune.model.recompile import watch_models
from keras_svdtune.model.state import take_as_base
from keras_svdtune.model.targets import adapted_targets
from keras_svdtune.runtime.keras_internals import built_for, h5_writer
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model, Optimizer, Store

_STATE = "state_with_an_adapter"


@functools.cache
def watch() -> None:
    """Installs what this module describes, once."""
    watch_models()
    guard_trainable()
    for cls in (keras_hub.models.Backbone, keras_hub.models.Task):
        for name in ("enable_lora", "enable_dora", "load_lora_weights"):
            _wrap(cls, name, _refusing)
    _wrap(keras.Model, "quantize", _refusing)
    _wrap(keras.Model, "fit", _warning)
    _wrap(keras.Model, "load_weights", _rebasing)
    for cls in (keras_hub.models.Backbone, keras_hub.models.CausalLM):
        _wrap(cls, "export_to_transformers", _merging)
    _wrap(h5_writer, "save_model_to_hdf5", _merging)
    _wrap(keras.optimizers.Optimizer, "save_own_variables", _packing)
    _wrap(keras.optimizers.Optimizer, "load_own_variables", _unpacking)


Call = Callable[..., Any]


def _wrap(owner: Any, name: str, make: Callable[[Call], Call]) -> None:
    original = getattr(owner, name, None)
    if original is not None:
        setattr(owner, name, functools.wraps(original)(make(original)))


def _converted(model: Model) -> bool:
    """Says whether a model holds layers that were converted in place."""
    found = adapted_targets(model).values()
    return any(not x.adapted.self_contained for x in found)


def _refusing(original: Call) -> Call:
    def refuse(model: Model, *args: Any, **kwargs: Any) -> Any:
        if _converted(model):
            name = original.__name__
            raise ValueError(
                f"Model '{model.name}' has an adapter of keras_svdtune, which "
                f"`{name}` knows nothing of. Call `merge_adapter()` or "
                f"`remove_adapter()` first"
                + (
                    ", or quantize before you enable an adapter."
                    if name == "quantize"
                    else "."
                )
            )
        return original(model, *args, **kwargs)

    return refuse


def _warning(original: Call) -> Call:
    def fit(model: Model, *args: Any, **kwargs: Any) -> Any:
        warn_of_rate(model)
        return original(model, *args, **kwargs)

    return fit


def _rebasing(original: Call) -> Call:
    def load(model: Model, *args: Any, **kwargs: Any) -> Any:
        targets = adapted_targets(model).values()
        for target in targets:
            target.loaded_plain = False
        found = original(model, *args, **kwargs)
        if any(target.loaded_plain for target in targets):
            take_as_base(model)
        return found

    return load


def _merging(original: Call) -> Call:
    def merged(model: Model, *args: Any, **kwargs: Any) -> Any:
        within = (
            adapter_merged(model)
            if _converted(model)
            else contextlib.nullcontext()
        )
        with within:
            return original(model, *args, **kwargs)

    return merged


def _trains_adapters(optimizer: Optimizer) -> bool:
    """Says whether an optimizer was built for adapters of converted layers."""
    return any(
        getattr(variable, "of_converted_layer", False)
        for variable in built_for(optimizer)
    )


def _packing(original: Call) -> Call:
    def save(optimizer: Optimizer, store: Store) -> None:
        if not _trains_adapters(optimizer):
            original(optimizer, store)
            return
        arrays = [to_numpy(x.value) for x in optimizer.variables]
        parts = [np.ascontiguousarray(x).tobytes() for x in arrays]
        store[_STATE] = np.frombuffer(b"".join(parts), "uint8")

    return save


def _unpacking(original: Call) -> Call:
    def load(optimizer: Optimizer, store: Store) -> None:
        if not _trains_adapters(optimizer) or _STATE not in store.keys():  # noqa: SIM118
            original(optimizer, store)
            return
        data = np.array(store[_STATE]).tobytes()
        arrays = [to_numpy(x.value) for x in optimizer.variables]
        if len(data) != sum(x.nbytes for x in arrays):
            raise ValueError(
                f"The file holds the state of optimizer '{optimizer.name}' for "
                "another adapter than the one that this model has."
            )
        start = 0
        for variable, array in zip(optimizer.variables, arrays, strict=True):
            part = data[start : start + array.nbytes]
            variable.assign(
                np.frombuffer(part, array.dtype).reshape(array.shape)
            )
            start += array.nbytes

    return load
