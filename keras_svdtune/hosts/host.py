"""Layers that an adapter can live in: Dense, EinsumDense, convolutions.

`AdapterHost.call` lets the adapter compute, with the layer's own product as the
frozen map, and shapes the result back; bias and activation follow. Embeddings
are in `embeddings.py`, kernels that a layer reads without a layer of their own
in `direct_kernels.py`.

To add a kind of layer, subclass it here, say how its kernel is a matrix
(`matrix_view`) and how its input is reached (`map_class`), and enter it in
`HOSTS`.
"""

from typing import ClassVar

import keras
from keras import ops

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.hosts.linear_maps import (
    ConvolutionMap,
    DroppedMap,
    FrozenMap,
)
from keras_svdtune.hosts.target import Target, plain_layer
from keras_svdtune.matrix.view import (
    DENSE_EQUATION,
    GroupedView,
    MatrixView,
    Sizes,
)
from keras_svdtune.methods.base import Weights
from keras_svdtune.runtime.keras_internals import float_kernel_shape
from keras_svdtune.runtime.types import Layer, Tensor


class AdapterHost:
    """Mixin before a Keras layer class: computes through `self.adapter`.

    Attributes:
        plain: the class without an adapter.
        kernel_name: str, the attribute that holds the kernel.
        map_class: the class that computes the frozen product.
    """

    plain: ClassVar[type]
    kernel_name: ClassVar[str] = "_kernel"
    map_class: ClassVar[type] = FrozenMap
    adapter: Adapter

    @staticmethod
    def matrix_view(layer: Layer) -> MatrixView:
        """Returns how the kernel of `layer` reads as a matrix.

        Raises:
            ValueError: the kernel is no matrix, and why.
        """
        raise NotImplementedError

    @staticmethod
    def input_rows(
        layer: Layer, view: MatrixView, inputs: Tensor
    ) -> tuple[Tensor, Sizes]:
        """Returns the inputs of `layer` as the x (rows, in) that W multiplies.

        And the sizes of the axes that are flattened to rows.
        """
        return view.flatten_inputs(inputs), view.batch_dims(inputs)

    @property
    def target(self) -> Target:
        """The adapted kernel, as a `Target`."""
        target: Target = self.adapter.target  # type: ignore[assignment]
        return target

    def merged_kernel(self) -> Tensor:
        """Returns the kernel of the plain layer that computes the same."""
        return self.target.merged_kernel()

    def linear(self, inputs: Tensor, kernel: Tensor | None = None) -> Tensor:
        """Returns the product of `inputs` and the layer's, or another, kernel.

        It is the op of the plain layer, on tensors of the same shape: this
        makes the first step bit-identical.
        """
        kernels = {} if kernel is None else {self.kernel_name: kernel}
        layer = plain_layer(self, bias=None, activation=None, **kernels)
        if kernel is None and layer.quantization_mode is not None:
            return layer.quantized_call(inputs)
        return layer.call(inputs)

    def product(
        self, inputs: Tensor, training: bool | Tensor | None = None
    ) -> Tensor:
        """Returns the product of `inputs` and the adapted kernel."""

        def of(weights: Weights, x: Tensor) -> Tensor:
            base = self.map_class(self, x)
            dropped = self.adapter.dropped(x, training)
            if dropped is not None:
                base = DroppedMap(base, self.map_class(self, dropped))
            return base.to_output(self.adapter.method.call(weights, base))

        return self.adapter.for_each_example(of, inputs)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        layer: Layer = self
        if self.adapter.view.count is not None:
            y = self.linear(inputs, self.target.merged_in_compute_dtype())
        else:
            y = self.product(inputs, training)
        if layer.bias is not None:
            y = ops.add(y, self._bias())
        if layer.activation is not None:
            y = layer.activation(y)
        return y

    # Keras calls these instead if the kernel is quantized.
    _int8_call = _int4_call = call

    def enable_lora(self, *args: object, **kwargs: object) -> None:
        """Raises a ValueError: Keras' own methods know no other adapter."""
        raise ValueError(
            f"Layer '{self.target.path}' has an adapter already "
            f"({self.adapter.method}). Call `merge_adapter()` or "
            "`remove_adapter()` on the model first."
        )

    enable_dora = enable_lora

    def _bias(self) -> Tensor:
        layer: Layer = self
        return layer.bias


class AdaptedDense(AdapterHost, keras.layers.Dense):
    """A Dense layer with an adapter."""

    plain = keras.layers.Dense

    @staticmethod
    def matrix_view(layer: Layer) -> MatrixView:
        return MatrixView(DENSE_EQUATION, kernel_shape(layer, "_kernel"))


class AdaptedEinsumDense(AdapterHost, keras.layers.EinsumDense):
    """An EinsumDense layer with an adapter."""

    plain = keras.layers.EinsumDense

    @staticmethod
    def matrix_view(layer: Layer) -> MatrixView:
        return MatrixView(layer.equation, kernel_shape(layer, "_kernel"))


class AdaptedConvolution(AdapterHost):
    """A convolution with an adapter.

    The kernel (*window, in, out) is the matrix (window·in, out) that maps a
    patch of the input to a pixel of the output. A convolution in groups is a
    bank of such matrices; it computes with the merged kernel.
    """

    map_class = ConvolutionMap

    @staticmethod
    def matrix_view(layer: Layer) -> MatrixView:
        shape = kernel_shape(layer, "_kernel")
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

    @staticmethod
    def input_rows(
        layer: Layer, view: MatrixView, inputs: Tensor
    ) -> tuple[Tensor, Sizes]:
        # The patches of the image: filters that each pick one number.
        rows = view.shape[0]
        shape = (*view.kernel_shape[:-1], rows)
        pick = ops.reshape(ops.eye(rows, dtype=inputs.dtype), shape)
        plain = plain_layer(layer, bias=None, activation=None, _kernel=pick)
        patches = MatrixView(view.equation, shape)
        y = plain.call(inputs)
        return patches.flatten_outputs(y), patches.batch_dims_of_output(y)

    def _bias(self) -> Tensor:
        layer: Layer = self
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


# The plain class -> the class with an adapter. A subclass of a plain class
# may compute something else, so only the class itself is looked up.
HOSTS: dict[type, type[AdapterHost]] = {
    keras.layers.Dense: AdaptedDense,
    keras.layers.EinsumDense: AdaptedEinsumDense,
    keras.layers.Conv1D: AdaptedConv1D,
    keras.layers.Conv2D: AdaptedConv2D,
    keras.layers.Conv3D: AdaptedConv3D,
}


def kernel_shape(layer: Layer, attribute: str) -> tuple[int, ...]:
    """Returns the shape of a layer's kernel; of the float one if packed."""
    shape = float_kernel_shape(layer)
    return tuple(getattr(layer, attribute).shape) if shape is None else shape
