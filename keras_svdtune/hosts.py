"""Layers that an adapter can live in: Dense and EinsumDense.

`AdapterHost` turns a layer's `call` into: flatten to (tokens, in), let the
adapter compute from there with the layer's own product as the frozen map,
and shape the result back. Bias and activation follow as ever.

To add a kind of layer, subclass it here, say how its kernel is a matrix
(`matrix_view`) and how it multiplies (`linear`), and enter it in `HOSTS`.
"""

from typing import Any

import keras
from keras import ops

from keras_svdtune.adapter import Adapter
from keras_svdtune.matrix import DENSE_EQUATION, MatrixView


class FrozenMap:
    """The frozen product of a layer, for flat tensors.

    Args:
        layer: the host.
        inputs: what the layer was called with; `x` is the same, flat.
    """

    def __init__(self, layer: "AdapterHost", inputs: Any):
        self._layer, self._inputs = layer, inputs
        self._view = layer.adapter.view
        self.x = self._view.flatten_inputs(inputs)
        self.batch_dims = self._view.batch_dims(inputs)

    def __call__(self, x: Any) -> Any:
        """(tokens, in) -> (tokens, out), tokens as in `inputs`."""
        if x is self.x:
            return self._product(self._inputs)
        return self._product(self._view.unflatten_inputs(x, self.batch_dims))

    def rows(self, x: Any) -> Any:
        """(k, in) -> (k, out) for any k."""
        dims = (x.shape[0],) + (1,) * (len(self.batch_dims) - 1)
        return self._product(self._view.unflatten_inputs(x, dims))

    def _product(self, tensor: Any) -> Any:
        return self._view.flatten_outputs(self._layer.linear(tensor))


class AdapterHost:
    """Mixin before a Keras layer class: computes through `self.adapter`."""

    adapter: Adapter

    @staticmethod
    def matrix_view(layer: Any) -> MatrixView:
        """How the kernel of `layer` reads as a matrix."""
        raise NotImplementedError

    def linear(self, inputs: Any) -> Any:
        """The layer's own product of `inputs` and its frozen kernel.

        The very op of the plain layer, on tensors of the same shape: this is
        what makes the first step bit-identical.
        """
        raise NotImplementedError

    def call(self, inputs: Any, training: Any = None) -> Any:
        layer: Any = self
        base = FrozenMap(layer, inputs)
        y = self.adapter.call(base.x, base)
        y = self.adapter.view.unflatten_outputs(y, base.batch_dims)
        if layer.bias is not None:
            y = ops.add(y, layer.bias)
        if layer.activation is not None:
            y = layer.activation(y)
        return y

    def merged_kernel(self) -> Any:
        """The kernel of the plain layer that computes the same."""
        layer: Any = self
        view = self.adapter.view
        merged = self.adapter.merged(view.to_matrix(layer._kernel.value))
        return ops.cast(view.to_kernel(merged), layer._kernel.dtype)


class AdaptedDense(AdapterHost, keras.layers.Dense):
    """A Dense layer with an adapter."""

    @staticmethod
    def matrix_view(layer: Any) -> MatrixView:
        return MatrixView(DENSE_EQUATION, tuple(layer._kernel.shape))

    def linear(self, inputs: Any) -> Any:
        return ops.matmul(inputs, self.kernel)


class AdaptedEinsumDense(AdapterHost, keras.layers.EinsumDense):
    """An EinsumDense layer with an adapter."""

    @staticmethod
    def matrix_view(layer: Any) -> MatrixView:
        return MatrixView(layer.equation, tuple(layer._kernel.shape))

    def linear(self, inputs: Any) -> Any:
        return ops.einsum(self.equation, inputs, self.kernel)


# The plain class -> the class with an adapter. A subclass of a plain class
# may compute something else, so only the class itself is looked up.
HOSTS: dict[type, type[AdapterHost]] = {
    keras.layers.Dense: AdaptedDense,
    keras.layers.EinsumDense: AdaptedEinsumDense,
}


def plain_class(host: AdapterHost) -> type:
    """The class that `host` is without its adapter."""
    return next(p for p, a in HOSTS.items() if isinstance(host, a))
