"""Layers that an adapter can live in: Dense, EinsumDense, convolutions.

`AdapterHost` turns a layer's `call` into: let the adapter compute, with the
layer's own product as the frozen map, and shape the result back. Bias and
activation follow as ever. Embeddings are in `embeddings.py`, kernels that a
layer reads without a layer of their own in `raw_kernels.py`.

To add a kind of layer, subclass it here, say how its kernel is a matrix
(`matrix_view`) and how its input is reached (`map_class`), and enter it in
`HOSTS`.
"""

import threading
from typing import Any, ClassVar

import keras
from keras import ops

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.hosts.linear_maps import ConvolutionMap, FrozenMap
from keras_svdtune.hosts.quantized import identity_rows
from keras_svdtune.matrix.view import DENSE_EQUATION, GroupedView, MatrixView
from keras_svdtune.runtime.placement import placement_of
from keras_svdtune.runtime.processes import to_numpy


class Merges:
    """Mixin of what has a kernel and an adapter: the kernel with ΔW in it."""

    adapter: Adapter

    def matrix(self) -> Any:
        """W (in, out), float32."""
        return matrix_of(self)

    def merged_kernel(self) -> Any:
        """The kernel of the plain layer that computes the same.

        In the dtype of the kernel; float32 if that is quantized.
        """
        layer: Any = self
        merged = self.adapter.view.to_kernel(self.adapter.merged(self.matrix()))
        if layer.quantization_mode is not None:
            return merged
        return ops.cast(merged, kernel_of(layer).dtype)

    def merged_in_compute_dtype(self) -> Any:
        """The same, as the plain layer would read it."""
        layer: Any = self
        return ops.cast(self.merged_kernel(), layer.compute_dtype)


class AdapterHost(Merges):
    """Mixin before a Keras layer class: computes through `self.adapter`.

    Attributes:
        plain: the class without an adapter.
        kernel_name: str, the attribute that holds the kernel.
        map_class: what gives a method the frozen product.
        by_default: whether it is adapted where no target is named.
    """

    plain: ClassVar[type]
    kernel_name: ClassVar[str] = "_kernel"
    map_class: ClassVar[type] = FrozenMap
    by_default: ClassVar[bool] = True

    @staticmethod
    def matrix_view(layer: Any) -> MatrixView:
        """How the kernel of `layer` reads as a matrix."""
        raise NotImplementedError

    def linear(self, inputs: Any, kernel: Any = None) -> Any:
        """The layer's own product of `inputs` and its kernel, or another.

        The very op of the plain layer, on tensors of the same shape: this is
        what makes the first step bit-identical.
        """
        kernels = {} if kernel is None else {self.kernel_name: kernel}
        layer = without_adapter(self, bias=None, activation=None, **kernels)
        if kernel is None and layer.quantization_mode is not None:
            return layer.quantized_call(inputs)
        return layer.call(inputs)

    def call(self, inputs: Any, training: Any = None) -> Any:
        layer: Any = self
        if self.adapter.view.count is not None:
            y = self.linear(inputs, self.merged_in_compute_dtype())
        else:
            base = self.map_class(layer, inputs)
            y = base.to_output(self.adapter.call(base))
        if layer.bias is not None:
            y = ops.add(y, self._bias())
        if layer.activation is not None:
            y = layer.activation(y)
        return y

    # What Keras calls instead where the kernel is quantized.
    _int8_call = _int4_call = call

    def _bias(self) -> Any:
        layer: Any = self
        return layer.bias


class AdaptedDense(AdapterHost, keras.layers.Dense):
    """A Dense layer with an adapter."""

    plain = keras.layers.Dense

    @staticmethod
    def matrix_view(layer: Any) -> MatrixView:
        return MatrixView(DENSE_EQUATION, kernel_shape(layer))


class AdaptedEinsumDense(AdapterHost, keras.layers.EinsumDense):
    """An EinsumDense layer with an adapter."""

    plain = keras.layers.EinsumDense

    @staticmethod
    def matrix_view(layer: Any) -> MatrixView:
        return MatrixView(layer.equation, kernel_shape(layer))


class AdaptedConvolution(AdapterHost):
    """A convolution with an adapter.

    The kernel (*window, in, out) is the matrix (window·in, out) that takes a
    patch of the input to a pixel of the output. A convolution in groups is a
    bank of such matrices; it computes with the merged kernel.
    """

    map_class = ConvolutionMap

    @staticmethod
    def matrix_view(layer: Any) -> MatrixView:
        shape = kernel_shape(layer)
        if layer.groups > 1 and shape[-2] == 1:
            raise ValueError(
                "a depthwise kernel is no matrix: each of its outputs reads "
                "one channel only."
            )
        if layer.groups > 1:
            return GroupedView(shape, layer.groups)
        window = "xyz"[: layer.rank]
        pixels = "hwd"[: layer.rank]
        if layer.data_format == "channels_last":
            output = f"n{pixels}o"
        else:
            output = f"no{pixels}"
        return MatrixView(f"n{pixels}{window}i,{window}io->{output}", shape)

    def _bias(self) -> Any:
        layer: Any = self
        ones = (1,) * layer.rank
        if layer.data_format == "channels_last":
            return ops.reshape(layer.bias, (1, *ones, layer.filters))
        return ops.reshape(layer.bias, (1, layer.filters, *ones))


