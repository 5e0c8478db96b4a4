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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/05_tpu_slice.ipynb)
#
# # A 9B model on a TPU slice
#
# A model that no single device holds is spread over several, and SVF's singular vectors have to be spread with it. Keras does that by a `LayoutMap`: which dimension of which weight goes along which axis of the devices.
#
# This notebook needs eight devices: a TPU with eight chips, such as Kaggle's v5e-8, for Gemma 2 9B. Elsewhere it makes eight virtual devices of the CPU, which share its memory and speed, and takes a small model. Everything else is the same.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# Only CPUs heed this. It has to be set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import keras
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import keras_svdtune
from keras_svdtune.demo import fit, notebook, pirate, weights

SMALL = notebook.small() or len(keras.distribution.list_devices()) < 8
STEPS, LENGTH, HELD_OUT = (4, 40, 8) if SMALL else (200, 40, 64)
notebook.look()
devices = keras.distribution.list_devices("cpu" if SMALL else None)
print(devices)

# %% [markdown]
# ## How to split the model
#
# `svdtune_layout_map` reads the config of a preset, not its weights, and works for every decoder of KerasHub. Here all eight devices share each matrix. A mesh of `(2, 4)` would also split the batch in two.

# %%
PRESET = "gemma2_instruct_9b_en"
config = str(weights.converted_folder(notebook.SMALL_MODEL) / "backbone") if SMALL else PRESET

mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"), devices)
layout_map = keras_svdtune.svdtune_layout_map(config, mesh)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
)
notebook.table([{"weights": path.replace("\\d+", "N"), "split along": str(layout.axes)} for path, layout in layout_map.items()])

# %% [markdown]
# ## Load it, enable SVF
#
# Two lines, the same as on one device. The singular vectors are split as their kernels are, and no rule has to be written for them.

# %%
model, name = notebook.load(PRESET, SMALL)
model.backbone.enable_svf()

# %%
block = [v for v in model.backbone.variables if "layer_0/" in v.path or "block_0/" in v.path]
notebook.table([
    {
        "one decoder block": v.path.split("/", 1)[1],
        "shape": str(tuple(v.shape)),
        "split along": str(tuple(v.value.sharding.spec)) if any(v.value.sharding.spec) else "",
    }
    for v in block
    if len(v.shape) > 1 or v.trainable
])

# %% [markdown]
# ## Memory of each device

# %%
def mib_per_device(variables):
    held = {device.id: 0.0 for device in jax.devices()}
    for v in variables:
        for shard in v.value.addressable_shards:
            held[shard.device.id] += shard.data.nbytes / 2**20
    return np.array(list(held.values()))


adapter = [v for v in model.backbone.variables if v.path.rsplit("/", 1)[-1].startswith("svf_")]
groups = {
    "the model": [v for v in model.variables if not any(v is a for a in adapter)],
    "singular vectors": [v for v in adapter if not v.trainable],
    "what trains": [v for v in adapter if v.trainable],
}
held = {label: mib_per_device(variables) for label, variables in groups.items()}
whole = sum(v.value.nbytes / 2**20 for variables in groups.values() for v in variables)

fig, ax = plt.subplots()
bottom = np.zeros(len(devices))
for (label, mib), hatch in zip(held.items(), ("", "//", "xx")):
    ax.bar(range(len(devices)), mib, bottom=bottom, label=label, hatch=hatch, edgecolor="white")
    bottom += mib
ax.set(xlabel="device", ylabel="MiB", title="Weights held by each device", xticks=range(len(devices)))
ax.set_ylim(top=1.25 * bottom.max())
ax.legend(ncols=3)
ax.grid(axis="x", visible=False);

# %%
Markdown(
    f"One device alone would hold {whole:,.0f} MiB; each of the {len(devices)} holds at most **{bottom.max():,.0f} MiB**, "
    f"of which {held['singular vectors'].max():,.1f} MiB are singular vectors and {held['what trains'].max():,.2f} MiB train."
)

# %% [markdown]
# ## Train it, save it
#
# `fit` as ever. (The small mode takes a few steps on the same few answers, to see that the loss falls.) The file holds whole arrays, not pieces: it loads on one device, on eight, or on another mesh.

# %%
learn, _ = notebook.data(model, name, pirate.pirate_pairs(), LENGTH, HELD_OUT)
if SMALL:
    learn = learn.rows(np.arange(fit.BATCH))
fit.prepare(model, learning_rate=6.25e-3, steps=STEPS)
losses, seconds = fit.train(model, learn, STEPS, seed=0)
model.backbone.save_adapter("slice.safetensors")
Markdown(
    f"{STEPS} steps over {len(devices)} devices, {seconds:.1f} s each: loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last. "
    f"The adapter is {os.path.getsize('slice.safetensors') / 1024:,.0f} KiB."
)
