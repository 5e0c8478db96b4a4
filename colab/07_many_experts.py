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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/07_many_experts.ipynb)
#
# # A model that adapts itself
#
# You train three experts on one small model: a pirate, a reader who says who likes what, a speaker at conventions. Each is a vector for every matrix, 0.4 MB in all. Then you mix them, let every prompt of a batch have its own, and let the prompt choose. At the end one table says what each of these is worth.
#
# The idea is that of [Transformers²](https://arxiv.org/abs/2501.06252). What is stored below took half an hour on a machine with 2 CPU cores, on which other work ran too.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune" reasoning-gym

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import matplotlib.pyplot as plt
import numpy as np
import reasoning_gym
from IPython.display import Markdown

import keras_svdtune
from keras_svdtune.demo.pirate import pirate_pairs
from keras_svdtune.demo.speeches import speech_pairs
from keras_svdtune.demo.weights import load_model

STEPS = int(os.environ.get("STEPS", 40))  # for each expert; the tests take fewer
LENGTH, HELD_OUT = 60, 32
keras.utils.set_random_seed(0)
keras.config.disable_interactive_logging()  # no bars in what is kept

# %% [markdown]
# ## Three tasks
#
# What is said, and what is to be answered: small talk and a pirate's answer; three statements of [reasoning-gym](https://github.com/open-thought/reasoning-gym), a question, and a name; a sentence of a speech and the next one. No question is in both parts.

# %%
CHAT = "user\n{}<|im_end|>\n<|im_start|>assistant\n"
names = reasoning_gym.create_dataset(
    "needle_haystack", size=800, seed=0, min_num_statements=3, max_num_statements=3
)
TASKS = {
    "pirate": {p.question: p.answer for p in pirate_pairs()},
    "names": {x["question"]: x["answer"] for x in names if len(x["question"]) < 145},
    "speeches": {q: a for q, a in speech_pairs() if len(q + a) < 110},
}
train, test = {}, {}
for name, pairs in TASKS.items():
    pairs = [*pairs.items()]
    np.random.default_rng(0).shuffle(pairs)
    test[name], train[name] = pairs[:HELD_OUT], pairs[HELD_OUT:]
    print(f"{name}: {len(train[name])} to learn from\n  {pairs[0][0]}\n  {pairs[0][1]}")

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


# %% [markdown]
# ## Three experts
#
# `enable_svf(name=...)` adds an adapter beside those that are there. The singular vectors belong to the base, so the second and third cost their own numbers and nothing else.

# %%
def fit(pairs, steps):
    order = np.random.default_rng(0).integers(0, len(pairs), 4 * steps)
    x, y, weight = encode([pairs[i] for i in order])
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )
    model.preprocessor = None  # `fit` gets tokens here
    model.fit(x, y, sample_weight=weight, batch_size=4, shuffle=False, verbose=2)
    model.preprocessor = preprocessor


for name in TASKS:
    model.backbone.enable_svf(name=name)
    fit(train[name], STEPS)
    model.backbone.save_adapter(f"{name}.safetensors", name=name)
    print(f"{name}.safetensors: {os.path.getsize(f'{name}.safetensors') / 1024:,.0f} KiB")

# %% [markdown]
# Setting one assigns its values, and compiles nothing. `None` is the base model.

# %%
held_out = {name: encode(pairs) for name, pairs in test.items()}


def losses():
    """Of each held-out answer, the mean loss of its tokens, by task."""
    model.preprocessor = None
    found = {}
    for name, (x, y, weight) in held_out.items():
        logits = model.predict(x, batch_size=16, verbose=0)
        loss = keras.ops.sparse_categorical_crossentropy(y, logits, from_logits=True)
        loss = keras.ops.convert_to_numpy(loss) * weight
        found[name] = loss.sum(axis=1) / weight.sum(axis=1)
    model.preprocessor = preprocessor
    return found


rows = {}
for name in [None, *TASKS]:
    model.backbone.set_adapter(name)
    rows[name or "base model"] = losses()

# %% [markdown]
# ## Everyone's own
#
# One batch, in which every row has another adapter.

# %%
QUESTIONS = ["Where is the treasure?", test["names"][0][0], "This is our moment.", "Translate 'house' into French."]
experts = [*TASKS, None]
prompts = [CHAT.format(q) for q in QUESTIONS]

with keras_svdtune.adapter_per_example(model, experts):
    answers = model.generate(prompts, max_length=80, strip_prompt=True)
for question, expert, answer in zip(QUESTIONS, experts, answers):
    print(f"{question}\n  {expert}: {answer.strip()}")

