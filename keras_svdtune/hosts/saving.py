"""What a converted layer does when a model is saved and loaded.

A full save (`.keras`, `.weights.h5`, a preset) holds the merged kernel where
the plain layer has its kernel, and the adapter in a group of its own, which a
plain layer ignores. So files of plain and adapted models fit each other.

Weights files name the layers of a list by class, so the classes here carry the
name of the plain one.
"""

from typing import ClassVar

from keras_svdtune.hosts.direct_kernels import ReadsMerged, adapted_directly
from keras_svdtune.hosts.embeddings import AdaptedEmbedding
from keras_svdtune.hosts.host import HOSTS, AdaptedConvolution, AdapterHost
from keras_svdtune.hosts.quantized import variable_names
from keras_svdtune.runtime.keras_internals import in_training, own_variables
from keras_svdtune.runtime.types import Json, Layer, Store, Tensor


class MadePlain:
    """Mixin: a config holds no adapter, so it makes the plain layer."""

    plain: ClassVar[type]

    @classmethod
    def from_config(cls, config: Json) -> Layer:
        layer: Layer = cls.plain.from_config(config)  # type: ignore[attr-defined]
        return layer


class SavesMerged(MadePlain, AdapterHost):
    """A converted layer, whose saves hold its merged kernel."""

    @property
    def kernel(self) -> Tensor:
        # Code that reads the kernel rather than call the layer, such as Gemma
        # 4's feed-forward block, gets the merged one.
        self._check_that_there_is_one()
        if self.adapter.seeds is not None and in_training() is not False:
            raise ValueError(
                f"Layer '{self.target.path}' is not called: another layer "
                "reads its kernel, so that nothing of its input can be dropped "
                f"in training. Enable {self.adapter.method.title} without "
                f"`dropout`, or with `exclude=['{self.target.name}']`."
            )
        return self.target.merged_in_compute_dtype()

    def _check_that_there_is_one(self) -> None:
        if self.adapter.examples is not None:
            raise ValueError(
                f"Layer '{self.target.path}' is not called: another layer "
                "reads its kernel, and within `adapter_per_example` there is "
                "one for each example. Set one adapter for all of them by "
                "`set_adapter`."
            )

    def _get_kernel_with_merged_lora(self) -> tuple[Tensor, ...]:
        # Keras calls this for the (kernel, scale, zero point) to save.
        merged = self.target.merged_variables()
        return tuple(merged.get(name) for name in variable_names(self))

    def load_own_variables(self, store: Store) -> None:
        self.target.begin_loading()
        super().load_own_variables(store)  # type: ignore[misc]


class SavesMergedEmbedding(SavesMerged):
    """A converted embedding."""

    @property
    def embeddings(self) -> Tensor:
        self._check_that_there_is_one()
        return self.merged_kernel()  # Keras does not autocast it either

    def _get_embeddings_with_merged_lora(self) -> tuple[Tensor, ...]:
        return self._get_kernel_with_merged_lora()


class SavesMergedConvolution(SavesMerged):
    """A converted convolution."""

    def save_own_variables(self, store: Store) -> None:
        layer: Layer = self
        store["0"] = self.merged_kernel()
        if layer.bias is not None:
            store["1"] = layer.bias


class OwnerSavesMerged(MadePlain, ReadsMerged):
    """The owner of direct kernels, some of which have an adapter."""

    def save_own_variables(self, store: Store) -> None:
        adapted = {id(x.kernel): x for x in adapted_directly(self)}
        for i, variable in enumerate(own_variables(self)):
            target = adapted.get(id(variable))
            store[str(i)] = target.merged_kernel() if target else variable

    def load_own_variables(self, store: Store) -> None:
        for target in adapted_directly(self):
            target.begin_loading()
        super().load_own_variables(store)  # type: ignore[misc]


def _in_place(host: type[AdapterHost]) -> type:
    """Returns the class to swap in, which saves like the plain one."""
    mixin: type[SavesMerged] = SavesMerged
    if issubclass(host, AdaptedConvolution):
        mixin = SavesMergedConvolution
    elif issubclass(host, AdaptedEmbedding):
        mixin = SavesMergedEmbedding
    # A config written from it names the plain layer.
    return type(
        host.plain.__name__, (mixin, host), {"__module__": "keras.layers"}
    )


IN_PLACE = {plain: _in_place(host) for plain, host in HOSTS.items()}
