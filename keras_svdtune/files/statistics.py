"""Moving statistics in the adapter files of release 0.1.

There BatchNormalization went on computing by the batch under an adapter, and
files hold the moving statistics that had moved. Now it is frozen, and no new
file has any; but such a file is complete only with them.
"""

import keras
import numpy as np

from keras_svdtune.files.format import SavedAdapter
from keras_svdtune.model.state import statistics_of
from keras_svdtune.model.targets import layers_by_path
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model, Variable

# A variable, and what it is to hold, by `<layer path>/moving_mean`.
Statistics = dict[str, tuple[Variable, np.ndarray]]


def statistics_for(root: Model, adapter: SavedAdapter) -> Statistics:
    """The moving statistics that a file holds, for this model's variables.

    Raises:
        ValueError: they are not those of this model.
    """
    if not adapter.statistics:
        return {}
    ours = {
        f"{path}/{name}": getattr(layer, name)
        for path, layer in layers_by_path(layers_in(root)).items()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built
        for name in ("moving_mean", "moving_variance")
    }
    found = {}
    for key in adapter.statistics:
        value = adapter.arrays[key]
        shape = tuple(ours[key].shape) if key in ours else None
        if shape != value.shape or not np.isfinite(value).all():
            raise ValueError(
                f"{adapter.source} holds moving statistics '{key}' of shape "
                f"{value.shape}, finite: {np.isfinite(value).all()}. "
                f"Expected the shape {shape} of this model's "
                "BatchNormalization, finite."
            )
        found[key] = (ours[key], value)
    return found


def set_statistics(root: Model, new: Statistics) -> None:
    """Sets moving statistics under an adapter; earlier ones are the base's."""
    kept = statistics_of(root)
    for variable, base in kept.values():
        variable.assign(base)
    kept.clear()
    for key, (variable, value) in new.items():
        kept[key] = (variable, to_numpy(variable.value).copy())
        variable.assign(value)