# %% [markdown]
# ## A mixture
#
# W' = W + Σ α·ΔW: which weights suit five examples of each task? Only the weights are searched, by the gradient of the likelihood of the right answers: one for each expert, or one for each expert and layer. Of all iterations the one is kept that does best on a third of the examples, which is held out.

# %%
few = [(CHAT.format(q), a) for name in TASKS for q, a in train[name][:5]]
mixtures = {
    label: keras_svdtune.search_mixture(
        model, [*TASKS], few, per_layer=per_layer, iterations=min(12, STEPS)
    )
    for label, per_layer in {"mixture": False, "mixture, per layer": True}.items()
}
for label, mixture in mixtures.items():
    print(f"{label}: {mixture}")
    mixture.add_to(model.backbone, label)  # an adapter like any other, and set
    rows[label] = losses()
model.backbone.set_adapter(dict.fromkeys(TASKS, 1 / 3))
rows["a third of each"] = losses()
mixtures["mixture, per layer"].plot()

# %% [markdown]
# ## The prompt chooses
#
# A `Dispatcher` trains a small classifier of prompts: a Dense layer and an SVF adapter of its own. One kind of prompt should get the base model: orders, which are none of the three. With the expert that was chosen for it, an answer's loss is that of this expert, as measured above.

# %%
NONE = ["Write a poem about autumn.", "Name three rivers in Africa.", "Sort these numbers: 5, 2, 9.",
        "Translate 'good night' into Spanish.", "Summarize this text.", "Write a function in Python."]
labelled = [(CHAT.format(q), name) for name in TASKS for q, _ in train[name][:12]]
labelled += [(CHAT.format(q), None) for q in NONE]
np.random.default_rng(0).shuffle(labelled)

dispatcher = keras_svdtune.Dispatcher(
    model, {"pirate": "small talk", "names": "who likes what", "speeches": "politics"}
)
dispatcher.fit(*zip(*labelled), epochs=min(6, STEPS))

rows["the prompt chooses"] = {}
for name, pairs in test.items():
    found = dispatcher.choose([CHAT.format(q) for q, _ in pairs])
    print(f"{name}: {np.mean([x == name for x in found]):.0%} of {len(found)} prompts get this expert")
    rows["the prompt chooses"][name] = np.array(
        [rows[x or "base model"][name][i] for i, x in enumerate(found)]
    )
for question, answer in zip(QUESTIONS, dispatcher.generate(prompts, max_length=80, strip_prompt=True)):
    print(f"{question}\n  {answer.strip()}")

# %% [markdown]
# ## One adapter for all
#
# The rival: one adapter that learns all three tasks, in as many steps as the experts had together.

# %%
model.backbone.enable_svf(name="all")
fit([pair for name in TASKS for pair in train[name][:300]], 3 * STEPS)
rows["one, trained on all"] = losses()

# %% [markdown]
# ## What it is worth
#
# The loss of a token of a held-out answer, and its standard error over the answers. One seed, three small tasks: differences of less than two errors say nothing.

# %%
lines = [f"| | {' | '.join(TASKS)} |", f"|:--|{'--:|' * len(TASKS)}"]
for label, found in rows.items():
    cells = [f"{x.mean():.2f} ± {x.std() / len(x) ** 0.5:.2f}" for x in found.values()]
    lines.append(f"| {label} | {' | '.join(cells)} |")
Markdown("\n".join(lines))

# %%
fig, axes = plt.subplots(1, 3, figsize=(9, 3.6), sharey=True, layout="constrained")
for ax, name in zip(axes, TASKS):
    means = [found[name].mean() for found in rows.values()]
    errors = [found[name].std() / HELD_OUT**0.5 for found in rows.values()]
    ax.errorbar(means, range(len(rows)), xerr=errors, fmt="o", capsize=3)
    ax.set(title=name, xlabel="loss, held out")
    ax.grid(alpha=0.3)
axes[0].set_yticks(range(len(rows)), [*rows])
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# ## Next
#
# In this run letting the prompt choose is as good, within its errors, as having the right expert for every prompt, and better at the pirate than one adapter that learned all three. One weight for each expert gives up some of everything; a weight for each layer wins back most of the names. The order about French went to an expert, though it was to get the base model: six examples of "none of them" are few.
#
# A score without a gradient, such as exact match, goes by `search_mixture(..., score=...)`, and answers without a right one by `train_policy`: [the guide](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/guides/many.md). What a mixture is worth on a task that none of its experts has learnt is [among the benchmarks](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/benchmarks.md).
