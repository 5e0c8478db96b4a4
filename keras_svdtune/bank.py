"""One computation for every matrix of a bank, such as experts.

The methods know one matrix W (in, out). Here they meet (count, in, out).
"""

import types
from collections.abc import Callable
from typing import Any

import keras
from keras import ops


def over_bank(
    function: Callable[[Any, Any], Any],
    shape: tuple[int, int],
    values: dict[str, Any],
    *arrays: Any,
) -> Any:
    """`function(weights, *arrays)` for each matrix of a bank, stacked.

    Args:
        function: takes the weights of one matrix, as attributes, and its part
            of each of `arrays`.
        shape: (in, out) of one matrix.
        values: the weights of the bank, by name, each stacked.
        *arrays: tensors whose first axis is that of the bank.
    """

    def one(each: Any) -> Any:
        values, parts = each
        weights = types.SimpleNamespace(shape=shape, **values)
        return function(weights, *parts)

    if keras.backend.backend() == "jax":
        return ops.vectorized_map(one, (values, arrays))
    # The others cannot vectorize a product with a gradient of its own.
    count = arrays[0].shape[0]
    return ops.stack(
        [
            one(
                (
                    {name: value[i] for name, value in values.items()},
                    [array[i] for array in arrays],
                )
            )
            for i in range(count)
        ]
    )
