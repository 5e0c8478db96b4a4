"""One matrix of a model, and the layer that holds it.

A `Target` is made once, when a model is searched (`model/targets.py`), and
handed down: nothing asks a layer a second time how its kernel is a matrix.
"""

import dataclasses
import threading
from typing import Any

import keras
from keras import ops

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.adapter.plan import AdapterPlan, plan_adapter
from keras_svdtune.adapter.stepped import Stepped, variable_of
from keras_svdtune.hosts import quantized
from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.data_method import DataMethod
from keras_svdtune.runtime.keras_internals import value_or_none
from keras_svdtune.runtime.placement import placement_of
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Array, Layer, Tensor, Variable

_ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass(eq=False)
class Target:
    """One matrix of a model, or a bank of them, and the layer that holds it.

    Attributes:
        path: str, unique in the model that was searched:
            `"decoder_block_0/attention/query"`.
        owner: the built layer that holds the kernel.
        attribute: str, the owner's attribute that holds it: `"_kernel"`.
        view: `MatrixView` of the kernel.
        slot: str, the owner's attribute for the adapter.
        direct: bool. Whether the owner reads the kernel in a computation of its
            own, so that only a merged kernel reaches it, and is not a layer
            whose call is the product with W.
        index: int or None. Which matrix of a bank a report is about.
    """

    path: str
    owner: Layer
    attribute: str
    view: MatrixView
    slot: str = "adapter"
    direct: bool = False
    index: int | None = None
    # Whether the weights file that was read last is of a plain layer.
    loaded_plain: bool = dataclasses.field(
        default=False, init=False, repr=False
    )
    # The kernel's variables as they were, while a weights file is read.
    _before: dict[str, Tensor] | None = dataclasses.field(
        default=None, init=False, repr=False
    )

    @property
    def name(self) -> str:
        """The name that a user selects it by: `"query"`."""
        if self.direct:
            return self.attribute.strip("_")
        name: str = self.owner.name
        return name

    @property
    def kernel(self) -> Variable:
        """The variable that holds the kernel."""
        # Not getattr: an adapted owner returns its merged kernel there.
        return self.owner.__dict__[self.attribute]

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, or None."""
        return getattr(self.owner, self.slot, None)

    @property
    def adapted(self) -> Adapter:
        """The adapter of a target that is known to have one."""
        adapter = self.adapter
        assert adapter is not None, f"'{self.path}' has no adapter"
        return adapter

    @property
    def is_embedding(self) -> bool:
        """Whether the kernel is the table of an embedding."""
        return isinstance(self.owner, keras.layers.Embedding)

    @property
    def quantization_mode(self) -> str | None:
        """`"int8"`, say, if Keras has quantized the kernel, else None."""
        return None if self.direct else self.owner.quantization_mode

    @property
    def constraint(self) -> Any:
        """The constraint on the kernel, or None."""
        # A quantized layer keeps its own; its kernel is another variable.
        kind = "embeddings" if self.is_embedding else "kernel"
        ours = getattr(self.owner, f"{kind}_constraint", None)
        return ours or getattr(self.kernel, "constraint", None)

    def rounds(self, method: Method) -> bool:
        """Returns whether the basis of `method` is made of W rounded.

        Not of a quantized one: what it reads as depends on the dtype in which
        its product is computed, by more than rounding takes away.
        """
        return method.rebuilds_basis and self.quantization_mode is None

    @property
    def adapter_of_keras(self) -> str | None:
        """`"LoRA"` or `"DoRA"`, if Keras' own is enabled on the layer."""
        if self.direct:
            return None
        if getattr(self.owner, "dora_enabled", False):  # not in all releases
            return "DoRA"
        return "LoRA" if self.owner.lora_enabled else None

    @property
    def replaced(self) -> bool:
        """Whether another kernel than W was put into the layer."""
        adapter = self.adapter
        return adapter is not None and adapter.replaced is not None

    @property
    def base_dtype(self) -> str:
        """The dtype of W when the model was built."""
        dtype: str = (
            self.owner.variable_dtype if self.replaced else self.kernel.dtype
        )
        return dtype

    def plain_layer(self, **replaced: Any) -> Layer:
        """Returns a plain layer with the owner's variables, and `replaced`."""
        return plain_layer(self.owner, **replaced)

    def matrix(self) -> Tensor:
        """Returns the kernel as W (in, out), a float32 tensor.

        A quantized kernel is read through the layer's own product, since only
        Keras knows how it is scaled and packed.
        """
        if self.quantization_mode is None:
            kernel = ops.cast(self.kernel.value, "float32")
            return self.view.to_matrix(kernel)
        if self.is_embedding:
            indices = ops.arange(self.view.shape[0])
            rows = self.plain_layer().quantized_call(indices)
            return ops.cast(rows, "float32")
        bare = self.plain_layer(
            bias=None, activation=None, inputs_quantizer=None
        )
        return quantized.identity_rows(
            bare.quantized_call, self.view, self.owner.compute_dtype
        )

    def host_matrix(self) -> Array:
        """Returns `matrix()` for a decomposition.

        A kernel on many devices comes to the host in its parts, as an array. As
        a tensor it would first be put together on every device.

        Raises:
            ValueError: the kernel has no values.
        """
        kernel = self.kernel
        if value_or_none(kernel) is None:
            raise ValueError(
                f"The kernel of layer '{self.path}' has no values: the model "
                "was built without them, in a `keras.StatelessScope`. Of such "
                "a model `estimate` tells the costs, for a `rank` that is an "
                "integer; to adapt it, build it with its weights."
            )
        if placement_of(kernel) is None:
            return self.matrix()
        # One at a time: programs that run on all devices from several threads
        # would wait for each other for ever.
        with _ONE_AT_A_TIME:
            if self.quantization_mode is not None:
                return to_numpy(self.matrix())
            whole = to_numpy(kernel.value)
        return self.view.to_matrix(whole.astype("float32"))

    def merged_kernel(self) -> Tensor:
        """Returns the kernel of the plain layer that computes the same.

        It has the dtype of the kernel, or float32 if that is quantized.
        """
        if self.kernel.dtype == "float64":  # `matrix()` would round it
            matrix = self.view.to_matrix(self.kernel.value)
        else:
            matrix = self.matrix()
        merged = self.view.to_kernel(self.adapted.merged(matrix))
        if self.quantization_mode is not None:
            return merged
        return ops.cast(merged, self.kernel.dtype)

    def merged_in_compute_dtype(self) -> Tensor:
        """Returns `merged_kernel()` as the plain layer would read it."""
        return ops.cast(self.merged_kernel(), self.owner.compute_dtype)

    def kernel_variables(self) -> dict[str, Variable]:
        """Returns the kernel's variables by attribute; several if quantized."""
        if self.quantization_mode is None:
            return {self.attribute: self.kernel}
        names = quantized.variable_names(self.owner)
        found = {name: getattr(self.owner, name, None) for name in names}
        return {name: x for name, x in found.items() if x is not None}

    def merged_variables(self) -> dict[str, Tensor]:
        """Returns the values of `kernel_variables` for the merged kernel."""
        merged = self.merged_kernel()
        if self.quantization_mode is None:
            return {self.attribute: merged}
        return quantized.requantized(self.plain_layer(), merged)

    def begin_loading(self) -> None:
        """Copies the kernel before a weights file is read into the owner."""
        variables = self.kernel_variables()
        self._before = {k: ops.copy(x.value) for k, x in variables.items()}

    def finish_loading(self, has_adapter: bool) -> None:
        """Restores the kernel or rebuilds the adapter, after loading a file.

        Args:
            has_adapter: whether the file was saved from an adapted layer.
        """
        before, self._before = self._before, None
        self.loaded_plain = not has_adapter
        adapter = self.adapted
        if adapter.self_contained:  # every file keeps kernel and adapter apart
            if not has_adapter:
                self._rebuild_adapter()
            return
        if before is None:
            return
        variables = self.kernel_variables()
        if has_adapter:
            # The kernel that was read is merged; the adapter comes on top.
            for name, variable in variables.items():
                variable.assign(before[name])
        elif adapter.replaced is not None:
            for name, variable in variables.items():
                variable.assign(before[name])
            raise ValueError(
                f"The weights file holds a plain layer '{self.path}', and "
                "this one has a base that was made for its adapter "
                f"({adapter.method}). Call `remove_adapter()` first, or "
                "load the file into a plain model."
            )
        elif not all(
            bool(ops.all(ops.equal(variable.value, before[name])))
            for name, variable in variables.items()
        ):
            self._rebuild_adapter()

    def _rebuild_adapter(self) -> None:
        """Computes the adapter's weights anew from the kernel that was read."""
        adapter = self.adapted
        new = self.planned(self.rounds(adapter.method))
        # What started from data keeps that start: it suits any kernel, since
        # what is computed is the change from it.
        if adapter.self_contained or not isinstance(adapter.method, DataMethod):
            for name, value in new.values.items():
                getattr(adapter, name).assign(value)
        adapter.reset()
        adapter.base_fingerprint = new.base_fingerprint
        adapter.rounds = new.rounds

    def planned(self, rounds: bool) -> AdapterPlan:
        """Plans the adapter anew from the kernel, with the basis named.

        `rounds` is as for `plan_adapter`.
        """
        method = self.adapted.method
        return plan_adapter(method, self.host_matrix(), self.path, rounds)


def plain_layer(layer: Layer, **replaced: Any) -> Layer:
    """Returns a plain layer that shares the variables of `layer`.

    It has the attributes `replaced` in place of the layer's.
    """
    plain = object.__new__(getattr(layer, "plain", type(layer)))
    plain.__dict__.update(layer.__dict__)
    if replaced.get("bias", layer) is None:
        replaced["use_bias"] = False  # convolutions read this instead
    plain.__dict__.update(replaced)
    return plain


def host_value_of(variable: Variable | Stepped) -> Array:
    """Returns a weight as a tensor, or as an array if it is split."""
    if placement_of(variable_of(variable)) is None:
        return ops.convert_to_tensor(variable.value)
    with _ONE_AT_A_TIME:
        return to_numpy(variable.value)
