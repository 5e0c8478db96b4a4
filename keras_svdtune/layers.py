"""Adapted layers for hand-built models: `SVFDense`, `SVFEinsumDense`, ...

One for each method and host, made by `layer_classes`. They are ordinary Keras
layers: declared in a model, serialised with it, their base kernel and adapter
kept apart in every file.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import keras

from keras_svdtune.adapter.plan import Plan, plan
from keras_svdtune.hosts import attach
from keras_svdtune.hosts.host import (
    HOSTS,
    AdapterHost,
    host_matrix_of,
    kernel_of,
)
from keras_svdtune.methods.base import Method
from keras_svdtune.model.enable import check_fit
from keras_svdtune.model.freezing import freeze_own_variables


class DeclaredLayer(AdapterHost):
    """Mixin of the layers that a user declares with their method.

    The arguments of the plain layer and the settings of the method, by name.
    The kernel and the bias are frozen, the adapter trains. The basis is
    computed from the kernel when the layer is built.
    """

    method_class: ClassVar[type[Method]]
    plain_layer: ClassVar[type]

    def __init__(self, *args: Any, **kwargs: Any):
        names = {f.name for f in dataclasses.fields(self.method_class)}
        settings = {k: kwargs.pop(k) for k in names & set(kwargs)}
        super().__init__(*args, **kwargs)
        self.method = self.method_class(**settings)
        if self.method.replaces_base:
            raise ValueError(
                "A declared layer keeps its kernel; enable "
                f"{self.method.title} on a plain model instead. Received: "
                f"{self.method!r}"
            )

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)  # type: ignore[misc]
        self._set_kernel()
        freeze_own_variables(self)
        check_fit(self.name, self, self.method)  # type: ignore[attr-defined]
        ready = functools.cache(self._plan)
        if isinstance(getattr(self.method, "rank", None), float):
            # The share of the energy becomes the rank that this kernel needs.
            self.method = ready().method

        def initial_value(name: str) -> Any:
            # While `fit` only traces a model to build it, kernels have no
            # value yet; the adapter gets its own after them.
            if kernel_of(self)._value is None:
                return None
            return ready().values.get(name)

        attach.attach(self, self.method, initial_value, type(self))

    def _plan(self) -> Plan:
        layer: Any = self
        return plan(self.method, host_matrix_of(layer), layer.name)

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)  # type: ignore[misc]

        def settle(adapted_file: bool) -> None:
            if not adapted_file:  # the kernel of a plain layer was read
                attach.rebuild_basis(self)

        self.adapter.settle = settle

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        return {**config, **self.method.settings()}

    @classmethod
    def from_layer(cls: Any, layer: Any, **settings: Any) -> Any:
        """A new layer with the kernel and bias of a plain one.

        Args:
            layer: a built layer of the plain class. It is not changed.
            **settings: the settings of the method.

        Returns:
            A built layer that computes what `layer` computes.

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

        new._set_kernel = copy_weights  # between the kernel and its basis
        new.build_from_config(layer.get_build_config())
        del new._set_kernel
        return new

    def _set_kernel(self) -> None:
        """Called in `build` when the kernel is there and the basis not yet."""


def layer_classes(method: type[Method]) -> list[type]:
    """The declared layer classes of `method`, one for each host of Keras.

    Their names are the method's title and the plain class's name:
    `SVFDense`, `LoRAXSEinsumDense`.
    """
    return [
        _layer_class(method, plain)
        for plain in HOSTS
        if plain.__module__.startswith("keras.")
        and (method.embeddings or not issubclass(plain, keras.layers.Embedding))
    ]


def _layer_class(method: type[Method], plain: type) -> type:
    name = "".join(c for c in method.title if c.isalnum()) + plain.__name__
    example = {
        "Dense": f"{name}(64{method.example})",
        "EinsumDense": f'{name}("abc,cd->abd", (None, 64){method.example})',
        **{
            plain: f"{name}(32_000, 64{method.example})"
            for plain in ("Embedding", "ReversibleEmbedding")
        },
        **{f"Conv{n}D": f"{name}(64, 3{method.example})" for n in (1, 2, 3)},
    }
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
    layer = {example[plain.__name__]}
    layer = {name}.from_layer(a_built_{plain.__name__.lower()}_layer)
    ```
    """,
        },
    )
    return keras.saving.register_keras_serializable(package="keras_svdtune")(
        cls
    )
