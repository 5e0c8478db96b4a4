# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/05_tpu_slice.ipynb)
#
# # A 9B model on a TPU slice
#
# A model that no single device holds is spread over several, and SVF's singular vectors have to be spread with it. Keras does that by a `LayoutMap`: which dimension of which weight goes along which axis of the devices.
#
# This notebook needs eight devices: a TPU with eight chips, such as Kaggle's v5e-8, for Gemma 2 9B. Elsewhere it makes eight virtual devices of the CPU, which share its memory and speed, and takes a small model. Everything else is the same.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo]"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# Only CPUs heed this. It has to be set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import keras
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import keras_svdtune
from keras_svdtune.demo import fit, notebook, pirate

SMALL = notebook.small()
STEPS, LENGTH, HELD_OUT = (6, 24, 8) if SMALL else (200, 40, 64)
notebook.look()
devices = keras.distribution.list_devices()
print(devices)
