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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/03_which_method.ipynb)
#
# # Which method when
#
# The methods on one task: pirate speech, as in notebook 01. What does each train, how fast does it learn, what does it forget, and how large is its file?
#
# One task, one seed and few steps rank nobody. They show the trade-offs, and this notebook is easily pointed at your own data.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import math

import keras
import matplotlib.pyplot as plt

from keras_svdtune.demo import chat, fit, notebook, pirate, show, train
from keras_svdtune.methods import METHODS

SMALL = notebook.small()
STEPS, LENGTH, HELD_OUT = (5, 32, 8) if SMALL else (200, 40, 64)
# The small mode adapts the last five layers: less to compute.
TARGETS = [r".*layer_2[5-9]/.*"] if SMALL else None
notebook.look()

# %%
model, name = notebook.load("gemma3_1b", SMALL)
learn, held_out = notebook.data(model, name, pirate.pirate_pairs(), LENGTH, HELD_OUT)
print(f"{name}: {len(learn):,} answers to learn from, {len(held_out)} held out")

# %% [markdown]
# ## Something to forget
#
# Who learns to speak like a pirate should still read plain English. So we also measure the loss on sentences that have nothing to do with it.

# %%
SENTENCES = [
    "The lighthouse stood on a narrow strip of rock at the mouth of the harbour.",
    "Water boils at a lower temperature on a high mountain.",
    "She closed the window because the wind was blowing papers off the desk.",
    "Most of the energy on Earth comes from the Sun.",
]
plain = chat.encode(
    model, chat.ChatFormat("", ""), [pirate.Pair("", s, s) for s in SENTENCES], LENGTH
)

# %% [markdown]
# ## The race
#
# Each method at 1e-3, the rate that all suggest, which is meant for hundreds of steps. In the few of the small mode a low rank would not get anywhere with it, so there the low-rank methods get ten times as much. Neither was swept for this task.

# %%
def rate_of(method):
    short = SMALL and method.name not in ("svf", "svft", "lora")
    return method.suggested_learning_rate * (10 if short else 1)


def run(key):
    method = train.make_method(key, rank=8)
    keras.utils.set_random_seed(0)
    model.backbone.enable_adapter(method, TARGETS)
    # Without the averages that AdaLoRA keeps in variables.
    variables = [v for v in model.backbone.trainable_variables if not v.overwrite_with_gradient]
    trained = sum(math.prod(v.shape) for v in variables)
    fit.prepare(model, rate_of(method), STEPS)
    losses, seconds = fit.train(model, learn, STEPS, seed=0)
    file = f"{key}.safetensors"
    model.backbone.save_adapter(file)
    model.backbone.merge_adapter()  # measured as it would be shipped
    measured = {
        "trained": trained,
        "rate": rate_of(method),
        "losses": losses,
        "held out": fit.evaluate(model, held_out),
        "plain": fit.evaluate(model, plain),
        "seconds": seconds,
        "KiB": os.path.getsize(file) / 1024,
    }
    model.backbone.set_weights(base_weights)
    return method.title, measured


# %%
fit.prepare(model, 0.0, STEPS)
base = {"held out": fit.evaluate(model, held_out), "plain": fit.evaluate(model, plain)}
base_weights = model.backbone.get_weights()
print(f"Base model: {base['held out']:.2f} on pirate answers, {base['plain']:.2f} on plain text")

# Those that start from data are left out.
chosen = [key for key, cls in METHODS.items() if not hasattr(cls, "statistic")]
results = dict(run(key) for key in chosen)

# %% [markdown]
# ## Loss curves
#
# AdaLoRA's loss holds a penalty that keeps its vectors orthonormal: its curve starts higher.

# %%
MARKS = dict(zip(results, "oPXs^Dv*<>pHd"))
COLORS = {title: f"C{i}" for i, title in enumerate(results)}
fig, ax = plt.subplots()
for title, r in results.items():
    ax.plot(range(1, STEPS + 1), show.smooth(r["losses"]), color=COLORS[title],
            marker=MARKS[title], markevery=max(1, STEPS // 6), label=title)
ax.set(xlabel="training step", ylabel="loss per answer token (smoothed)", title="Training")
ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
fig.legend(loc="outside right upper");

# %% [markdown]
# ## Parameters against loss
#
# Further left is smaller, further down is better.

# %%
fig, ax = plt.subplots()
for i, (title, r) in enumerate(sorted(results.items(), key=lambda item: item[1]["held out"])):
    ax.plot(r["trained"], r["held out"], MARKS[title], ms=10, color=COLORS[title])
    # Above and below in turn: neighbours keep their names apart.
    ax.annotate(title, (r["trained"], r["held out"]), xytext=(0, -18 if i % 2 else 9), textcoords="offset points", ha="center")
ax.axhline(base["held out"], color="grey", ls="--", lw=1)
ax.annotate("base model", (0, base["held out"]), xycoords=("axes fraction", "data"),
            xytext=(4, -12), textcoords="offset points", color="dimgrey")
ax.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss", title="What a parameter buys")
ax.margins(0.12);

# %% [markdown]
# ## Forgetting
#
# The change of the loss on plain English. Above zero, something was forgotten; below, plain English has become easier, too. A method that has learned little has forgotten little, so read this with the picture above.

# %%
change = {t: r["plain"] - base["plain"] for t, r in results.items()}
fig, ax = plt.subplots()
ax.barh(list(change), list(change.values()), color=[COLORS[t] for t in change])
ax.axvline(0, color="black", lw=1)
ax.invert_yaxis()
ax.set(xlabel="change of the loss on plain English (nats per token)", title="What each method forgot");

# %%
notebook.table([
    {
        "method": title,
        "trained": r["trained"],
        "file, KiB": r["KiB"],
        "learning rate": f"{r['rate']:g}",
        "held-out loss": r["held out"],
        "plain English": change[title],
        "seconds a step": r["seconds"],
    }
    for title, r in results.items()
])

# %% [markdown]
# ## So, which?
#
# - **SVF**: few parameters, kilobytes, and tunings that add up (notebook 04).
# - **SVFT**: when SVF does not fit the data well enough; a few times its size.
# - **LoRA-XS**: the fewest parameters, for the components that matter most.
# - **LoRA**: the safe first choice; **DoRA** and **AdaLoRA** are its relatives.
# - **PiSSA**: LoRA's size, from the largest components; `quantize="int4"` for a small base.
# - **MiLoRA**: LoRA's size, from the smallest ones, to leave the rest alone.
# - **MiCA**, **PSOFT**, **OPLoRA**: newer ones, which nobody has compared here yet.
# - **EVA**, **CorDA**, **LoRA-GA** start from some of your data, and are not compared here either.
#
# Whichever it is, sweep the learning rate before you judge it.
