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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/01_pirate.ipynb)
#
# # Gemma speaks like a pirate
#
# We teach a language model to answer like a pirate, twice. Once by `enable_lora(rank=8)`, which Keras has. Once by `enable_svf()`, which trains nothing but the singular values of the model's matrices. Then we compare: how well they learn, what they train, and how large the file is.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import math

import keras
import matplotlib.pyplot as plt
from IPython.display import Markdown

import keras_svdtune  # adds enable_svf() to every KerasHub model
from keras_svdtune.demo import chat, fit, notebook, pirate, show

SMALL = notebook.small()  # False: Gemma, from Kaggle
STEPS, LENGTH, HELD_OUT = (8, 40, 8) if SMALL else (200, 40, 64)
notebook.look()

# %% [markdown]
# ## A model and its data
#
# For Gemma, choose a runtime with a GPU or TPU, accept [its licence](https://www.kaggle.com/models/keras/gemma3) on Kaggle, and put `KAGGLE_USERNAME` and `KAGGLE_KEY` into Colab's secrets. Otherwise the notebook takes SmolLM2-135M, a small chat model.
#
# The data is small talk. The questions are plain, the answers are a pirate's.

# %%
model, name = notebook.load("gemma3_instruct_1b", SMALL)
pairs = pirate.pirate_pairs()
learn, held_out = notebook.data(model, name, pairs, LENGTH, HELD_OUT)
print(f"{name}: {model.count_params():,} parameters")
notebook.table([{"question": p.question, "answer": p.answer} for p in pairs[:3]])

# %% [markdown]
# ## Before
#
# What does the model say as it is? The loss is that of an answer's token, on questions that are never trained on.

# %%
QUESTIONS = ["Where is the treasure?", "What is the sun?", "Are you happy, my friend?"]
style = chat.format_for(model, name)


def say():
    return chat.answers(model, style, QUESTIONS)


fit.prepare(model, learning_rate=0.0, steps=STEPS)
said = {"before": say()}
before = fit.evaluate(model, held_out)
print(f"Loss before training: {before:.2f}")

# %% [markdown]
# ## SVF: one line
#
# Every matrix is written as $W = U\,\mathrm{diag}(s)\,V^\top$, and only $s$ is trained: one number for each direction of the matrix. The model computes what it did before, until the first step.
#
# `fit.prepare` is `model.compile` with AdamW, and `fit.train` is `model.fit`. The learning rate is one that LoRA could have, too.

# %%
results = {}


def tune(label, learning_rate):
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    fit.prepare(model, learning_rate, STEPS)
    losses, seconds = fit.train(model, learn, STEPS, seed=0)
    loss = fit.evaluate(model, held_out)
    results[label] = {"losses": losses, "trained": trained, "seconds": seconds, "loss": loss}
    said[label] = say()


# %%
model.backbone.enable_svf()
tune("SVF", learning_rate=6.25e-3)
model.backbone.save_adapter("pirate.safetensors")

# %% [markdown]
# ## LoRA: one line, too
#
# First the adapter goes away, and the model is the base again, bit for bit. For so few steps LoRA gets a higher rate than its usual 2e-4.

# %%
model.backbone.remove_adapter()
keras.utils.set_random_seed(0)
model.backbone.enable_lora(rank=8)
tune("LoRA", learning_rate=5e-3 if SMALL else 1e-3)
model.backbone.save_lora_weights("pirate.lora.h5")

# %% [markdown]
# ## Side by side
#
# By default `enable_lora` adapts the query and value matrices, `enable_svf` all of them. The training curves are smoothed, and so lag behind.

# %%
fig, ax = plt.subplots()
for (label, r), marker in zip(results.items(), "os"):
    (line,) = ax.plot(range(1, STEPS + 1), show.smooth(r["losses"]), label=f"{label}, training")
    ax.plot(STEPS, r["loss"], marker, ms=9, color=line.get_color(), label=f"{label}, held out")
ax.axhline(before, color="grey", ls="--", lw=1, label="base model, held out")
ax.set(xlabel="training step", ylabel="loss per answer token", title="Learning to speak like a pirate")
ax.legend();

# %% [markdown]
# The seconds are those of one run, with whatever else the machine did. For step times measured side by side see the README.

# %%
files = {"SVF": "pirate.safetensors", "LoRA": "pirate.lora.h5"}
notebook.table([
    {
        "method": label,
        "trained numbers": r["trained"],
        "held-out loss": r["loss"],
        "seconds a step": r["seconds"],
        "file, KiB": os.path.getsize(files[label]) / 1024,
        "pirate words": f"{pirate.dialect_score(said[label]):.0%}",
    }
    for label, r in results.items()
])

# %% [markdown]
# And in their own words:

# %%
notebook.table([
    {"question": q, **{label: answers[i] for label, answers in said.items()}}
    for i, q in enumerate(QUESTIONS)
])

# %% [markdown]
# ## Ship it
#
# The file is all that a fresh model needs. `merge_adapter()` folds it into the kernels: a plain KerasHub model again, as fast as before, which `save_to_preset` and `generate` know nothing special about.

# %%
model, _ = notebook.load("gemma3_instruct_1b", SMALL)
model.backbone.load_adapter("pirate.safetensors")
model.backbone.merge_adapter()
model.compile(sampler="greedy")
said["merged"] = say()
same = sum(a == b for a, b in zip(said["merged"], said["SVF"]))
Markdown(f"After merging, **{same} of {len(QUESTIONS)}** answers are the same, word for word. In full: *{said['merged'][0]}*")
