"""A trained weight whose variable holds a part of it.

Adam moves every variable by about the learning rate, whatever the gradients'
size. The singular values of W want larger steps than LoRA's A and B, so their
variable holds δ / step: at the same rate δ moves `step` times as far. Formulas,
files and checks have δ itself.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_svdtune.methods.base import Weight
from keras_svdtune.runtime.types import Shape, Tensor, Variable


class Stepped:
    """The weight `step · variable`, read and assigned like a variable."""

    def __init__(self, variable: Variable, step: float) -> None:
        self.variable = variable
        self.step = step

    @property
    def value(self) -> Tensor:
        return self.variable.value * self.step

    def assign(self, value: Tensor) -> None:
        # Exact both ways: a step is a power of two.
        value = ops.convert_to_tensor(value, self.variable.dtype)
        self.variable.assign(value / self.step)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    @property
    def path(self) -> str:
        return str(self.variable.path)

    @property
    def dtype(self) -> str:
        return str(self.variable.dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        found: np.ndarray = ops.convert_to_numpy(self.value)
        return found if dtype is None else found.astype(dtype)


def stepped(variable: Variable, weight: Weight) -> Variable | Stepped:
    """Returns the variable of a weight, or what reads it as the weight."""
    return variable if weight.step == 1.0 else Stepped(variable, weight.step)


def variable_of(found: Variable | Stepped) -> Variable:
    """Returns the variable that an optimizer trains."""
    return found.variable if isinstance(found, Stepped) else found


class Current:
    """An adapter's weights as methods take them: with tensors for `Stepped`."""

    def __init__(self, adapter: object, shape: Shape) -> None:
        self._adapter = adapter
        self.shape = shape

    def __getattr__(self, name: str) -> Tensor:
        found = getattr(self._adapter, name)
        return found.value if isinstance(found, Stepped) else found
