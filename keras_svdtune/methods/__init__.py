"""The methods, one file each. `base.py` says what a method is."""

from keras_svdtune.methods.base import METHODS, Method, Weight, register
from keras_svdtune.methods.svf import SVF

__all__ = ["METHODS", "SVF", "Method", "Weight", "register"]
