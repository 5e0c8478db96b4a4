"""Moving statistics: what training changes beside the adapter.

BatchNormalization goes on under an adapter as it did before: in training it
computes by the batch, and its moving mean and variance follow. They are no
trainables, yet what was learned is not complete without them. So they are kept
as they were when the adapter was enabled; taking it away, or switching it off,
gives those back; and an adapter file holds the ones that have moved.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_svdtune.model.targets import all_layers, layers_by_path
from keras_svdtune.runtime.processes import to_numpy

_NAMES = ("moving_mean", "moving_variance")


class Statistics:
    """The moving statistics of a model, as they were when this was made.

    Args:
        model: a built model.
        known: bool. False where nobody knows what they were without what
            was learned: then all of them count as moved.

    Attributes:
        variables: dict from `<layer path>/moving_mean` to variable.
    """

    def __init__(self, model: keras.Model, known: bool = True):
        self.variables = {
            f"{path}/{name}": getattr(layer, name)
            for path, layer in layers_by_path(all_layers(model)).items()
            if isinstance(layer, keras.layers.BatchNormalization)
            and layer.built
            for name in _NAMES
        }
        self._known = known
        self._stale = False
        self._then = self.now()

    def forget(self) -> None:
        """The base is another from now on: its values are those of the model
        when they are next asked for, once its whole file was read.
        """
        self._stale = True

    @property
    def _before(self) -> dict[str, np.ndarray]:
        if self._stale:
            self._then, self._stale = self.now(), False
        return self._then

    def now(self) -> dict[str, np.ndarray]:
        """Their values at present, float32."""
        return {key: _numpy(v) for key, v in self.variables.items()}

    def moved(self) -> dict[str, np.ndarray]:
        """Those that differ from what they were."""
        return {
            key: value
            for key, value in self.now().items()
            if not (self._known and np.array_equal(value, self._before[key]))
        }

    def assign(self, values: Mapping[str, np.ndarray] | None = None) -> None:
        """Sets these; the others, or all, to what they were."""
        for key, value in {**self._before, **(values or {})}.items():
            self.variables[key].assign(value)

    def check(self, values: Mapping[str, np.ndarray], source: str) -> None:
        """Raises a ValueError unless `values` are some of this model's."""
        for key, value in values.items():
            shape = (
                tuple(self.variables[key].shape)
                if key in self.variables
                else None
            )
            if shape != value.shape or not np.isfinite(value).all():
                raise ValueError(
                    f"{source} holds moving statistics '{key}' of shape "
                    f"{value.shape}, finite: {np.isfinite(value).all()}. "
                    f"Expected the shape {shape} of this model's "
                    "BatchNormalization, finite."
                )


def _numpy(variable: Any) -> np.ndarray:
    return to_numpy(ops.cast(variable.value, "float32")).copy()
