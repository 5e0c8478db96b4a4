"""keras_svdtune: SVD-based fine-tuning in one line, on any Keras model.

Importing the package adds `enable_svf()` and its relatives to every KerasHub
Backbone and Task. The same functions take any `keras.Model`.

The folders, each of which stands on those below it alone:

| folder | what it knows |
|---|---|
| `demo` | a whole run on a real small model |
| `keras_hub_methods`, `layers`, `callbacks`, `layout_map` | the user's doors |
| `experts` | several adapters: mixed, chosen by the prompt, trained by reward |
| `files` | adapter files: written, read, checked, added up, shared |
| `convert` | any adapter as a LoRA, and in PEFT's form |
| `reports` | costs, spectra, errors: tables and pictures |
| `model` | a whole model: its targets, enabling, merging, removing |
| `hosts` | Keras layers, one at a time |
| `adapter` | one method's weights for one matrix |
| `methods` | what each method trains, one file each |
| `matrix` | the matrix W behind a kernel, and its decomposition |
| `runtime` | devices, processes, disks, and Keras' internals |

The classes of the methods, `enable_<method>` and the layers (`SVFDense`) are
made from the registry of methods, those included that other packages register.
"""

import inspect as _inspect
from typing import Any

from keras_svdtune import keras_hub_methods as _keras_hub_methods
from keras_svdtune import layers as _layers
from keras_svdtune import methods as _methods  # registers them
from keras_svdtune.callbacks import RankAllocator, SpectralMonitor
from keras_svdtune.convert.low_rank_change import LayerConversion
from keras_svdtune.convert.peft import export_peft
from keras_svdtune.convert.to_lora import Conversion, to_lora
from keras_svdtune.experts.dispatch import Dispatcher
from keras_svdtune.experts.mixture import (
    Mixture,
    MixtureStep,
    search_mixture,
)
from keras_svdtune.experts.policy import train_policy
from keras_svdtune.files.compose import compose
from keras_svdtune.files.format import SavedAdapter
from keras_svdtune.files.hub import push_adapter
from keras_svdtune.files.save_load import load_adapter, save_adapter
from keras_svdtune.layout_map import svdtune_layout_map
from keras_svdtune.matrix.cache import set_decomposition_cache
from keras_svdtune.methods.base import METHODS, Method
from keras_svdtune.model import hooks as _hooks
from keras_svdtune.model.enable import (
    enable_adapter,
    merge_adapter,
    remove_adapter,
)
from keras_svdtune.model.for_a_while import (
    adapter_disabled,
    adapter_merged,
    adapter_per_example,
)
from keras_svdtune.model.names import (
    adapter_names,
    delete_adapter,
    set_adapter,
)
from keras_svdtune.reports.cost import (
    Cost,
    LayerCost,
    adapter_summary,
    estimate,
)
from keras_svdtune.reports.plot_spectrum import plot_spectrum
from keras_svdtune.reports.quantization_error import (
    LayerQuantization,
    QuantizationError,
    quantization_error,
)
from keras_svdtune.reports.spectral_change import SpectralChange
from keras_svdtune.reports.spectrum import LayerSpectrum, Spectrum, spectrum
from keras_svdtune.version import __version__ as __version__

_keras_hub_methods.patch_keras_hub()
_hooks.watch()

_IMPORTED = [
    name
    for name, value in globals().items()
    if not (name.startswith("_") or _inspect.ismodule(value) or value is Any)
]


def _from_registry() -> dict[str, Any]:
    """The public names that follow from the registered methods."""
    methods = {cls.__name__: cls for cls in METHODS.values()}
    return {**methods, **_keras_hub_methods.ON_MODELS, **_layers.LAYERS}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_IMPORTED, *_from_registry()})
    try:
        return _from_registry()[name]
    except KeyError:
        raise AttributeError(
            f"module 'keras_svdtune' has no attribute '{name}'"
        ) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_from_registry()})
