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
# You train two small files, one that makes a model talk like a pirate and one that teaches it Spanish small talk, and add them up in one line: `compose({"pirate.safetensors": 0.5, "spanish.safetensors": 0.5})`. SVF trains the same numbers in both, one for each singular value, so the sum is exact and an adapter like any other. Is it good at both tasks? You measure every mixture.
#
# What is stored below took 12 minutes of CPU time on a machine with 2 CPU cores, and half an hour in all, since other work ran there too.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import time

import keras
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import keras_svdtune
from keras_svdtune.demo.pirate import corpus, pirate_pairs
from keras_svdtune.demo.weights import load_model

STEPS = int(os.environ.get("STEPS", 60))  # for each adapter; the tests take fewer
WEIGHTS = np.linspace(0, 1, 5 if STEPS > 8 else 2)
LENGTH, HELD_OUT = 40, 24
keras.utils.set_random_seed(0)
keras.config.disable_interactive_logging()  # no bars in what is kept

# %% [markdown]
# ## Two tasks
#
# Small talk in English, answered by a pirate, and small talk in Spanish, of which this small model knows little. No question is in two parts: of what is held out, one part chooses the mixture, the other judges it.

# %%
CHAT = "user\n{}<|im_end|>\n<|im_start|>assistant\n"
TASKS = {
    "pirate": {p.question: p.answer for p in pirate_pairs()},
    "spanish": {q: a for q, a in corpus("spanish") if len(q + a) < 90},
}
model = load_model("smollm2_135m")
preprocessor = model.preprocessor
preprocessor.sequence_length = LENGTH


def encode(pairs):
    """Tokens, the next tokens, and weights of 1 for those of an answer."""
    questions = [CHAT.format(q) for q, _ in pairs]
    x, y, weight = preprocessor([q + a for q, (_, a) in zip(questions, pairs)])
    lengths = np.array([len(preprocessor.tokenizer(q)) for q in questions])
    is_answer = np.arange(LENGTH) >= lengths[:, None]
    return x, np.array(y), np.where(is_answer, weight, 0.0)


train, choose, judge = {}, {}, {}
for task, pairs in TASKS.items():
    pairs = [*pairs.items()]
    np.random.default_rng(0).shuffle(pairs)
    choose[task], judge[task] = encode(pairs[:HELD_OUT]), encode(pairs[HELD_OUT : 2 * HELD_OUT])
    train[task] = pairs[2 * HELD_OUT :]
    print(f"{task}: {len(train[task])} to learn from\n  {pairs[-1][0]}\n  {pairs[-1][1]}")

# %% [markdown]
# ## Two adapters

# %%
def compile_model(learning_rate):
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, STEPS)),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )


for task, pairs in train.items():
    order = np.random.default_rng(0).integers(0, len(pairs), 4 * STEPS)
    x, y, weight = encode([pairs[i] for i in order])
    model.backbone.enable_svf()
    compile_model(2e-3)
    model.preprocessor = None  # `fit` gets tokens here
    model.fit(x, y, sample_weight=weight, batch_size=4, shuffle=False, verbose=2)
    model.preprocessor = preprocessor
    model.backbone.save_adapter(f"{task}.safetensors")
    model.backbone.remove_adapter()  # the base again, to the bit
    print(f"{task}.safetensors: {os.path.getsize(f'{task}.safetensors') / 1024:,.0f} KiB")

# %% [markdown]
# ## One line
#
# `load_adapter` takes a file, or a sum of files. Where SVF is enabled already, it checks the files and assigns the numbers; nothing is decomposed or compiled.

# %%
model.backbone.load_adapter("pirate.safetensors")
compile_model(0.0)


def mix(pirate, spanish):
    both = {"pirate.safetensors": float(pirate), "spanish.safetensors": float(spanish)}
    model.backbone.load_adapter(keras_svdtune.compose(both))


start = time.perf_counter()
mix(0.5, 0.5)
print(f"Adding up and loading: {time.perf_counter() - start:.2f} s")

# %% [markdown]
# ## Every mixture
#
# The held-out loss of a token of an answer, with each weight from 0 to 1.

