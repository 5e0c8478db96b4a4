"""Reads W from quantized kernels, and quantizes W'.

Keras scales, packs and reshapes an int8 or int4 kernel, each kind of layer in
its own way. None of that is repeated here: W is what the layer computes from
the rows of an identity, and W' is quantized by a fresh layer.
"""

from collections.abc import Callable

from keras import ops
from keras.layers import Embedding

from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.runtime.keras_internals import forget_variable
from keras_svdtune.runtime.placement import undistributed
from keras_svdtune.runtime.types import Layer, Tensor

_ROWS = 1024  # of the identity at a time: an identity of 16,384 fills 1 GiB


def identity_rows(
    product: Callable[[Tensor], Tensor], view: MatrixView, dtype: str
) -> Tensor:
    """Returns W (in, out), float32, from the product x -> x·W of a layer.

    It must not quantize its inputs. `dtype` is the layer's compute dtype.
    """
    n, parts = view.shape[0], []
    for start in range(0, n, _ROWS):
        rows = ops.eye(min(_ROWS, n - start), n, k=start, dtype=dtype)
        y = product(view.rows_as_inputs(rows))
        parts.append(ops.cast(view.flatten_outputs(y), "float32"))
    return ops.concatenate(parts, axis=0)


def variable_names(layer: Layer) -> tuple[str, str, str]:
    """Returns the attributes of a kernel, its scale and its zero point."""
    stem = "embeddings" if isinstance(layer, Embedding) else "kernel"
    return f"_{stem}", f"{stem}_scale", f"{stem}_zero"


def requantized(layer: Layer, kernel: Tensor) -> dict[str, Tensor]:
    """Returns a quantized layer's variables for a float kernel, by name."""
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
    """Makes a layer like `layer` with a float kernel that Keras quantizes.

    Args:
        layer: a plain Dense, EinsumDense or Embedding, quantized or not.
        mode: `"int8"` or `"int4"`.
        quantization_config: Keras' settings of the mode; None for defaults.
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
    """Returns the name of a layer's dtype policy before any quantization.

    `dtype_policy.name` does not tell: once a backbone was saved, Keras has
    cleared it in every quantized layer.
    """
    compute, variable = layer.compute_dtype, layer.variable_dtype
    return compute if compute == variable else f"mixed_{compute}"


def quantize(
    layer: Layer, kernel: Tensor, mode: str, quantization_config: object = None
) -> None:
    """Calls `layer.quantize` with `kernel` in place of the layer's own.

    The float kernel is made a tensor before: whenever a layer deletes a
    variable, Keras collects garbage, for a quarter of a second.
    """
    name, *_ = variable_names(layer)
    variable = getattr(layer, name)
    forget_variable(layer, variable)
    setattr(
        layer, name, ops.cast(ops.convert_to_tensor(kernel), variable.dtype)
    )
    layer.quantize(mode, config=quantization_config)
