"""One computation for every matrix of a bank, such as experts.

The methods know one matrix W (in, out). Here they meet (count, in, out).
"""

import types
from collections.abc import Callable
from typing import Any

import keras
from keras import ops


def over_bank(
    function: Callable[..., Any], method: Any, weights: Any, *arrays: Any
) -> Any:
    """`function(weights, *arrays)` for each matrix of a bank, stacked.

    Args:
        function: takes the weights of one matrix, as attributes, and its part
            of each of `arrays`.
        method: a Method.
        weights: the weights of the bank, as attributes, each stacked; and the
            `shape` (in, out) of one matrix.
        *arrays: tensors whose first axis is that of the bank.
    """
    stacked = {
        w.name: ops.convert_to_tensor(getattr(weights, w.name))
        for w in method.weights(weights.shape)
    }

    def one(each: Any) -> Any:
        values, parts = each
        own = types.SimpleNamespace(shape=weights.shape, **values)
        return function(own, *parts)

    if keras.backend.backend() == "jax":
        return ops.vectorized_map(one, (stacked, arrays))
    # One by one: torch vectorizes no function with a gradient of its own.
    each = [
        ({name: x[i] for name, x in stacked.items()}, [x[i] for x in arrays])
        for i in range(arrays[0].shape[0])
    ]
    return ops.stack([one(x) for x in each])
