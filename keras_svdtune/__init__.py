"""keras_svdtune: SVD-based fine-tuning in one line, on any Keras model.

Importing the package adds `enable_svf()` and its relatives to every KerasHub
Backbone and Task. The same functions take any `keras.Model`.

| module | the one idea in it |
|---|---|
| `matrix` | the matrix behind a kernel |
| `svd`, `blocks` | the decomposition of a matrix, also of a large one |
| `leading` | the largest components of a matrix, without the others |
| `lapack` | some eigenvectors of a symmetric matrix |
| `cache`, `digest` | decompositions kept on disk, and found again |
| `methods/` | what each method trains, one file each |
| `adapter`, `hosts` | the weights a method adds, and the layers they live in |
| `maps` | the frozen product of a layer, as a method sees it |
| `embeddings` | tables, looked up and in reverse |
| `raw_kernels`, `bank` | kernels without a layer of their own: experts |
| `quantized` | int8 and int4 kernels, read and written |
| `replaced_kernel`, `quantization_error` | a base made for its adapter |
| `attach`, `freezing`, `compiled` | converting a built layer, and back |
| `targets`, `enable` | which layers, and the verb |
| `files`, `adapter_file` | saving and loading; what is in a file |
| `hub`, `hub_client` | the same through Hugging Face and Kaggle |
| `file_checks`, `fingerprint` | whether a file belongs to a model |
| `renumbered` | the layers of a file that have another number here |
| `moving_statistics` | what training moves beside the adapter |
| `thin`, `convert` | what an adapter adds as a thin product: any as a LoRA |
| `export`, `hf_names` | a folder for PEFT, in transformers' names |
| `compose`, `sums` | adapters added up |
| `devices`, `layouts` | several devices: what goes where |
| `planning` | the work of enabling, on all cores and processes |
| `layout_map`, `abstract` | how to split a decoder, by its structure alone |
| `layers` | layers to declare in hand-built models |
| `report`, `progress` | what it costs, and how long it takes |
| `spectrum`, `plot_spectrum` | singular values: a table, and a picture |
| `spectral_monitor`, `spectral_change` | what training does to them |
| `adapted_matrix` | one matrix, without its adapter and with it |
| `backbone` | the methods that KerasHub classes get |
"""