class AdaptedConv1D(AdaptedConvolution, keras.layers.Conv1D):
    """A Conv1D layer with an adapter."""

    plain = keras.layers.Conv1D


class AdaptedConv2D(AdaptedConvolution, keras.layers.Conv2D):
    """A Conv2D layer with an adapter."""

    plain = keras.layers.Conv2D


class AdaptedConv3D(AdaptedConvolution, keras.layers.Conv3D):
    """A Conv3D layer with an adapter."""

    plain = keras.layers.Conv3D


_ONE_AT_A_TIME = threading.Lock()

# The plain class -> the class with an adapter. A subclass of a plain class
# may compute something else, so only the class itself is looked up.
HOSTS: dict[type, type[AdapterHost]] = {
    keras.layers.Dense: AdaptedDense,
    keras.layers.EinsumDense: AdaptedEinsumDense,
    keras.layers.Conv1D: AdaptedConv1D,
    keras.layers.Conv2D: AdaptedConv2D,
    keras.layers.Conv3D: AdaptedConv3D,
}


def without_adapter(host: Any, **replaced: Any) -> Any:
    """A layer of the plain class that shares the variables of `host`.

    Args:
        host: an `AdapterHost`, or a plain layer.
        **replaced: attributes that it has instead of the host's.
    """
    layer = object.__new__(getattr(host, "plain", type(host)))
    layer.__dict__.update(host.__dict__)
    if replaced.get("bias", host) is None:
        replaced["use_bias"] = False  # which convolutions ask
    layer.__dict__.update(replaced)
    return layer


def kernel_of(layer: Any) -> Any:
    """The variable that holds the kernel of a plain or adapted layer."""
    host: Any = HOSTS.get(type(layer), layer)
    return getattr(layer, host.kernel_name)


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's kernel; that of the float one if quantized."""
    if isinstance(layer, keras.layers.Embedding):
        return (layer.input_dim, layer.output_dim)
    shape = getattr(layer, "original_kernel_shape", None)  # packed EinsumDense
    if shape is None and layer.quantization_mode == "int4":
        shape = (layer._orig_input_dim, layer._orig_output_dim)
    return tuple(kernel_of(layer).shape if shape is None else shape)


def constraint_of(layer: Any) -> Any:
    """The constraint on a layer's kernel, or None."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.embeddings_constraint
    return layer.kernel_constraint


def view_of(layer: Any) -> MatrixView:
    """How the kernel of a plain or adapted layer reads as a matrix."""
    host: Any = HOSTS.get(type(layer), layer)
    return host.matrix_view(layer)


def matrix_of(layer: Any) -> Any:
    """W (in, out) of a plain or adapted layer, a float32 tensor.

    A quantized kernel is read through the layer's own product, as it is
    scaled and packed in ways that only Keras knows.
    """
    view = view_of(layer)
    if layer.quantization_mode and isinstance(layer, keras.layers.Embedding):
        rows = without_adapter(layer).quantized_call(ops.arange(view.shape[0]))
        return ops.cast(rows, "float32")
    if layer.quantization_mode is None:
        return view.to_matrix(ops.cast(kernel_of(layer).value, "float32"))
    bare = without_adapter(
        layer, bias=None, activation=None, inputs_quantizer=None
    )
    return identity_rows(bare.quantized_call, view, layer.compute_dtype)


def host_matrix_of(layer: Any) -> Any:
    """`matrix_of`, for a decomposition; an array of a kernel on many devices.

    Such a kernel comes to the host in its parts. As a tensor it would first be
    put together on every device, or be turned into other parts.

    Raises:
        ValueError: the kernel has no values.
    """
    kernel = kernel_of(layer)
    if getattr(kernel, "_value", kernel) is None:
        raise ValueError(
            f"The kernel of layer '{layer.path}' has no values: the model was "
            "built without them, in a `keras.StatelessScope`. Of such a model "
            "`estimate` tells the costs, for a `rank` that is an integer; to "
            "adapt it, build it with its weights."
        )
    if placement_of(kernel) is None:
        return matrix_of(layer)
    # One at a time: programs that run on all devices from several threads
    # would wait for each other for ever.
    with _ONE_AT_A_TIME:
        if layer.quantization_mode is not None:
            return to_numpy(matrix_of(layer))
        whole = to_numpy(kernel.value)
    return view_of(layer).to_matrix(whole.astype("float32"))


def host_value_of(variable: Any) -> Any:
    """A variable's tensor; an array where it is split over devices."""
    if placement_of(variable) is None:
        return ops.convert_to_tensor(variable)
    with _ONE_AT_A_TIME:
        return to_numpy(variable.value)
