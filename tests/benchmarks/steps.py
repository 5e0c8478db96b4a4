"""One training step of a model, ready to run, on each backend.

A step is the forward and backward pass (no optimizer, no logits) on the mean
square of the model's output. It is built while the model is adapted, and
stays what it was when the model changes afterwards. Where the input is an array
of floats, for a single layer, its gradient is computed too, as layers below
would need it.

On JAX it is one compiled program, which also tells its FLOPs and its temporary
bytes; on TensorFlow a `tf.function`; on torch it runs eagerly, as Keras does.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


class JaxStep:
    """A program compiled by XLA, with its arguments."""

    def __init__(self, model: Any, inputs: Any, variables: list[Any]):
        import jax

        trains = {id(v) for v in variables}
        constants = [v for v in model.variables if id(v) not in trains]
        self._arguments = (
            [v.value for v in variables],
            [v.value for v in constants],
            jax.tree.map(jax.numpy.asarray, inputs),
        )
        wanted = (0, 2) if isinstance(inputs, np.ndarray) else 0
        loss = _jax_loss(model, variables, constants)
        step = jax.value_and_grad(loss, wanted)
        self._step = jax.jit(step).lower(*self._arguments).compile()
        self._wait = jax.block_until_ready

    def __call__(self) -> None:
        self._wait(self._step(*self._arguments))

    def figures(self) -> dict[str, float]:
        """XLA's own count of FLOPs, and of bytes."""
        memory = self._step.memory_analysis()
        return {
            "flops": self._step.cost_analysis()["flops"],
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
        }


def _jax_loss(
    model: Any, variables: list[Any], constants: list[Any]
) -> Callable[..., Any]:
    order = [id(v) for v in [*variables, *constants]]
    trainables = [order.index(id(v)) for v in model.trainable_variables]
    others = [order.index(id(v)) for v in model.non_trainable_variables]

    def loss(values: list[Any], constants: list[Any], inputs: Any) -> Any:
        state = [*values, *constants]
        outputs, _, losses = model.stateless_call(
            [state[i] for i in trainables],
            [state[i] for i in others],
            inputs,
            training=True,
            return_losses=True,
        )
        return (outputs.astype("float32") ** 2).mean() + sum(losses)

    return loss


class TensorflowStep:
    """A traced function, with the variables that it captures."""

    def __init__(self, model: Any, inputs: Any, variables: list[Any]):
        import tensorflow as tf

        inputs = tf.nest.map_structure(tf.constant, inputs)
        values = [v.value for v in variables]
        # A function does not keep alive what it captures.
        self._kept = [v.value for v in model.variables]

        @tf.function
        def step() -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                for value in values:
                    tape.watch(value)
                outputs = tf.cast(model(inputs, training=True), "float32")
                loss = tf.reduce_mean(outputs**2)
                if model.losses:
                    loss += tf.add_n(model.losses)
            return loss, tape.gradient(loss, values)

        self._step = step.get_concrete_function()

    def __call__(self) -> None:
        loss, _ = self._step()
        loss.numpy()

    def figures(self) -> dict[str, float]:
        return {}


class TorchStep:
    """An eager step; the model is its own, and must not change."""

    def __init__(self, model: Any, inputs: Any, variables: list[Any]):
        import torch

        trains = {id(v) for v in variables}
        for variable in model.trainable_variables:
            variable.trainable = id(variable) in trains
        self._values = [v.value for v in variables]
        self._model = model
        self._inputs = {k: torch.from_numpy(x) for k, x in inputs.items()}

    def __call__(self) -> None:
        for value in self._values:
            value.grad = None
        outputs = self._model(self._inputs, training=True)
        loss = outputs.float().square().mean() + sum(self._model.losses)
        loss.backward()

    def figures(self) -> dict[str, float]:
        return {}


STEPS: dict[str, type] = {
    "jax": JaxStep,
    "tensorflow": TensorflowStep,
    "torch": TorchStep,
}


def step_of(model: Any, inputs: Any, variables: list[Any]) -> Any:
    """The step in which `variables` train, on the backend of Keras."""
    return STEPS[keras.backend.backend()](model, inputs, variables)


def random_tokens(vocabulary: int, batch: int, length: int) -> Any:
    """Inputs of a text backbone."""
    shape = (batch, length)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape)
    return {
        "token_ids": tokens.astype("int32"),
        "padding_mask": np.ones(shape, "int32"),
    }
