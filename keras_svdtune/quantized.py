"""Bases whose kernels are quantized: W read, and W' written.

Keras keeps an int8 or int4 kernel scaled, packed and reshaped, each kind of
layer in its own way. Nothing of that is repeated here: W is what the layer
makes of the rows of an identity, and W' is quantized by a fresh layer.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_svdtune.matrix import MatrixView

MODES = ("int8", "int4")
_ROWS = 1024  # of the identity at a time: an identity of 16,384 fills 1 GiB


def identity_rows(
    product: Callable[[Any], Any], view: MatrixView, dtype: str
) -> Any:
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


def variable_names(layer: Any) -> tuple[str, str, str]:
    """The attributes of value, scale and zero point of a quantized kernel."""
    stem = "kernel" if hasattr(layer, "kernel_scale") else "embeddings"
    return f"_{stem}", f"{stem}_scale", f"{stem}_zero"


def requantized(layer: Any, kernel: Any) -> dict[str, Any]:
    """The variables of a quantized layer for another kernel, by attribute.

    Args:
        layer: a plain Dense, EinsumDense or Embedding, quantized to int8 or
            int4.
        kernel: a float kernel.
    """
    config = layer.get_config()
    config["dtype"] = layer.dtype_policy.name.split("_from_")[-1]
    fresh = type(layer).from_config(config)
    fresh.build_from_config(layer.get_build_config())
    names = variable_names(layer)
    getattr(fresh, names[0]).assign(kernel)
    fresh.quantize(layer.quantization_mode, config=layer.quantization_config)
    return {
        name: getattr(fresh, name).value
        for name in names
        if hasattr(fresh, name)
    }
