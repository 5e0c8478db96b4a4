"""Computes a product for each example of a batch with weights of its own."""

from collections.abc import Callable

import keras
from keras import ops

from keras_svdtune.methods.base import Weights, WeightValues
from keras_svdtune.runtime.types import Shape, Tensor

# Maps the weights of an adapter and inputs (examples, ...) to outputs.
Product = Callable[[Weights, Tensor], Tensor]


def over_examples(
    product: Product,
    shape: Shape,
    frozen: dict[str, Tensor],
    tables: dict[str, Tensor],
    inputs: Tensor,
) -> Tensor:
    """Returns `product` of each example with its own weights.

    On JAX all examples are one vectorized product, in which W is read once; on
    the other backends they are computed one by one.

    Args:
        product: is called with one example, (1, ...).
        shape: (in, out) of W.
        frozen: the weights that all examples share, by name.
        tables: those that they do not, stacked along the first axis.
        inputs: (examples, ...), as many as in `tables`.
    """

    def one(each: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        own, x = each
        weights = WeightValues(shape, **frozen, **own)
        return product(weights, ops.expand_dims(x, 0))[0]

    if keras.backend.backend() == "jax":
        return ops.vectorized_map(one, (tables, inputs))
    # One by one: torch cannot vectorize a function with a custom gradient.
    (count,) = {table.shape[0] for table in tables.values()}
    # Where the number of rows is unknown before the call, another one than
    # that of the names is an error of this op.
    inputs = ops.reshape(inputs, (count, *ops.shape(inputs)[1:]))
    return ops.stack(
        [
            one(({name: x[i] for name, x in tables.items()}, inputs[i]))
            for i in range(count)
        ]
    )
