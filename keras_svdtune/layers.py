"""Adapted layers for hand-built models: `SVFDense`, `SVFEinsumDense`, ...

One for each method and layer class, made when a method is registered. They are
ordinary Keras layers: declared in a model and serialised with it. Every file
keeps their base kernel and adapter apart.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import keras

from keras_svdtune.adapter.plan import AdapterPlan, plan_adapter
from keras_svdtune.hosts.attach import attach
from keras_svdtune.hosts.host import HOSTS, AdapterHost
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method, for_every_method
from keras_svdtune.methods.data_method import DataMethod
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.model.checks import check_fit
from keras_svdtune.model.freezing import freeze_own_variables
from keras_svdtune.runtime.keras_internals import value_or_none
from keras_svdtune.runtime.types import Json, Layer, Tensor

# The classes of this module by name, such as `"SVFDense"`.
LAYERS: dict[str, type] = {}


class DeclaredLayer(AdapterHost):
    """Mixin of the layers that a user declares with their method.

    They take the arguments of the plain layer and, by name, the settings of
    the method. The kernel and the bias are frozen, the adapter trains. The
    basis is computed from the kernel when the layer is built.
    """

    method_class: ClassVar[type[Method]]
    plain_layer: ClassVar[type]
    # Sets the kernel while `build` runs, before its basis is computed.
    _set_kernel: Callable[[], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        names = {f.name for f in dataclasses.fields(self.method_class)}
        settings = {k: kwargs.pop(k) for k in names & set(kwargs)}
        super().__init__(*args, **kwargs)
        self.method = self.method_class(**settings)
        if isinstance(self.method, ReplacesBase):
            raise ValueError(
                "A declared layer keeps its kernel; enable "
                f"{self.method.title} on a plain model instead. Received: "
                f"{self.method!r}"
            )

        if isinstance(self.method, DataMethod) and self.method.data is not None:
            raise ValueError(
                "A declared layer sees no data when it is built; enable "
                f"{self.method.title} on a plain model instead. Received: "
                f"data={str(self.method.data)[:100]!r}"
            )

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)  # type: ignore[misc]
        if self._set_kernel is not None:
            self._set_kernel()
        freeze_own_variables(self)
        layer: Layer = self
        view = self.matrix_view(self)
        target = Target(layer.name, self, self.kernel_name, view)
        check_fit(target.path, target, self.method)
        self.method = self.method.for_shape(view.shape)

        @functools.cache
        def plan() -> AdapterPlan:
            return plan_adapter(
                self.method,
                target.host_matrix(),
                target.path,
                target.rounds(self.method),
            )

        if not isinstance(self.method.current_rank(None), int | None):
            # `rank` was a share of the energy: take the rank of this kernel.
            self.method = plan().method

        def first_value(name: str) -> Tensor | None:
            # While `fit` only traces a model to build it, kernels have no
            # values yet; the adapter's are set after them.
            if value_or_none(target.kernel) is None:
                return None
            return plan().values.get(name)

        adapter = attach(target, self.method, first_value, type(self))
        adapter.rounds = target.rounds(self.method)

    def get_config(self) -> Json:
        config = super().get_config()  # type: ignore[misc]
        return {**config, **self.method.settings()}

    @classmethod
    def from_layer(cls: Any, layer: Layer, **settings: Any) -> Any:
        """Makes a built layer that computes what the plain `layer` computes.

        Args:
            layer: a built layer of the plain class. It is not changed.
            **settings: the settings of the method.

        Raises:
            ValueError: `layer` is of another class, or not built.
        """
        if type(layer) is not cls.plain_layer or not layer.built:
            raise ValueError(
                f"`{cls.__name__}.from_layer` takes a built keras.layers."
                f"{cls.plain_layer.__name__}. Received: {layer!r} (built: "
                f"{getattr(layer, 'built', None)})"
            )
        new = cls.from_config({**layer.get_config(), **settings})

        def copy_weights() -> None:
            for ours, theirs in zip(new.weights, layer.weights, strict=True):
                ours.assign(theirs.value)

        new._set_kernel = copy_weights
        new.build_from_config(layer.get_build_config())
        new._set_kernel = None
        return new


def make_layers(method: type[Method]) -> None:
    """Makes classes such as `SVFDense`, one for each adaptable Keras layer."""
    for plain in HOSTS:
        is_embedding = issubclass(plain, keras.layers.Embedding)
        if plain.__module__.startswith("keras.") and (
            method.embeddings or not is_embedding
        ):
            cls = _layer_class(method, plain)
            LAYERS[cls.__name__] = cls


def _layer_class(method: type[Method], plain: type) -> type:
    name = "".join(c for c in method.title if c.isalnum()) + plain.__name__
    arguments = {
        "Dense": "64",
        "EinsumDense": '"abc,cd->abd", (None, 64)',
        "Embedding": "32_000, 64",
        "ReversibleEmbedding": "32_000, 64",
    }.get(plain.__name__, "64, 3")
    cls = type(
        name,
        (DeclaredLayer, HOSTS[plain]),
        {
            "method_class": method,
            "plain_layer": plain,
            "__module__": "keras_svdtune",
            "__doc__": f"""A {plain.__name__} layer adapted by {method.title}.

    The frozen kernel W is adapted as `{method.__name__}` describes.

    Args:
        *args, **kwargs: those of `keras.layers.{plain.__name__}`, and by name
            the settings of `{method.__name__}`.

    Example:

    ```python
    layer = {name}({arguments}{method.example})
    layer = {name}.from_layer(a_built_{plain.__name__.lower()}_layer)
    ```
    """,
        },
    )
    return keras.saving.register_keras_serializable(package="keras_svdtune")(
        cls
    )


for_every_method(make_layers)
