"""keras_svdtune: SVD-based fine-tuning in one line, on any Keras model.

Importing the package adds `enable_svf()` and its relatives to every KerasHub
Backbone and Task. The same functions take any `keras.Model`.

| module | the one idea in it |
|---|---|
| `matrix` | the matrix behind a kernel |
| `svd` | the decomposition of a matrix |
| `methods/` | what each method trains, one file each |
| `adapter`, `hosts` | the weights a method adds, and the layers they live in |
| `attach`, `freezing`, `compiled` | converting a built layer, and back |
| `targets`, `enable` | which layers, and the verb |
| `files`, `fingerprint` | adapter files, and the base they belong to |
| `layers` | layers to declare in hand-built models |
| `report`, `progress` | what it costs, and how long it takes |
| `backbone` | the methods that KerasHub classes get |
"""

from keras_svdtune import backbone as _backbone
from keras_svdtune import layers as _layers
from keras_svdtune.enable import (
    adapter_disabled,
    enable_adapter,
    merge_adapter,
    remove_adapter,
)
from keras_svdtune.files import load_adapter, save_adapter
from keras_svdtune.methods import METHODS, SVF, Method
from keras_svdtune.report import Cost, LayerCost, adapter_summary, estimate

__version__ = "0.1.0"

enable_svf = _backbone.enable_function(SVF)
SVFDense, SVFEinsumDense = _layers.layer_classes(SVF)
_backbone.patch_keras_hub()

__all__ = [
    "METHODS",
    "SVF",
    "Cost",
    "LayerCost",
    "Method",
    "SVFDense",
    "SVFEinsumDense",
    "adapter_disabled",
    "adapter_summary",
    "enable_adapter",
    "enable_svf",
    "estimate",
    "load_adapter",
    "merge_adapter",
    "remove_adapter",
    "save_adapter",
]
