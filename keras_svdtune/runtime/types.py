"""Names, mostly for `Any`, that say what is meant where Keras has no type."""

from typing import Any, TypeAlias

import keras

# A tensor of the backend: `jax.Array`, `tf.Tensor` or `torch.Tensor`.
Tensor: TypeAlias = Any
# A tensor, or a NumPy array if the value is on the host already.
Array: TypeAlias = Any
Variable: TypeAlias = keras.Variable
Layer: TypeAlias = keras.layers.Layer
Model: TypeAlias = keras.Model
# An open group of a weights file, as Keras hands it to a layer.
Store: TypeAlias = Any

# `jax.sharding.Mesh` and `jax.sharding.Sharding`, which exist on JAX only.
Mesh: TypeAlias = Any
Sharding: TypeAlias = Any
Optimizer: TypeAlias = keras.optimizers.Optimizer
# What JSON holds: settings of a method, the metadata of a file.
Json: TypeAlias = dict[str, Any]

Shape: TypeAlias = tuple[int, int]  # (in, out)
