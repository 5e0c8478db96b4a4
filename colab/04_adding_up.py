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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/04_adding_up.ipynb)
#
# # Adding two tuned models
#
# Two adapters of one model, each for a task of its own. SVF trains the *same* numbers in both: one for each singular value. So the adapters add up, number by number, and the sum is an adapter again. Is it good at both tasks? We measure the whole grid of mixtures.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import time

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from keras_svdtune import compose
from keras_svdtune.demo import chat, fit, notebook, pirate

SMALL = notebook.small()
STEPS, LENGTH, HELD_OUT, GRID = (10, 40, 8, 3) if SMALL else (120, 40, 48, 6)
# The small mode adapts the last ten layers: less to compute.
TARGETS = [r".*layer_2\d/.*"] if SMALL else None
notebook.look()

# %% [markdown]
# ## Two tasks
#
# Small talk in English, answered by a pirate; and small talk in Spanish.

# %%
spanish = [
    pirate.Pair(pirate.tidy(q), pirate.tidy(a), pirate.tidy(a))
    for q, a in dict.fromkeys(pirate.corpus("spanish"))
    if len(a.split()) >= 3
]
tasks = {"pirate": pirate.pirate_pairs(), "spanish": spanish}

model, name = notebook.load("gemma3_1b", SMALL)
data = {t: notebook.data(model, name, pairs, LENGTH, HELD_OUT) for t, pairs in tasks.items()}
notebook.table([
    {"task": t, "to learn": len(data[t][0]), "held out": len(data[t][1]), "for example": p[7].answer}
    for t, p in tasks.items()
])

# %% [markdown]
# ## Two adapters

# %%
# SmolLM2 knows little Spanish, and the examples are few: it learns them by heart.
RATES = {"pirate": 6.25e-3, "spanish": 1.25e-3 if SMALL else 6.25e-3}
files = {}
for task, (learn, _) in data.items():
    model.backbone.enable_svf(target_layer_names=TARGETS)
    fit.prepare(model, learning_rate=RATES[task], steps=STEPS)
    losses, _ = fit.train(model, learn, STEPS, seed=0)
    files[task] = f"{task}.safetensors"
    model.backbone.save_adapter(files[task])
    model.backbone.remove_adapter()
    print(f"{task}: loss {np.mean(losses[:4]):.2f} at first, {np.mean(losses[-4:]):.2f} at last, "
          f"{os.path.getsize(files[task]) / 1024:,.0f} KiB")

# %% [markdown]
# ## Hot-swapping
#
# `compose` takes files and weights, and gives an adapter. Loading it into a model that has the method already assigns the numbers and nothing else: nothing is decomposed or compiled again. A server can change its adapter between two requests.

# %%
model.backbone.load_adapter(files["pirate"])
fit.prepare(model, learning_rate=0.0, steps=STEPS)


def mix(p, s):
    model.backbone.load_adapter(compose({files["pirate"]: p, files["spanish"]: s}))
    return [fit.evaluate(model, held_out) for _, held_out in data.values()]


mix(0, 0)  # compiles
start = time.perf_counter()
model.backbone.load_adapter(files["spanish"])
swap = time.perf_counter() - start
Markdown(f"Swapping took **{1000 * swap:.0f} ms**.")

# %% [markdown]
# ## The grid of mixtures

# %%
weights = np.linspace(0, 1, GRID)
losses = np.array([[mix(p, s) for s in weights] for p in weights])  # (pirate, spanish, task)

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
pictures = [*np.moveaxis(losses, -1, 0), losses.mean(-1)]
titles = ["loss on pirate", "loss on Spanish", "mean of both"]
for ax, picture, title in zip(axes, pictures, titles):
    image = ax.imshow(picture, origin="lower", cmap="cividis_r")
    for (i, j), value in np.ndenumerate(picture):
        dark = value > (picture.min() + picture.max()) / 2
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    i, j = np.unravel_index(picture.argmin(), picture.shape)
    ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, lw=2.5, ec="C1"))
    ax.set(title=title, xlabel="weight of the Spanish adapter", xticks=range(GRID), yticks=range(GRID))
    ax.set_xticklabels([f"{w:.2g}" for w in weights])
    ax.set_yticklabels([f"{w:.2g}" for w in weights])
    ax.grid(False)
axes[0].set_ylabel("weight of the pirate adapter")
fig.suptitle("Held-out loss of every mixture; the best one is framed");

# %%
base, best = losses[0, 0], losses.mean(-1)
p, s = np.unravel_index(best.argmin(), best.shape)
Markdown(
    f"The base model has {base[0]:.2f} on pirate and {base[1]:.2f} on Spanish. The best mixture on average is "
    f"**{weights[p]:.2g} pirate + {weights[s]:.2g} Spanish**, with {losses[p, s, 0]:.2f} and {losses[p, s, 1]:.2f}. "
    f"Each adapter alone has {losses[-1, 0, 0]:.2f} and {losses[-1, 0, 1]:.2f} (pirate), "
    f"{losses[0, -1, 0]:.2f} and {losses[0, -1, 1]:.2f} (Spanish)."
)

# %% [markdown]
# That the arithmetic is exact does not make every sum good at both tasks. Two adapters may want different things of the same direction, and then a mixture is a compromise. The grid says how good a one, and it costs minutes.
#
# ## Keep the best, and hear it
#
# The composition is saved as an adapter file like any other.

# %%
both = compose({files["pirate"]: float(weights[p]), files["spanish"]: float(weights[s])})
both.save("both.safetensors")
model.backbone.load_adapter("both.safetensors")
style = chat.format_for(model, name)
questions = ["Where is the treasure?", "¿Cómo estás, amigo?"]
notebook.table([
    {"question": q, "answer": a} for q, a in zip(questions, chat.answers(model, style, questions))
])
