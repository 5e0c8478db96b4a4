"""Adapts embeddings: tables that are looked up and multiplied by.

The table is the matrix W (vocabulary, dim). A lookup is x·W with one-hot rows
in x, which is never formed, so every method works as in a Dense layer. A tied
head multiplies by Wᵀ, for which a method has a formula of its own (`reverse`).

Embeddings are adapted only if a target names them. Few trainables of LoRA get a
gradient there (the rows of tokens in the batch), all of SVF's do.
"""

import keras
import keras_hub
from keras import ops

from keras_svdtune.hosts.host import HOSTS, AdapterHost
from keras_svdtune.hosts.linear_maps import LookupMap, TiedHeadMap
from keras_svdtune.hosts.target import plain_layer
from keras_svdtune.matrix.view import DENSE_EQUATION, MatrixView
from keras_svdtune.methods.base import Weights
from keras_svdtune.runtime.keras_internals import set_mask
from keras_svdtune.runtime.types import Layer, Tensor


class AdaptedEmbedding(AdapterHost, keras.layers.Embedding):
    """An Embedding layer with an adapter."""

    plain = keras.layers.Embedding
    kernel_name = "_embeddings"
    map_class = LookupMap

    @staticmethod
    def matrix_view(layer: Layer) -> MatrixView:
        return MatrixView(DENSE_EQUATION, (layer.input_dim, layer.output_dim))

    def linear(
        self, inputs: Tensor, kernel: Tensor | None = None, **reverse: bool
    ) -> Tensor:
        layer = plain_layer(self, logit_soft_cap=None)
        if layer.quantization_mode is not None:
            return layer.quantized_call(inputs, **reverse)
        return layer.call(inputs, **reverse)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        # It may be wider, like the adapter's weights.
        return ops.cast(self.product(inputs), self.compute_dtype)

    _int8_call = _int4_call = call


class AdaptedReversibleEmbedding(
    AdaptedEmbedding, keras.layers.ReversibleEmbedding
):
    """A ReversibleEmbedding layer with an adapter, for both directions.

    If the weights are not tied, the reverse projection is another matrix, and
    stays as it is.
    """

    plain = keras.layers.ReversibleEmbedding

    def call(  # type: ignore[override]
        self, inputs: Tensor, reverse: bool = False
    ) -> Tensor:
        if not reverse:
            y = super().call(inputs)
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                set_mask(y, mask)
            return y
        if not self.tie_weights:
            return plain_layer(self).call(inputs, reverse=True)

        def of(weights: Weights, x: Tensor) -> Tensor:
            base = TiedHeadMap(self, x)
            y = base.to_output(self.adapter.method.reverse(weights, base))
            return ops.cast(y, base.output_dtype)

        logits = self.adapter.for_each_example(of, inputs)
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits


class AdaptedHubReversibleEmbedding(
    AdaptedReversibleEmbedding, keras_hub.layers.ReversibleEmbedding
):
    """KerasHub's class of the same name, which computes the same."""

    plain = keras_hub.layers.ReversibleEmbedding


HOSTS[keras.layers.Embedding] = AdaptedEmbedding
HOSTS[keras.layers.ReversibleEmbedding] = AdaptedReversibleEmbedding
HOSTS[keras_hub.layers.ReversibleEmbedding] = AdaptedHubReversibleEmbedding


def why_not_adaptable(layer: Layer) -> str | None:
    """Returns why an embedding cannot be adapted, or None if it can."""
    if is_reversible(layer) and layer.quantization_mode is not None:
        return (
            "is a quantized ReversibleEmbedding, whose reverse product rounds "
            "its inputs and passes no gradient on in Keras; leave it in float"
        )
    return None


def is_reversible(layer: Layer) -> bool:
    """Returns whether a layer may be called to multiply by Wᵀ too."""
    return isinstance(layer, keras.layers.ReversibleEmbedding)


def untied(layer: Layer) -> bool:
    """Returns whether a layer's reverse projection is another matrix."""
    return is_reversible(layer) and not layer.tie_weights
