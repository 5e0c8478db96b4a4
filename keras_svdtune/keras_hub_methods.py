"""The methods that KerasHub's Backbone and Task get on import.

Each is a function of this package under the same name, so that
`gemma.backbone.enable_svf()` and `enable_svf(gemma.backbone)` are the same.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras_hub

from keras_svdtune.convert import peft, to_lora
from keras_svdtune.files import hub, save_load
from keras_svdtune.methods.base import METHODS, Method
from keras_svdtune.model import enable
from keras_svdtune.reports import (
    cost,
    plot_spectrum,
    quantization_error,
    spectrum,
)


def enable_function(cls: type[Method]) -> Callable[..., None]:
    """`enable_<name>(model, <settings of cls>, target_layer_names=None)`."""
    model, _, targets = inspect.signature(
        enable.enable_adapter
    ).parameters.values()
    settings = list(inspect.signature(cls).parameters.values())
    by_name = [x for x in settings if x.kind is x.KEYWORD_ONLY]
    in_order = [x for x in settings if x not in by_name]
    signature = inspect.Signature([model, *in_order, targets, *by_name])

    def enable_method(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        model = arguments.pop("model")
        targets = arguments.pop("target_layer_names", None)
        enable.enable_adapter(model, cls(**arguments), targets)

    enable_method.__signature__ = signature  # type: ignore[attr-defined]
    enable_method.__name__ = enable_method.__qualname__ = f"enable_{cls.name}"
    enable_method.__module__ = "keras_svdtune"
    enable_method.__doc__ = (
        f"Enables {cls.title} on a model, as `enable_adapter` does.\n\n"
        "Takes the settings below; `model` and `target_layer_names` are as "
        f"for `enable_adapter`.\n\n{inspect.getdoc(cls)}"
    )
    return enable_method


def functions() -> dict[str, Callable[..., Any]]:
    """What a Backbone or Task can do, by name."""
    found: dict[str, Callable[..., Any]] = {
        f"enable_{name}": enable_function(cls)
        for name, cls in METHODS.items()
        if cls.has_enable
    }
    for function in (
        enable.enable_adapter,
        enable.merge_adapter,
        enable.remove_adapter,
        enable.adapter_disabled,
        save_load.save_adapter,
        save_load.load_adapter,
        hub.push_adapter,
        to_lora.to_lora,
        peft.export_peft,
        cost.adapter_summary,
        quantization_error.quantization_error,
        spectrum.spectrum,
        plot_spectrum.plot_spectrum,
    ):
        found[function.__name__] = function
    return found


def patch_keras_hub() -> None:
    """Adds `functions()` to Backbone and Task; overwrites nothing."""
    for name, function in functions().items():
        for cls in (keras_hub.models.Backbone, keras_hub.models.Task):
            existing = getattr(cls, name, None)
            if existing is None:
                function._keras_svdtune = True  # type: ignore[attr-defined]
                setattr(cls, name, function)
            elif not hasattr(existing, "_keras_svdtune"):
                warnings.warn(
                    f"{cls.__name__} has a method `{name}` of its own; it is "
                    f"left as it is. Call `keras_svdtune.{name}(model, ...)`.",
                    stacklevel=3,
                )
