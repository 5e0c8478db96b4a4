"""The frozen products x·W of layers, to which methods add.

A method sees x as (tokens, in): flattened activations, or the patches of an
image, which are never formed.
"""

import keras
from keras import ops

from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.runtime.keras_internals import autocast_dtype
from keras_svdtune.runtime.types import Layer, Tensor


class FrozenMap:
    """Computes x·W of a Dense or EinsumDense layer called with `inputs`."""

    def __init__(self, layer: Layer, inputs: Tensor):
        self._layer, self._inputs = layer, inputs
        self._view = layer.adapter.view
        self._x = self._view.flatten_inputs(inputs)
        self._batch_dims = self._view.batch_dims(inputs)
        self.dtype = layer.compute_dtype

    def __call__(self) -> Tensor:
        return self._product(self._inputs)

    def times(self, a: Tensor) -> Tensor:
        return ops.matmul(self._x, a)

    def moved(self, change: Tensor) -> Tensor:
        x = ops.add(self._x, change)
        return self._product(self._view.unflatten_inputs(x, self._batch_dims))

    def rows(self, r: Tensor) -> Tensor:
        return self._product(self._view.rows_as_inputs(r))

    def to_output(self, y: Tensor) -> Tensor:
        """Reshapes (tokens, out) to the output before bias and activation."""
        return self._view.unflatten_outputs(y, self._batch_dims)

    def _product(self, inputs: Tensor) -> Tensor:
        return self._view.flatten_outputs(self._layer.linear(inputs))


class ConvolutionMap:
    """Computes x·W of a convolution, x being the patches of the input.

    They are never formed: x·A is the convolution with A's columns as filters.
    """

    def __init__(self, layer: Layer, inputs: Tensor):
        self._layer, self._inputs = layer, inputs
        self._view = layer.adapter.view
        self._batch_dims: tuple[int | Tensor, ...] = ()
        self.dtype = layer.compute_dtype

    def __call__(self) -> Tensor:
        y = self._layer.linear(self._inputs)
        self._batch_dims = self._view.batch_dims_of_output(y)
        return self._view.flatten_outputs(y)

    def times(self, a: Tensor) -> Tensor:
        shape = (*self._view.kernel_shape[:-1], a.shape[1])
        y = self._layer.linear(self._inputs, ops.reshape(a, shape))
        return MatrixView(self._view.equation, shape).flatten_outputs(y)

    def moved(self, change: Tensor) -> Tensor:
        # Patches overlap, so no change of the image gives this change of the
        # patches. Its product is added instead.
        return self() + self.rows(change)

    def rows(self, r: Tensor) -> Tensor:
        kernel = ops.cast(self._layer.adapter.target.kernel, r.dtype)
        return ops.matmul(r, self._view.to_matrix(kernel))

    def to_output(self, y: Tensor) -> Tensor:
        return self._view.unflatten_outputs(y, self._batch_dims)


class DroppedMap:
    """Computes x·W of a layer's x, and x̃·A of another x̃ for its branch.

    Args:
        base: the map of x.
        dropped: the map of x̃, of the same class.
    """

    def __init__(
        self,
        base: FrozenMap | ConvolutionMap,
        dropped: FrozenMap | ConvolutionMap,
    ):
        self._base, self._dropped = base, dropped
        self.dtype = base.dtype

    def __call__(self) -> Tensor:
        return self._base()

    def times(self, a: Tensor) -> Tensor:
        return self._dropped.times(a)

    def moved(self, change: Tensor) -> Tensor:
        return self._base.moved(change)

    def rows(self, r: Tensor) -> Tensor:
        return self._base.rows(r)

    def to_output(self, y: Tensor) -> Tensor:
        return self._base.to_output(y)


class LookupMap:
    """Computes x·W of an embedding: x is one-hot, and never formed."""

    def __init__(self, layer: Layer, inputs: Tensor):
        self._layer, self._inputs = layer, inputs
        self._indices = ops.reshape(ops.cast(inputs, "int32"), (-1,))
        self.dtype = _with_adapter(layer, layer.compute_dtype)

    def __call__(self) -> Tensor:
        y = self._layer.linear(self._inputs)
        return ops.cast(ops.reshape(y, (-1, y.shape[-1])), self.dtype)

    def times(self, a: Tensor) -> Tensor:
        return ops.take(a, self._indices, axis=0)

    def moved(self, change: Tensor) -> Tensor:
        return self() + self.rows(change)

    def rows(self, r: Tensor) -> Tensor:
        return ops.matmul(r, _table(self._layer, r.dtype))

    def to_output(self, y: Tensor) -> Tensor:
        return ops.reshape(y, (*ops.shape(self._inputs), y.shape[-1]))


class TiedHeadMap:
    """Computes x·Wᵀ of a tied embedding, x (..., dim), before its soft cap."""

    def __init__(self, layer: Layer, inputs: Tensor):
        self._layer = layer
        self.output_dtype = layer.reverse_dtype or keras.backend.result_type(
            inputs.dtype, layer.adapter.target.kernel.dtype
        )
        self.dtype = _with_adapter(layer, self.output_dtype)
        self._inputs = ops.cast(inputs, self.output_dtype)
        x = ops.reshape(self._inputs, (-1, inputs.shape[-1]))
        self._x = ops.cast(x, self.dtype)

    def __call__(self) -> Tensor:
        return self._product(self._inputs)

    def times(self, a: Tensor) -> Tensor:
        return ops.matmul(self._x, ops.cast(a, self.dtype))

    def moved(self, change: Tensor) -> Tensor:
        x = ops.add(self._x, change)
        return self._product(ops.reshape(x, ops.shape(self._inputs)))

    def rows(self, r: Tensor) -> Tensor:
        return ops.matmul(r, ops.transpose(_table(self._layer, r.dtype)))

    def back(self, r: Tensor) -> Tensor:
        return ops.matmul(r, _table(self._layer, r.dtype))

    def to_output(self, y: Tensor) -> Tensor:
        return ops.reshape(y, (*ops.shape(self._inputs)[:-1], y.shape[-1]))

    def _product(self, inputs: Tensor) -> Tensor:
        y = self._layer.linear(inputs, reverse=True)
        return ops.cast(ops.reshape(y, (-1, y.shape[-1])), self.dtype)


def _with_adapter(layer: Layer, dtype: str) -> str:
    """Returns the dtype of an embedding's output beside its adapter's weights.

    Where Keras does not cast variables, weights in float32 meet an output in
    bfloat16, and TensorFlow does not add up two dtypes.
    """
    weights = autocast_dtype() or layer.adapter.variable_dtype
    wider: str = keras.backend.result_type(dtype, weights)
    return wider


def _table(layer: Layer, dtype: str) -> Tensor:
    return ops.cast(layer.adapter.target.matrix(), dtype)