from keras_svdtune import keras_hub_methods, layers
from keras_svdtune.callbacks import RankAllocator
from keras_svdtune.convert.low_rank_change import LayerConversion
from keras_svdtune.convert.peft import export_peft
from keras_svdtune.convert.to_lora import Conversion, to_lora
from keras_svdtune.files.compose import compose
from keras_svdtune.files.format import SavedAdapter
from keras_svdtune.files.hub import push_adapter
from keras_svdtune.files.save_load import load_adapter, save_adapter
from keras_svdtune.layout_map import svdtune_layout_map
from keras_svdtune.matrix.cache import set_decomposition_cache
from keras_svdtune.methods import (
    METHODS,
    SVF,
    SVFT,
    AdaLoRA,
    DoRA,
    LoRA,
    LoRAXS,
    Method,
    MiLoRA,
    PiSSA,
)
from keras_svdtune.model.enable import (
    adapter_disabled,
    enable_adapter,
    merge_adapter,
    remove_adapter,
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
from keras_svdtune.spectral_monitor import SpectralMonitor

__version__ = "0.1.0"

enable_svf = keras_hub_methods.enable_function(SVF)
enable_svft = keras_hub_methods.enable_function(SVFT)
enable_pissa = keras_hub_methods.enable_function(PiSSA)
enable_milora = keras_hub_methods.enable_function(MiLoRA)
enable_lora_xs = keras_hub_methods.enable_function(LoRAXS)
enable_adalora = keras_hub_methods.enable_function(AdaLoRA)
enable_dora = keras_hub_methods.enable_function(DoRA)

(
    SVFDense,
    SVFEinsumDense,
    SVFConv1D,
    SVFConv2D,
    SVFConv3D,
    SVFEmbedding,
    SVFReversibleEmbedding,
) = layers.layer_classes(SVF)
(
    SVFTDense,
    SVFTEinsumDense,
    SVFTConv1D,
    SVFTConv2D,
    SVFTConv3D,
    SVFTEmbedding,
    SVFTReversibleEmbedding,
) = layers.layer_classes(SVFT)
(
    PiSSADense,
    PiSSAEinsumDense,
    PiSSAConv1D,
    PiSSAConv2D,
    PiSSAConv3D,
    PiSSAEmbedding,
    PiSSAReversibleEmbedding,
) = layers.layer_classes(PiSSA)
(
    MiLoRADense,
    MiLoRAEinsumDense,
    MiLoRAConv1D,
    MiLoRAConv2D,
    MiLoRAConv3D,
    MiLoRAEmbedding,
    MiLoRAReversibleEmbedding,
) = layers.layer_classes(MiLoRA)
(
    LoRAXSDense,
    LoRAXSEinsumDense,
    LoRAXSConv1D,
    LoRAXSConv2D,
    LoRAXSConv3D,
    LoRAXSEmbedding,
    LoRAXSReversibleEmbedding,
) = layers.layer_classes(LoRAXS)
(
    LoRADense,
    LoRAEinsumDense,
    LoRAConv1D,
    LoRAConv2D,
    LoRAConv3D,
    LoRAEmbedding,
    LoRAReversibleEmbedding,
) = layers.layer_classes(LoRA)
(
    AdaLoRADense,
    AdaLoRAEinsumDense,
    AdaLoRAConv1D,
    AdaLoRAConv2D,
    AdaLoRAConv3D,
) = layers.layer_classes(AdaLoRA)
(
    DoRADense,
    DoRAEinsumDense,
    DoRAConv1D,
    DoRAConv2D,
    DoRAConv3D,
    DoRAEmbedding,
    DoRAReversibleEmbedding,
) = layers.layer_classes(DoRA)

keras_hub_methods.patch_keras_hub()

__all__ = [
    "METHODS",
    "SVF",
    "SVFT",
    "AdaLoRA",
    "AdaLoRAConv1D",
    "AdaLoRAConv2D",
    "AdaLoRAConv3D",
    "AdaLoRADense",
    "AdaLoRAEinsumDense",
    "Conversion",
    "Cost",
    "DoRA",
    "DoRAConv1D",
    "DoRAConv2D",
    "DoRAConv3D",
    "DoRADense",
    "DoRAEinsumDense",
    "DoRAEmbedding",
    "DoRAReversibleEmbedding",
    "LayerConversion",
    "LayerCost",
    "LayerQuantization",
    "LayerSpectrum",
    "LoRA",
    "LoRAConv1D",
    "LoRAConv2D",
    "LoRAConv3D",
    "LoRADense",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRAReversibleEmbedding",
    "LoRAXS",
    "LoRAXSConv1D",
    "LoRAXSConv2D",
    "LoRAXSConv3D",
    "LoRAXSDense",
    "LoRAXSEinsumDense",
    "LoRAXSEmbedding",
    "LoRAXSReversibleEmbedding",
    "Method",
    "MiLoRA",
    "MiLoRAConv1D",
    "MiLoRAConv2D",
    "MiLoRAConv3D",
    "MiLoRADense",
    "MiLoRAEinsumDense",
    "MiLoRAEmbedding",
    "MiLoRAReversibleEmbedding",
    "PiSSA",
    "PiSSAConv1D",
    "PiSSAConv2D",
    "PiSSAConv3D",
    "PiSSADense",
    "PiSSAEinsumDense",
    "PiSSAEmbedding",
    "PiSSAReversibleEmbedding",
    "QuantizationError",
    "RankAllocator",
    "SVFConv1D",
    "SVFConv2D",
    "SVFConv3D",
    "SVFDense",
    "SVFEinsumDense",
    "SVFEmbedding",
    "SVFReversibleEmbedding",
    "SVFTConv1D",
    "SVFTConv2D",
    "SVFTConv3D",
    "SVFTDense",
    "SVFTEinsumDense",
    "SVFTEmbedding",
    "SVFTReversibleEmbedding",
    "SavedAdapter",
    "SpectralChange",
    "SpectralMonitor",
    "Spectrum",
    "adapter_disabled",
    "adapter_summary",
    "compose",
    "enable_adalora",
    "enable_adapter",
    "enable_dora",
    "enable_lora_xs",
    "enable_milora",
    "enable_pissa",
    "enable_svf",
    "enable_svft",
    "estimate",
    "export_peft",
    "load_adapter",
    "merge_adapter",
    "plot_spectrum",
    "push_adapter",
    "quantization_error",
    "remove_adapter",
    "save_adapter",
    "set_decomposition_cache",
    "spectrum",
    "svdtune_layout_map",
    "to_lora",
]
