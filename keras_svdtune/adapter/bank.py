"""One computation for every matrix of a bank, such as experts.

The methods know one matrix W (in, out). Here they meet (count, in, out).
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
    """`function(weights, *arrays)` for each matrix of a bank, stacked.

    Args:
        function: takes the weights of one matrix, as attributes, and its part
            of each of `arrays`.
        method: the method whose weights they are.
        weights: the weights of the bank, as attributes, each stacked; and the
            `shape` (in, out) of one matrix.
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
    # One by one: torch vectorizes no function with a gradient of its own.
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
