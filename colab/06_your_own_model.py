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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-svdtune/keras_svdtune/blob/main/colab/06_your_own_model.ipynb)
#
# # Bring your own model
#
# Nothing here needs a language model: `keras_svdtune.enable_svf(model)` takes any built `keras.Model`. You build a vision transformer that reads digits, and teach it digits that lie on their side, by its singular values alone, with Keras' own callbacks.
#
# What is stored below took one minute of CPU time on a machine with 2 CPU cores, and two in all, since other work ran there too.

# %% tags=["install"]
# %pip install -q "keras_svdtune[demo] @ git+https://github.com/keras-svdtune/keras_svdtune" scikit-learn tensorboard

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from keras import layers
from sklearn.datasets import load_digits

import keras_svdtune

EPOCHS = max(1, int(os.environ.get("STEPS", 300)) // 15)  # the tests take fewer
keras.utils.set_random_seed(0)
keras.config.disable_interactive_logging()  # no bars in what is kept

# %% [markdown]
# ## A vision transformer
#
# Small, by hand, for digits of 8 x 8 pixels. It learns upright ones first.

# %%
def vit(size=8, patch=2, width=64, depth=4, heads=4, classes=10):
    image = keras.Input((size, size, 1))
    x = layers.Conv2D(width, patch, strides=patch, name="patches")(image)
    x = layers.Reshape((-1, width))(x)
    x = keras_hub.layers.PositionEmbedding((size // patch) ** 2)(x) + x
    for _ in range(depth):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(2 * width, activation="gelu")(y)
        x = x + layers.Dense(width)(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(image, layers.Dense(classes, name="head")(x), name="vit")


def compile_model(learning_rate):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


upright, labels = load_digits(return_X_y=True)
upright = upright.reshape(-1, 8, 8, 1).astype("float32") / 16
turned = np.rot90(upright, axes=(1, 2))
first, learn, check, test = np.split(np.arange(len(labels)), [1000, 1300, 1450])

model = vit()
compile_model(1e-3)
model.fit(upright[first], labels[first], batch_size=50, epochs=EPOCHS, verbose=0);

# %%
def accuracy():
    """On upright and turned digits that are in no other part."""
    return [
        model.evaluate(images[test], labels[test], verbose=0)[1] for images in (upright, turned)
    ]


results = {"before": accuracy()}
fig, axes = plt.subplots(2, 8, figsize=(8, 2.4), layout="constrained")
for row, images in zip(axes, (upright, turned)):
    for ax, image, label in zip(row, images[learn], labels[learn]):
        ax.imshow(image, cmap="gray_r")
        ax.set_title(label)
        ax.axis("off")
plt.show()

# %% [markdown]
# ## One line
#
# It finds every Dense, EinsumDense and convolution layer, also those inside `MultiHeadAttention`, and freezes everything else.

# %%
keras_svdtune.enable_svf(model)
cost = keras_svdtune.adapter_summary(model)

# %% [markdown]
# ## Train
#
# `SpectralMonitor` adds to the logs how far the singular values have moved. It comes before `TensorBoard` in the list, which then writes that too.

# %%
compile_model(2e-3)
history = model.fit(
    turned[learn],
    labels[learn],
    validation_data=(turned[check], labels[check]),
    batch_size=20,
    epochs=EPOCHS,
    verbose=0,
    callbacks=[
        keras_svdtune.SpectralMonitor(),
        keras.callbacks.ModelCheckpoint(
            "best.weights.h5", monitor="val_loss", save_best_only=True, save_weights_only=True
        ),
        keras.callbacks.TensorBoard("logs"),
    ],
).history
model.load_weights("best.weights.h5")

# %%
epochs = range(1, EPOCHS + 1)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].plot(epochs, history["loss"], "o-", ms=4, label="trained on")
axes[0].plot(epochs, history["val_loss"], "s-", ms=4, label="held out")
axes[0].set(title="loss on turned digits", ylim=0)
axes[0].legend(frameon=False)
axes[1].plot(epochs, history["sigma_drift"], "o-", ms=4)
axes[1].set(title="drift of the singular values", ylabel="‖s' - s‖ / ‖s‖", ylim=0)
for ax in axes:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# In Colab, `%load_ext tensorboard` and `%tensorboard --logdir logs` show the same.
#
# ## What it is worth
#
# The share of right answers, with its standard error over the images. Turned digits are learned at the price of the upright ones; without the adapter the model is what it was.

# %%
results["after, by SVF"] = accuracy()
with keras_svdtune.adapter_disabled(model):
    results["the adapter disabled"] = accuracy()

lines = ["| | upright | turned |", "|:--|--:|--:|"]
for label, shares in results.items():
    cells = [f"{p:.1%} ± {(p * (1 - p) / len(test)) ** 0.5:.1%}" for p in shares]
    lines.append(f"| {label} | {' | '.join(cells)} |")
lines.append(f"\n{len(test)} images; {cost.trainable:,} of {cost.model_parameters:,} parameters trained.")
Markdown("\n".join(lines))

# %% [markdown]
# ## Ship it
#
# The adapter alone is a small file. Merged, the model is plain Keras, and loads without this package.

# %%
keras_svdtune.save_adapter(model, "turned.safetensors")
keras_svdtune.merge_adapter(model)
model.save("turned.keras")
for file in ("turned.safetensors", "turned.keras"):
    print(f"{file:19} {os.path.getsize(file) / 1024:6,.0f} KiB")

model = keras.models.load_model("turned.keras")
print("turned.keras, loaded: {:.1%} upright, {:.1%} turned".format(*accuracy()))

# %% [markdown]
# ## Layers to declare
#
# In a model that you write, the method can be part of a layer. `SVFDense` takes what `Dense` takes; its kernel is frozen, its singular values train. `from_layer` makes one of a layer that has learned something, and computes the same.

# %%
head = keras_svdtune.SVFDense.from_layer(model.get_layer("head"))
print([(v.name, tuple(v.shape)) for v in head.trainable_variables])

features = np.random.default_rng(0).normal(size=(2, 64)).astype("float32")
print("the same output, to the bit:", np.array_equal(head(features), model.get_layer("head")(features)))

# %%
own = keras.Sequential([
    keras.Input((8, 8, 1)),
    layers.Flatten(),
    keras_svdtune.SVFDense(64, activation="gelu"),
    layers.Dense(10),
])
own.summary(line_length=70, print_fn=print)

# %% [markdown]
# ## Next
#
# A pretrained vision transformer takes the same lines: `keras_hub.models.ViTImageClassifier.from_preset("vit_base_patch16_224_imagenet", num_classes=10)`, whose new head then trains beside the adapter. So do other methods, such as `keras_svdtune.enable_lora_xs(model, rank=8)`. [The guide](https://github.com/keras-svdtune/keras_svdtune/blob/main/.docs/pages/guides/your_own.md) has layers left out and layers that train beside the adapter.
