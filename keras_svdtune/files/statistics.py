"""Loads moving statistics from the adapter files of release 0.1.

There BatchNormalization still computed by the batch under an adapter, and
files hold the moving statistics that changed. Now an enable freezes it, and
new files hold none, but an old file is complete only with them.
"""

import keras
import numpy as np

from keras_svdtune.files.format import SavedAdapter
from keras_svdtune.model.state import statistics_of
from keras_svdtune.model.targets import layers_by_path
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Model, Variable

# By `<layer path>/moving_mean`: the variable, and the value to assign.
Statistics = dict[str, tuple[Variable, np.ndarray]]


def statistics_for(root: Model, adapter: SavedAdapter) -> Statistics:
    """Returns a file's moving statistics, with this model's variables for them.

    Raises a ValueError if they do not fit this model.
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
    """Assigns moving statistics; those of an earlier file are undone first."""
    kept = statistics_of(root)
    for variable, base in kept.values():
        variable.assign(base)
    kept.clear()
    for key, (variable, value) in new.items():
        kept[key] = (variable, to_numpy(variable.value).copy())
        variable.assign(value)
