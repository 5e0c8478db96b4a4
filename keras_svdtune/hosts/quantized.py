"""Bases whose kernels are quantized: W read, and W' written.

Keras keeps an int8 or int4 kernel scaled, packed and reshaped, each kind of
layer in its own way. Nothing of that is repeated here: W is what the layer
makes of the rows of an identity, and W' is quantized by a fresh layer.
"""

from collections.abc import Callable

from keras import ops
from keras.layers import Embedding

from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.methods.pissa import QUANTIZATIONS
from keras_svdtune.runtime.keras_internals import forget_variable
from keras_svdtune.runtime.placement import undistributed
from keras_svdtune.runtime.types import Layer, Tensor

MODES = QUANTIZATIONS
_ROWS = 1024  # of the identity at a time: an identity of 16,384 fills 1 GiB


def identity_rows(
    product: Callable[[Tensor], Tensor], view: MatrixView, dtype: str
) -> Tensor:
    """W (in, out), float32, from the product x -> x·W of a layer.

    Args:
        product: the layer's product, without quantization of its inputs.
        view: how its kernel is a matrix.
        dtype: the layer's compute dtype.
    """
    n, parts = view.shape[0], []
    for start in range(0, n, _ROWS):
        rows = ops.eye(min(_ROWS, n - start), n, k=start, dtype=dtype)
        y = product(view.rows_as_inputs(rows))
        parts.append(ops.cast(view.flatten_outputs(y), "float32"))
    return ops.concatenate(parts, axis=0)


def variable_names(layer: Layer) -> tuple[str, str, str]:
    """The attributes of a kernel, and of its scale and zero point."""
    stem = "embeddings" if isinstance(layer, Embedding) else "kernel"
    return f"_{stem}", f"{stem}_scale", f"{stem}_zero"


def requantized(layer: Layer, kernel: Tensor) -> dict[str, Tensor]:
    """The variables of a quantized layer for another kernel, by attribute.

    Args:
        layer: a plain Dense, EinsumDense or Embedding, quantized to int8 or
            int4.
        kernel: a float kernel.
    """
    fresh = quantized_copy(
        layer, kernel, layer.quantization_mode, layer.quantization_config
    )
    return {
        name: getattr(fresh, name).value
        for name in variable_names(layer)
        if hasattr(fresh, name)
    }


def quantized_copy(
    layer: Layer, kernel: Tensor, mode: str, quantization_config: object = None
) -> Layer:
    """A fresh layer like `layer`, with another kernel, quantized by Keras.

    Args:
        layer: a plain Dense, EinsumDense or Embedding, quantized or not.
        kernel: a float kernel.
        mode: `"int8"` or `"int4"`.
        quantization_config: Keras' settings of the mode; None for its
            defaults.
    """
    config = layer.get_config()
    config["dtype"] = float_policy(layer)
    initializer = f"{variable_names(layer)[0].strip('_')}_initializer"
    config[initializer] = "zeros"
    with undistributed():  # it is for its values only
        fresh = type(layer).from_config(config)
        fresh.build_from_config(layer.get_build_config())
        quantize(fresh, kernel, mode, quantization_config)
    return fresh


def float_policy(layer: Layer) -> str:
    """The name of a layer's dtype policy, or of the one before quantization.

    Not by `dtype_policy.name`: once a backbone was saved, Keras has cleared
    that of every quantized layer.
    """
    compute, variable = layer.compute_dtype, layer.variable_dtype
    return compute if compute == variable else f"mixed_{compute}"


def quantize(
    layer: Layer, kernel: Tensor, mode: str, quantization_config: object = None
) -> None:
    """Keras' `layer.quantize`, with `kernel` instead of the layer's own.

    Keras collects garbage whenever a layer deletes a variable, a quarter of a
    second each time. So the float kernel is a tensor when it does.
    """
    name, *_ = variable_names(layer)
    variable = getattr(layer, name)
    forget_variable(layer, variable)
    setattr(
        layer, name, ops.cast(ops.convert_to_tensor(kernel), variable.dtype)
    )
    layer.quantize(mode, config=quantization_config)
