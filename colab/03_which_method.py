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
# # Which method?
#
# Four methods learn one task, pirate speech, at one learning rate. `enable_adapter(method)` is the line that changes; everything else is the same. You see what each trains, how large its file is, how long a step takes, what it learns and what it forgets.
#
# This is one task, one seed and one rate: it shows trade-offs and ranks nobody. What is stored below took 14 minutes of CPU time on a machine with 2 CPU cores, and half an hour in all, since other work ran there too.

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

from keras_svdtune import SVF, LoRA, LoRAXS, PiSSA, estimate
from keras_svdtune.demo.pirate import pirate_pairs, split
from keras_svdtune.demo.weights import load_model

STEPS = int(os.environ.get("STEPS", 48))  # the tests take fewer
EPOCHS = max(1, STEPS // 8)  # after each, a look at what is held out
LENGTH, HELD_OUT, RATE = 40, 20, 2e-3
keras.config.disable_interactive_logging()  # no bars in what is kept

# %% [markdown]
# ## To learn, and to forget
#
# The task is small talk with answers of a pirate, and answers alone count ([how](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/guides/answers.md)). A model that learns it should still read plain English: sentences of NumPy's documentation, which have nothing to do with pirates.

# %%
model = load_model("smollm2_135m")
preprocessor = model.preprocessor
preprocessor.sequence_length = LENGTH
CHAT = "user\n{}<|im_end|>\n<|im_start|>assistant\n"


def encode(pairs):
    """Tokens, the next tokens, and weights of 1 for those of an answer."""
    x, y, weight = preprocessor([question + answer for question, answer in pairs])
    lengths = np.array([len(preprocessor.tokenizer(question)) for question, _ in pairs])
    is_answer = np.arange(LENGTH) >= lengths[:, None]
    return x, np.array(y), np.where(is_answer, weight, 0.0)


learn, test = split(pirate_pairs(), HELD_OUT)
train = encode([(CHAT.format(pair.question), pair.answer) for pair in learn])
answers = [(CHAT.format(pair.question), pair.answer) for pair in test[:HELD_OUT]]

docs = [(getattr(np, name).__doc__ or "").strip().split("\n\n")[0] for name in dir(np)]
docs = [" ".join(text.split()) for text in docs if text.endswith(".") and "(" not in text]
docs = [text for text in dict.fromkeys(docs) if len(text.split()) > 8]
docs = docs[:: len(docs) // HELD_OUT][:HELD_OUT]
held_out = encode(answers + [("", text) for text in docs])
print(f"{len(learn)} answers to learn from, {len(answers)} held out, {len(docs)} plain sentences:")
print(*docs[:3], sep="\n")

# %% [markdown]
# ## One run
#
# While the model trains, a callback keeps the loss of each held-out answer and of each plain sentence, a mean over its tokens.

# %%
def losses():
    x, y, weight = held_out
    logits = model.predict(x, batch_size=len(y), verbose=0)
    loss = keras.ops.sparse_categorical_crossentropy(y, logits, from_logits=True)
    loss = keras.ops.convert_to_numpy(loss) * weight
    return np.split(loss.sum(axis=1) / weight.sum(axis=1), [HELD_OUT])


class Watch(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.losses, self.seconds = [losses()], []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append((time.perf_counter() - self.start) / (STEPS // EPOCHS))
        self.losses.append(losses())


def compile_model(learning_rate):
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, STEPS)),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )


def fit():
    x, y, weight = train
    compile_model(RATE)
    model.preprocessor = None  # `fit` gets tokens here
    watch = Watch()
    model.fit(
        x, y, sample_weight=weight, batch_size=4, shuffle=False, callbacks=[watch],
        epochs=EPOCHS, steps_per_epoch=STEPS // EPOCHS, verbose=0,
    )
    model.preprocessor = preprocessor
    return watch


# %%
QUESTIONS = ["Where is the treasure?", "What is the sun?"]


def ask():
    prompts = [CHAT.format(question) for question in QUESTIONS]
    return model.generate(prompts, max_length=48, strip_prompt=True)


compile_model(0.0)
runs, said = {}, {"base model": ask()}
for method in (LoRA(rank=8), PiSSA(rank=8), SVF(), LoRAXS(rank=8)):
    keras.utils.set_random_seed(0)
    trained = estimate(model, method).trainable
    model.backbone.enable_adapter(method)
    watch = fit()
    model.backbone.save_adapter(f"{method.name}.safetensors")
    said[method.title] = ask()
    model.backbone.remove_adapter()  # the base again, to the bit
    kib = os.path.getsize(f"{method.name}.safetensors") / 1024
    runs[method.title] = trained, kib, watch

# %% [markdown]
# ## What they learned, and what they forgot

# %%
steps = np.arange(EPOCHS + 1) * (STEPS // EPOCHS)
fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for (label, (_, _, watch)), marker in zip(runs.items(), "os^D"):
    for ax, y in zip(axes, np.mean(watch.losses, axis=2).T):
        ax.plot(steps, y, marker=marker, label=label)
axes[0].set(title="answers of a pirate, held out", ylabel="loss per token")
axes[1].set(title="plain English, not trained on")
for ax in axes:
    ax.set_xlabel("training step")
    ax.grid(alpha=0.3)
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The same in numbers, with standard errors: over the held-out answers, and over the changes of the plain sentences. A plus there means that they have become harder to predict, something was forgotten. A minus means that they have become easier, and does not say that nothing was forgotten elsewhere. The seconds are those of a busy machine, so compare them with each other alone.

# %%
def mean(x):
    return f"{x.mean():.2f} ± {x.std() / len(x) ** 0.5:.2f}"


lines = [
    "| | trained numbers | file, KiB | seconds a step | loss of answers | plain English, change |",
    "|:--|--:|--:|--:|--:|--:|",
]
for label, (trained, kib, watch) in runs.items():
    (answers_0, plain_0), (answers_1, plain_1) = watch.losses[0], watch.losses[-1]
    change = plain_1 - plain_0
    cells = [f"{trained:,}", f"{kib:,.0f}", f"{np.median(watch.seconds):.1f}"]
    cells += [mean(answers_1), ("+" if change.mean() > 0 else "") + mean(change)]
    lines.append(f"| {label} | {' | '.join(cells)} |")
lines.append(f"| base model | | | | {mean(answers_0)} | its loss: {mean(plain_0)} |")
Markdown("\n".join(lines))

# %% [markdown]
# What to read from this:
#
# - **What trains** sets the size of the file: 113 KiB for LoRA-XS, 443 for SVF, some 10 and 20 MB for LoRA and PiSSA, whose file holds where it began, too.
# - **Learning**: LoRA, PiSSA and SVF end within their errors of each other here. LoRA-XS of rank 8, with a seventh of SVF's numbers, is behind.
# - **Forgetting**: at this rate SVF and LoRA-XS lose plain English, and LoRA and PiSSA do not lose these sentences. Other text and other rates tell otherwise: in [the study](https://github.com/keras-svdtune/keras_svdtune/blob/main/tests/benchmarks/results/study.md) so far, on film reviews and at each method's own best rate, LoRA forgets about as much as SVF.
#
# And what they say:

# %%
for i, question in enumerate(QUESTIONS):
    print(question)
    for label, found in said.items():
        print(f"  {label + ':':11} {found[i].strip()}")

# %% [markdown]
# ## Next
#
# Another method or rate is one word in the cell that trains: `MiLoRA(rank=8)`, `RATE = 1e-3`. Which method learns best at its own best rate, and with which spread over seeds, is what [the benchmarks](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/benchmarks.md) are to tell, and they say how far that has come. [Choose a method](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/guides/choosing.md) says what each is for.
