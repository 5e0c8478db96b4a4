"""The methods, one file each. `base.py` says what a method is."""

from keras_svdtune.methods.adalora import AdaLoRA
from keras_svdtune.methods.base import METHODS, Method, Weight, register
from keras_svdtune.methods.dora import DoRA
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.methods.lora_xs import LoRAXS
from keras_svdtune.methods.milora import MiLoRA
from keras_svdtune.methods.pissa import PiSSA
from keras_svdtune.methods.svf import SVF
from keras_svdtune.methods.svft import SVFT

__all__ = [
    "METHODS",
    "SVF",
    "SVFT",
    "AdaLoRA",
    "DoRA",
    "LoRA",
    "LoRAXS",
    "MiLoRA",
    "Method",
    "PiSSA",
    "Weight",
    "register",
]
