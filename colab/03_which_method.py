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
# This is one task, one seed and one rate: it shows trade-offs and ranks nobody.

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

STEPS = int(os.environ.get("STEPS", 60))  # the tests take fewer
EPOCHS = max(1, STEPS // 6)  # after each, a look at what is held out
HELD_OUT, RATE = 24, 2e-3
keras.config.disable_interactive_logging()  # no bars in what is kept

# %% [markdown]
# ## To learn, and to forget
#
# The task is small talk with answers of a pirate, and answers alone count ([how](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/guides/answers.md)). A model that learns it should still read plain English: the first sentences of NumPy's documentation, which have nothing to do with pirates.

# %%
model = load_model("smollm2_135m")
preprocessor = model.preprocessor
CHAT = "user\n{}<|im_end|>\n<|im_start|>assistant\n"


def encode(pairs, length=40):
    """Tokens, the next tokens, and weights of 1 for those of an answer."""
    texts = [question + answer for question, answer in pairs]
    x, y, weight = preprocessor(texts, sequence_length=length)
    lengths = np.array([len(preprocessor.tokenizer(question)) for question, _ in pairs])
    is_answer = np.arange(length) >= lengths[:, None]
    return x, np.array(y), np.where(is_answer, weight, 0.0)


train, test = (
    encode([(CHAT.format(pair.question), pair.answer) for pair in pairs])
    for pairs in split(pirate_pairs(), HELD_OUT)
)
docs = [(getattr(np, name).__doc__ or "").strip().split("\n\n")[0] for name in dir(np)]
docs = [" ".join(text.split()) for text in docs if text.endswith(".") and "(" not in text]
docs = [text for text in dict.fromkeys(docs) if len(text.split()) > 8][:HELD_OUT]
plain = encode([("", text) for text in docs], length=24)
print(f"{len(train[1])} answers to learn from, {len(test[1])} held out, {len(docs)} plain sentences:")
print(*docs[:3], sep="\n")

# %% [markdown]
# ## One run
#
# While the model trains, a callback keeps the loss of each held-out answer and of each plain sentence, a mean over its tokens.

# %%
def losses(data):
    x, y, weight = data
    logits = model.predict(x, batch_size=HELD_OUT, verbose=0)
    loss = keras.ops.sparse_categorical_crossentropy(y, logits, from_logits=True)
    return (keras.ops.convert_to_numpy(loss) * weight).sum(axis=1) / weight.sum(axis=1)


class Watch(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.answers, self.plain, self.seconds = [losses(test)], [losses(plain)], []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append((time.perf_counter() - self.start) / (STEPS // EPOCHS))
        self.answers.append(losses(test))
        self.plain.append(losses(plain))


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
    axes[0].plot(steps, np.mean(watch.answers, axis=1), marker=marker, label=label)
    axes[1].plot(steps, np.mean(watch.plain, axis=1), marker=marker, label=label)
axes[0].set(title="answers of a pirate, held out", ylabel="loss per token")
axes[1].set(title="plain English, not trained on")
for ax in axes:
    ax.set_xlabel("training step")
    ax.grid(alpha=0.3)
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The same in numbers, with standard errors: over the held-out answers, and over the changes of the plain sentences. A plus there means that plain English has become harder, something was forgotten.

# %%
def mean(x):
    return f"{x.mean():.2f} ± {x.std() / len(x) ** 0.5:.2f}"


lines = [
    "| | trained numbers | file, KiB | seconds a step | loss of answers | plain English, change |",
    "|:--|--:|--:|--:|--:|--:|",
]
for label, (trained, kib, watch) in runs.items():
    change = watch.plain[-1] - watch.plain[0]
    cells = [f"{trained:,}", f"{kib:,.0f}", f"{np.median(watch.seconds):.2f}"]
    cells += [mean(watch.answers[-1]), ("+" if change.mean() > 0 else "") + mean(change)]
    lines.append(f"| {label} | {' | '.join(cells)} |")
lines.append(f"| base model | | | | {mean(watch.answers[0])} | loss {mean(watch.plain[0])} |")
Markdown("\n".join(lines))

# %%
for i, question in enumerate(QUESTIONS):
    print(question)
    for label, answers in said.items():
        print(f"  {label + ':':16} {answers[i].strip()}")
