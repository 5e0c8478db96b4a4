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
# Nothing here needs a language model. `enable_svf` is a function, too, and takes any built `keras.Model`. We tune a vision transformer with Keras' own callbacks: `ModelCheckpoint`, and `TensorBoard` with the spectra of the update in its logs.

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

import keras_svdtune
from keras_svdtune.demo import notebook

SMALL = notebook.small()  # False: ViT-B/16 with its ImageNet weights
keras.utils.set_random_seed(0)
notebook.look()

# %% [markdown]
# ## A vision transformer
#
# With an accelerator and Kaggle it is ViT-B/16, and the task is CIFAR-10. Without them we build a small one by hand and pretrain it here, on upright digits of 8 x 8 pixels. The task then is to read digits that are turned on their side.

# %%
def vit(size, patch, width=64, depth=4, heads=4, classes=10):
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


def compile_with(model, learning_rate):
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


# %%
if SMALL:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    model = vit(size=8, patch=2)
    compile_with(model, 1e-3)
    model.fit(images[:1000], labels[:1000], batch_size=50, epochs=15, verbose=0)
    print(f"Upright: {model.evaluate(images[1000:], labels[1000:], verbose=0)[1]:.1%} correct")
    images = np.rot90(images, axes=(1, 2))
else:
    (images, labels), _ = keras.datasets.cifar10.load_data()
    images = keras.ops.image.resize(images[:3000].astype("float32"), (224, 224))
    images, labels = np.array(images) / 127.5 - 1, labels[:3000, 0]
    model = keras_hub.models.ViTImageClassifier.from_preset(
        "vit_base_patch16_224_imagenet", num_classes=10, preprocessor=None
    )
learn, check, test = ((images[i], labels[i]) for i in (slice(1000, 1300), slice(1300, 1450), slice(1450, None)))

# %%
fig, axes = plt.subplots(1, 8, figsize=(8, 1.5))
for ax, image, label in zip(axes, *learn):
    ax.imshow((image - image.min()) / np.ptp(image), cmap="gray_r")
    ax.set_title(label)
    ax.axis("off")

# %%
compile_with(model, 6.25e-4)
before = model.evaluate(*test, verbose=0)[1]
print(f"As it is: {before:.1%} correct on the new task")

# %% [markdown]
# ## SVF, and what Keras' callbacks make of it
#
# `enable_svf(model)` finds every Dense, EinsumDense and convolution, also those inside `MultiHeadAttention`. Everything else is frozen.
#
# `SpectralMonitor` comes before `TensorBoard` in the list, so that its metrics are in the logs when `TensorBoard` writes them.

# %%
keras_svdtune.enable_svf(model)
cost = keras_svdtune.adapter_summary(model)

# %%
compile_with(model, 6.25e-4)
history = model.fit(
    *learn,
    validation_data=check,
    batch_size=20,
    epochs=15 if SMALL else 3,
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
after = model.evaluate(*test, verbose=0)[1]
Markdown(f"From {before:.1%} to **{after:.1%}** correct, by {cost.trainable:,} of {cost.model_parameters:,} parameters.")

# %% [markdown]
# ## In the logs
#
# What `SpectralMonitor` measures is in the history like any metric, and so in TensorBoard. In Colab, `%load_ext tensorboard` and `%tensorboard --logdir logs` show it.

# %%
METRICS = {
    "sigma_drift": ("drift of singular values", "relative change"),
    "update_effective_rank": ("effective rank of the update", "components"),
    "update_top_energy": ("energy in its top 8", "share"),
    "intruder_dimensions": ("intruder dimensions", "mean number"),
}
epochs = range(1, len(history["loss"]) + 1)
fig, axes = plt.subplots(1, 5, figsize=(14, 3))
axes[0].plot(epochs, history["accuracy"], "o-", ms=4, label="training")
axes[0].plot(epochs, history["val_accuracy"], "s-", ms=4, label="validation")
axes[0].set(xlabel="epoch", ylabel="share", title="correct answers", ylim=(0, 1))
axes[0].legend()
for ax, (key, (title, unit)) in zip(axes[1:], METRICS.items()):
    ax.plot(epochs, history[key], "o-", ms=4, color="C2")
    ax.set(xlabel="epoch", ylabel=unit, title=title, ylim=(0, 1.1 * max(history[key]) or 1))
for ax in axes:
    ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))

# %% [markdown]
# An intruder dimension is a large singular vector that the base does not have. SVF scales the vectors that are there, so it makes none.

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator("logs/train")
events.Reload()
print(sorted(events.Tags()["tensors"]))

# %% [markdown]
# ## Layers to declare
#
# In a model that you write, the method can be part of a layer. `SVFDense` takes what `Dense` takes. Its kernel is frozen, and its singular values train. `from_layer` makes one of a layer that has learned something.

# %%
plain = layers.Dense(64, activation="gelu")
x = np.random.default_rng(0).normal(size=(2, 32)).astype("float32")
y = plain(x)
layer = keras_svdtune.SVFDense.from_layer(plain)
print([f"{v.path}: {tuple(v.shape)}" for v in layer.trainable_variables])
print("The same output, to the bit:", np.array_equal(layer(x), y))

# %%
own = keras.Sequential([
    keras.Input((8, 8, 1)),
    layers.Flatten(),
    keras_svdtune.SVFDense(64, activation="gelu"),
    layers.Dense(10),
])
own.summary()

# %% [markdown]
# ## Ship it
#
# The adapter alone is a small file. Merged, the model is plain Keras again.

# %%
keras_svdtune.save_adapter(model, "turned.safetensors")
keras_svdtune.merge_adapter(model)
compile_with(model, 6.25e-4)
model.save("turned.keras")
merged = keras.models.load_model("turned.keras").evaluate(*test, verbose=0)[1]
Markdown(
    f"Adapter: {os.path.getsize('turned.safetensors') / 1024:,.0f} KiB; the whole model: "
    f"{os.path.getsize('turned.keras') / 1024:,.0f} KiB, and {merged:.1%} correct after reloading it."
)
