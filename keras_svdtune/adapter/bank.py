"""Applies a method, which knows one matrix, to each matrix of a bank.

A bank (count, in, out) holds the experts of a mixture, for example.
"""

from collections.abc import Callable

import keras
from keras import ops

from keras_svdtune.methods.base import Method, Weights, WeightValues
from keras_svdtune.runtime.types import Tensor


def over_bank(
    function: Callable[..., Tensor],
    method: Method,
    weights: Weights,
    *arrays: Tensor,
) -> Tensor:
    """Returns `function(weights, *arrays)` for each matrix, stacked.

    Args:
        function: takes the weights of one matrix, as attributes, and its part
            of each of `arrays`.
        weights: the stacked weights of the bank, as attributes, and the `shape`
            (in, out) of one matrix.
        *arrays: tensors whose first axis is that of the bank.
    """
    stacked = {
        w.name: ops.convert_to_tensor(getattr(weights, w.name))
        for w in method.weights(weights.shape)
    }

    def one(each: tuple[dict[str, Tensor], list[Tensor]]) -> Tensor:
        values, parts = each
        return function(WeightValues(weights.shape, **values), *parts)

    if keras.backend.backend() == "jax":
        return ops.vectorized_map(one, (stacked, list(arrays)))
    # One by one: torch cannot vectorize a function with a custom gradient.
    matrices = [
        one(
            (
                {name: x[i] for name, x in stacked.items()},
                [x[i] for x in arrays],
            )
        )
        for i in range(arrays[0].shape[0])
    ]
    return ops.stack(matrices)