# %%
def evaluate(data):
    x, y, weight = data
    model.preprocessor = None
    loss = model.evaluate(x, y, sample_weight=weight, batch_size=HELD_OUT, verbose=0)
    model.preprocessor = preprocessor
    return loss


grid = np.zeros((2, len(WEIGHTS), len(WEIGHTS)))  # task, pirate, Spanish
for i, j in np.ndindex(grid.shape[1:]):
    mix(WEIGHTS[i], WEIGHTS[j])
    grid[:, i, j] = [evaluate(data) for data in choose.values()]

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained")
titles = ["loss of pirate answers", "loss of Spanish answers", "mean of both"]
for ax, picture, title in zip(axes, [*grid, grid.mean(axis=0)], titles):
    ax.imshow(picture, origin="lower", cmap="cividis_r")
    middle = (picture.min() + picture.max()) / 2
    for (i, j), value in np.ndenumerate(picture):
        color = "white" if value > middle else "black"
        weight = "bold" if value == picture.min() else "normal"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, weight=weight)
    ticks = [f"{w:g}" for w in WEIGHTS]
    ax.set_xticks(range(len(WEIGHTS)), ticks)
    ax.set_yticks(range(len(WEIGHTS)), ticks)
    ax.set(title=title, xlabel="weight of the Spanish adapter")
axes[0].set_ylabel("weight of the pirate adapter")
plt.show()

# %% [markdown]
# ## What it is worth
#
# The mixture with the lowest mean, on answers that did not choose it, with their standard error.

# %%
def losses(data):
    """Of each answer, the mean loss of its tokens."""
    x, y, weight = data
    model.preprocessor = None
    logits = model.predict(x, batch_size=HELD_OUT, verbose=0)
    model.preprocessor = preprocessor
    loss = keras.ops.sparse_categorical_crossentropy(y, logits, from_logits=True)
    return (keras.ops.convert_to_numpy(loss) * weight).sum(axis=1) / weight.sum(axis=1)


i, j = np.unravel_index(grid.mean(axis=0).argmin(), grid.shape[1:])
best = WEIGHTS[i], WEIGHTS[j]
rows = {
    "base model": (0, 0),
    "pirate": (1, 0),
    "spanish": (0, 1),
    "pirate + spanish": (1, 1),
    f"best: {best[0]:g} pirate + {best[1]:g} spanish": best,
}
lines = [f"| | {' | '.join(TASKS)} |", "|:--|--:|--:|"]
for label, weights in rows.items():
    mix(*weights)
    found = [losses(data) for data in judge.values()]
    cells = [f"{x.mean():.2f} ± {x.std() / len(x) ** 0.5:.2f}" for x in found]
    lines.append(f"| {label} | {' | '.join(cells)} |")
Markdown("\n".join(lines))

# %% [markdown]
# The plain sum, both weights 1, is worse at both tasks than the smaller mixture, though its arithmetic is exact: both adapters move the same singular values. The best mixture keeps the larger part of what each has learned, and is behind each at its own task. The answers are few, so read nothing from differences below two errors.
#
# ## Keep it, and hear it
#
# The sum is saved like any other adapter.

# %%
both = keras_svdtune.compose(
    {"pirate.safetensors": float(best[0]), "spanish.safetensors": float(best[1])}
)
both.save("both.safetensors")
questions = ["Where is the treasure?", "What is the sun?", "¿Cómo estás?", "¿Qué es el sol?"]
for file in ("pirate.safetensors", "spanish.safetensors", "both.safetensors"):
    model.backbone.load_adapter(file)
    answers = model.generate([CHAT.format(q) for q in questions], max_length=48, strip_prompt=True)
    print(file)
    for question, answer in zip(questions, answers):
        print(f"  {question} {answer.strip()}")

# %% [markdown]
# ## Next
#
# Weights above 1 and below 0, a third file, `compose` of other methods ([what adds up](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/guides/saving.md#compose)). [Notebook 07](07_many_experts.ipynb) keeps several adapters in one model, searches the weights by gradient, and gives every prompt its own.
