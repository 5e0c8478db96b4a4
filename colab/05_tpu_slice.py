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
# # A model over eight devices
#
# A model that no single device holds is spread over several, and what an adapter keeps has to be spread with it. Here that takes one line, `svdtune_layout_map(model, mesh)`, and no rule for the adapter. You train a small model on one device and on eight, and get the same losses.
#
# The eight devices are virtual ones, which share the CPU, its memory and its speed. On a real slice of eight TPU chips leave out the two lines that say so, and take a large model: the lines for Gemma 2 9B stand in comments. Nothing was run on a TPU yet.
#
# What is stored below took 5 minutes of CPU time on a machine with 2 CPU cores, and 10 minutes in all, since other work ran there too.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ["JAX_PLATFORMS"] = "cpu"  # this line and the next: eight virtual devices
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import keras
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import keras_svdtune
from keras_svdtune.demo.pirate import pirate_pairs, split
from keras_svdtune.demo.weights import load_model

STEPS = int(os.environ.get("STEPS", 24))  # the tests take fewer
LENGTH = 40
keras.config.disable_interactive_logging()  # no bars in what is kept
print(keras.distribution.list_devices())

# %% [markdown]
# ## On one device
#
# Pirate speech, as in [notebook 01](01_pirate.ipynb). An epoch is one step here, so that the history has the loss of each.

# %%
model = load_model("smollm2_135m")
preprocessor = model.preprocessor
preprocessor.sequence_length = LENGTH
CHAT = "user\n{}<|im_end|>\n<|im_start|>assistant\n"


def encode(pairs):
    """Tokens, the next tokens, and weights of 1 for those of an answer."""
    questions = [CHAT.format(pair.question) for pair in pairs]
    x, y, weight = preprocessor([q + pair.answer for q, pair in zip(questions, pairs)])
    lengths = np.array([len(preprocessor.tokenizer(q)) for q in questions])
    is_answer = np.arange(LENGTH) >= lengths[:, None]
    return x, np.array(y), np.where(is_answer, weight, 0.0)


train_pairs, test_pairs = split(pirate_pairs(), 16)
train, test = encode(train_pairs[: 4 * STEPS]), encode(test_pairs)


def fit(model):
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, STEPS)),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
    )
    model.preprocessor = None  # `fit` gets tokens here
    x, y, weight = train
    return model.fit(
        x, y, sample_weight=weight, batch_size=4, shuffle=False, verbose=0,
        epochs=STEPS, steps_per_epoch=1,
    ).history["loss"]


def held_out(model):
    x, y, weight = test
    return model.evaluate(x, y, sample_weight=weight, batch_size=16, verbose=0)


# %%
model.backbone.enable_svf()
losses = {"one device": fit(model)}

# %% [markdown]
# ## How to split the model
#
# `svdtune_layout_map` finds out which matrices read and which write the stream of vectors, for every decoder of KerasHub, and splits the first by their outputs, the second by their inputs. Eight does not divide the 9 and 3 heads of SmolLM2, so there it takes the other dimension. Of a preset it reads the config alone. Here all eight devices share each matrix; a mesh of `(2, 4)` would split the batch in two as well.

# %%
mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"))
layout_map = keras_svdtune.svdtune_layout_map(model, mesh)
# layout_map = keras_svdtune.svdtune_layout_map("gemma2_instruct_9b_en", mesh)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
)
for path, layout in layout_map.items():
    print(path.replace("\\d+", "N").replace("\\", ""), layout.axes)

# %% [markdown]
# ## Load it, enable SVF
#
# The same lines as on one device. The singular vectors are split as their kernels are.

# %%
split_model = load_model("smollm2_135m")
# split_model = keras_hub.models.CausalLM.from_preset("gemma2_instruct_9b_en", dtype="bfloat16")
split_model.backbone.enable_svf()

# %%
lines = ["| of one block | shape | split along |", "|:--|--:|:--|"]
for v in split_model.backbone.variables:
    if "layer_0/" in v.path and (len(v.shape) > 1 or v.trainable):
        axes = [str(axis) for axis in v.value.sharding.spec]
        name = v.path.split("layer_0/")[1]
        lines.append(f"| {name} | {tuple(v.shape)} | {', '.join(axes)} |")
Markdown("\n".join(lines))

# %% [markdown]
# ## The same losses

# %%
losses["eight devices"] = fit(split_model)
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for (label, y), style in zip(losses.items(), ("-", "o")):
    ax.plot(range(1, STEPS + 1), y, style, markerfacecolor="none", label=label)
ax.set(xlabel="training step", ylabel="loss per answer token of the step's batch")
ax.legend(frameon=False)
ax.grid(alpha=0.3)
plt.show()
difference = np.abs(np.subtract(*losses.values())).max()
print(f"largest difference: {difference:.1e}")

# %% [markdown]
# ## The memory of each device

# %%
def mib(variables):
    """Of all arrays, and of the device that holds the most of them."""
    held = {}
    for v in variables:
        for shard in v.value.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    whole = sum(v.value.nbytes for v in variables)
    return f"{whole / 2**20:,.1f} | {max(held.values()) / 2**20:,.1f}"


def is_adapter(v):
    return v.path.rsplit("/", 1)[-1].startswith("svf_")


variables = split_model.backbone.variables
Markdown("\n".join([
    "| MiB | in all | on each device |",
    "|:--|--:|--:|",
    f"| the model | {mib([v for v in variables if not is_adapter(v)])} |",
    f"| SVF's frozen vectors | {mib([v for v in variables if is_adapter(v) and not v.trainable])} |",
    f"| what trains | {mib([v for v in variables if v.trainable])} |",
    f"| Adam's state | {mib(split_model.optimizer.variables)} |",
]))

# %% [markdown]
# ## One file for both
#
# The file holds whole arrays, not pieces: what eight devices trained loads on one, or on another mesh.

# %%
on_eight = held_out(split_model)
split_model.backbone.save_adapter("slice.safetensors")
keras.distribution.set_distribution(None)
model.backbone.load_adapter("slice.safetensors")
print(f"held-out loss on eight devices {on_eight:.5f}, and on one {held_out(model):.5f}")

# %% [markdown]
# ## Next
#
# [The guide](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/guides/devices.md) has what several hosts take, and [the benchmarks](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/benchmarks.md#several-devices) what a step of Gemma 2 9B sends and holds on eight TPU v5e, compiled by the TPU's own compiler.
