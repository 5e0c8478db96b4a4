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
# Methods that train singular components speak of "large" and "small" ones: PiSSA trains the largest, MiLoRA the smallest, SVF scales all. Are there large and small ones? We look at every matrix of a model. Nothing is trained here.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from keras_svdtune import SVF, MiLoRA, PiSSA, plot_spectrum, spectrum
from keras_svdtune.demo import notebook

SMALL = notebook.small()  # False: Gemma, from Kaggle
notebook.look()

# %%
model, name = notebook.load("gemma3_1b", SMALL)
found = spectrum(model)
found.print()

# %% [markdown]
# ## Every spectrum
#
# A panel for each kind of matrix, a line for each layer. The grey band is 0.1 to 1.1.

# %%
plot_spectrum(found)

# %%
values = np.concatenate([x.s for x in found.layers])
Markdown(
    f"The model has **{len(values):,}** singular values, from {values.min():.2g} to {values.max():.3g}. "
    f"**{found.share_within(0.1, 1.1):.0%}** of them are between 0.1 and 1.1, {np.mean(values > 1.1):.0%} are above "
    f"and {np.mean(values < 0.1):.0%} below. The median is {np.median(values):.2f}."
)

# %% [markdown]
# ## How many lie between 0.1 and 1.1?
#
# By layer and kind. The band is absolute: a model that is scaled otherwise lies above it or below. What does not depend on the scale is the shape of the curves above: two groups would show as a step in them.

# %%
def largest_step(s):
    """From one value to the next, without a twentieth at either end."""
    s = s[len(s) // 20 : -len(s) // 20]
    return (s[:-1] / s[1:]).max()


steps = np.array([largest_step(x.s) for x in found.layers])
Markdown(
    f"A twentieth at either end aside, the largest step from one singular value to the next is **{np.median(steps) - 1:.1%}** "
    f"in the median matrix, and {steps.max() - 1:.0%} in the matrix with the largest. "
    + ("So there are no two groups: large and small are the ends of one slope." if steps.max() < 2 else "A step that large is worth a look.")
)

# %%
kinds = found.by_kind()
share = np.array([[x.share_within(0.1, 1.1) for x in layers] for layers in kinds.values()])
fig, ax = plt.subplots(figsize=(9, 3.4))
image = ax.imshow(share, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
ax.set(xlabel="layer", yticks=range(len(kinds)), title="Share of singular values from 0.1 to 1.1")
ax.set_yticklabels(kinds)
ax.grid(False)
fig.colorbar(image, label="share");

# %% [markdown]
# ## How much do the largest hold?
#
# The energy is the sum of the squares. If a few components held most of it, a low rank would be enough to stand for the matrix. On the left the median matrix of each kind; dotted is a matrix whose values are all equal.

# %%
MARKS = "os^DvPX*<>"
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
for (kind, layers), mark in zip(kinds.items(), MARKS):
    energy = np.median([np.cumsum(x.s**2) / np.sum(x.s**2) for x in layers], axis=0)
    share = np.arange(1, len(energy) + 1) / len(energy)
    left.plot(share, energy, marker=mark, markevery=0.12, label=kind)
    right.plot([x.effective_rank / len(x.s) for x in layers], marker=mark, ms=5)
left.plot([0, 1], [0, 1], ":", color="grey")
left.set(xlabel="share of the components, largest first", ylabel="share of the energy", title="Energy of the largest")
right.set(xlabel="layer", ylabel="effective rank / number of values", title="Effective rank", ylim=(0, 1))
fig.legend(loc="outside right upper");

# %%
notebook.table([
    {"kind": kind, **{f"top {r}": f"{np.median([x.energy(r) for x in layers]):.0%}" for r in (1, 8, 16, 64, 128)}}
    for kind, layers in kinds.items()
])

# %% [markdown]
# ## Condition numbers
#
# The largest singular value over the smallest. It says how far apart the ends are, and how well the smallest are known at all in low precision.

# %%
fig, ax = plt.subplots()
for (kind, layers), mark in zip(kinds.items(), MARKS):
    ax.plot([x.condition for x in layers], marker=mark, ms=5, label=kind)
ax.set(yscale="log", xlabel="layer", ylabel="condition number", title="Largest over smallest")
fig.legend(loc="outside right upper");

# %% [markdown]
# ## What the methods train
#
# The same spectra; below them what each method takes. PiSSA and MiLoRA of rank 16 train thin slices of the two ends, both singular vectors and values. SVF trains all values, and no vectors.

# %%
plot_spectrum(found, [PiSSA(rank=16), MiLoRA(rank=16), SVF()])

# %%
r = 16
top = np.median([x.energy(r) for x in found.layers])
bottom = np.median([1 - x.energy(len(x.s) - r) for x in found.layers])
Markdown(
    f"In the median matrix the {r} components that PiSSA trains hold **{top:.0%}** of the energy, "
    f"the {r} that MiLoRA trains **{bottom:.2%}**, and those that SVF scales all of it."
)
