"""The base class of methods whose weights start from data."""

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
from keras import ops

from keras_svdtune.matrix.factors import Factors
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.settings import check_whole_number
from keras_svdtune.runtime.types import Array, Tensor


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What came into one layer: sums over its rows x (in,), in float64.

    Rows are tokens, or the patches of a convolution. Padding does not count.

    Attributes:
        count: int, the number of rows.
        total: (in,), Σx.
        gram: (in, in), Σxᵀx = XᵀX.
    """

    count: int
    total: np.ndarray
    gram: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """The covariance (in, in) of the rows about their mean."""
        mean = self.total / self.count
        found: np.ndarray = self.gram / self.count - np.outer(mean, mean)
        return found


# What a method learns of the data for one matrix: `Inputs`, or the gradient.
Seen = Inputs | np.ndarray


@dataclasses.dataclass(frozen=True)
class DataMethod(Method):
    """A method whose weights start from what the model does with some data.

    `model/capture.py` sends the data through the model when the method is
    enabled, and gives each matrix what `statistic` names. The start is in the
    adapter file, so that loading needs no data, and neither do layers that are
    declared with the method: they start as `start` says without any.

    Attributes:
        statistic: `"inputs"`, what comes into the layer, as `Inputs`; or
            `"gradient"`, ∂L/∂W (in, out) of the loss that the model was
            compiled with, averaged over the batches, a float64 array.
        data: what `fit` takes. It is no setting: files and layers do not have
            it, and an enabled model keeps no reference to it.
        examples: int. How many of them are read; of ready batches, whole ones.
    """

    statistic: ClassVar[Literal["inputs", "gradient"]]

    data: Any = dataclasses.field(
        default=None, compare=False, repr=False, kw_only=True
    )
    examples: int = dataclasses.field(default=256, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_number("examples", self.examples, 1)

    def start(
        self,
        matrix: np.ndarray,
        seen: Seen | None,
        random: np.random.RandomState,
    ) -> dict[str, Array]:
        """Returns the first values of the weights, by name; the others are 0.

        Args:
            matrix: W (in, out), float32.
            seen: what `statistic` names, never zero; None without data.
            random: as for `initial_values`.
        """
        raise NotImplementedError

    def initial_values(
        self,
        matrix: Tensor,
        factors: Factors | None,
        random: np.random.RandomState,
    ) -> dict[str, Tensor]:
        return self.start(ops.convert_to_numpy(matrix), None, random)
