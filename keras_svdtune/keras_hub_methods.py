"""The methods that KerasHub's Backbone and Task get on import.

Each is a function of this package under the same name, so that
`gemma.backbone.enable_svf()` and `enable_svf(gemma.backbone)` are the same.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras_hub

from keras_svdtune.convert.peft import export_peft
from keras_svdtune.convert.to_lora import to_lora
from keras_svdtune.files.hub import push_adapter
from keras_svdtune.files.save_load import load_adapter, save_adapter
from keras_svdtune.methods.base import Method, for_every_method
from keras_svdtune.model.enable import (
    enable_adapter,
    merge_adapter,
    remove_adapter,
)
from keras_svdtune.model.for_a_while import (
    adapter_disabled,
    adapter_merged,
    adapter_per_example,
)
from keras_svdtune.model.names import (
    adapter_names,
    delete_adapter,
    set_adapter,
)
from keras_svdtune.model.patterns import patterns_of
from keras_svdtune.reports.cost import adapter_summary
from keras_svdtune.reports.plot_spectrum import plot_spectrum
from keras_svdtune.reports.quantization_error import quantization_error
from keras_svdtune.reports.spectrum import spectrum

# The methods of Backbone and Task by name; `enable_svf` and the like are added
# when their method is registered.
ON_MODELS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        enable_adapter,
        merge_adapter,
        remove_adapter,
        set_adapter,
        delete_adapter,
        adapter_names,
        adapter_per_example,
        adapter_disabled,
        adapter_merged,
        save_adapter,
        load_adapter,
        push_adapter,
        to_lora,
        export_peft,
        adapter_summary,
        quantization_error,
        spectrum,
        plot_spectrum,
    )
}


def enable_function(cls: type[Method]) -> Callable[..., None]:
    """Makes `enable_<method>(model, <settings>, target_layer_names=None)`.

    Further arguments, by keyword only, are those of `enable_adapter`; without
    the patterns that the method has no use for.
    """
    model, _, targets, *others = inspect.signature(
        enable_adapter
    ).parameters.values()
    known = patterns_of(cls)
    further = [
        x.replace(kind=x.KEYWORD_ONLY)
        for x in others
        if not x.name.endswith("_pattern") or x.name in known
    ]
    settings = list(inspect.signature(cls).parameters.values())
    by_name = [x for x in settings if x.kind is x.KEYWORD_ONLY]
    in_order = [x for x in settings if x not in by_name]
    signature = inspect.Signature(
        [model, *in_order, targets, *by_name, *further]
    )
    options = [targets.name, *(x.name for x in further)]

    def enable_method(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        model = arguments.pop("model")
        given = {k: arguments.pop(k) for k in options if k in arguments}
        enable_adapter(model, cls(**arguments), **given)

    enable_method.__signature__ = signature  # type: ignore[attr-defined]
    enable_method.__name__ = enable_method.__qualname__ = f"enable_{cls.name}"
    enable_method.__module__ = "keras_svdtune"
    enable_method.__doc__ = (
        f"Enables {cls.title} on a model, as `enable_adapter` does.\n\n"
        "Takes the settings below; `model`, `target_layer_names` and, by "
        f"keyword only, {', '.join(f'`{x}`' for x in options[1:])} are as for "
        "`enable_adapter`."
        f"\n\n{inspect.getdoc(cls)}"
    )
    return enable_method


def add_to_keras_hub(name: str, function: Callable[..., Any]) -> None:
    """Adds a method to Backbone and Task, unless one has one of that name.

    Then the other gets none either: a name means one thing on both.
    """
    classes = (keras_hub.models.Backbone, keras_hub.models.Task)
    for cls in classes:
        existing = getattr(cls, name, None)
        if existing is not None and not hasattr(existing, "_keras_svdtune"):
            warnings.warn(
                f"{cls.__name__} has a method `{name}` of its own; it is "
                f"left as it is. Call `keras_svdtune.{name}(model, ...)`.",
                stacklevel=3,
            )
            return
    function._keras_svdtune = True  # type: ignore[attr-defined]
    for cls in classes:
        setattr(cls, name, function)


def _add_enable(cls: type[Method]) -> None:
    if cls.has_enable:
        function = enable_function(cls)
        ON_MODELS[function.__name__] = function
        add_to_keras_hub(function.__name__, function)


def patch_keras_hub() -> None:
    """Adds `ON_MODELS` to Backbone and Task, now and as methods are added."""
    for name, function in list(ON_MODELS.items()):
        add_to_keras_hub(name, function)
    for_every_method(_add_enable)
