"""Compiled functions of a model's variables, beside those that Keras keeps.

`predict` and `fit` keep their functions on the model, for the loss, the
optimizer and the sampler that the user has compiled. What this package computes
for itself goes through the functions made here, which leave those alone.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_svdtune.runtime.types import Model, Tensor, Variable

# Takes tensors, reads the variables of a model, and returns tensors.
Function = Callable[..., Any]


def compiled(model: Model, function: Function) -> Function:
    """Returns `function`, compiled for the values that variables have then.

    On JAX and TensorFlow other values of the variables of `model` and of the
    arguments compile nothing anew; other shapes do. On torch nothing is
    compiled, and no gradient is kept.

    Args:
        model: the model whose variables `function` reads.
        function: takes tensors, and returns tensors.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _on_jax(model, function, lambda f: f)
    if backend == "tensorflow":
        import tensorflow as tf

        found = tf.function(function, reduce_retracing=True)
    else:
        import torch

        found = torch.no_grad()(function)
    return lambda *arguments: found(*map(ops.convert_to_tensor, arguments))


def with_gradients(model: Model, function: Function) -> Function:
    """Returns a compiled function that also computes gradients.

    Args:
        model: the model whose trainable variables are differentiated by.
        function: takes tensors, and returns (loss, other), a number and any
            further tensor.

    Returns:
        A function of the same arguments that returns (loss, other, gradients):
        a list with ∂loss/∂v for each v of `model.trainable_variables`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        run = _on_jax(
            model, function, lambda f: jax.value_and_grad(f, has_aux=True)
        )

        def on_jax(*arguments: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            (loss, other), gradients = run(*arguments)
            return loss, other, gradients

        return on_jax
    if backend == "tensorflow":
        found = _on_tensorflow(model, function)
    else:
        found = _on_torch(model, function)
    return lambda *arguments: found(*map(ops.convert_to_tensor, arguments))


def _on_jax(
    model: Model, function: Function, transform: Callable[[Function], Function]
) -> Function:
    import jax

    def run(
        trained: list[Tensor], others: list[Tensor], arguments: list[Tensor]
    ) -> Any:
        def of(trained: list[Tensor]) -> Any:
            pairs = [
                *zip(model.trainable_variables, trained, strict=True),
                *zip(model.non_trainable_variables, others, strict=True),
            ]
            with keras.StatelessScope(state_mapping=pairs):
                return function(*arguments)

        return transform(of)(trained)

    jitted = jax.jit(run)
    return lambda *arguments: jitted(
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
        list(arguments),
    )


def _on_tensorflow(model: Model, function: Function) -> Function:
    import tensorflow as tf

    def run(*arguments: Tensor) -> Any:
        values = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss, other = function(*arguments)
        gradients = tape.gradient(
            loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return loss, other, gradients

    found: Function = tf.function(run, reduce_retracing=True)
    return found


def _on_torch(model: Model, function: Function) -> Function:
    import torch

    def run(*arguments: Tensor) -> Any:
        variables: list[Variable] = model.trainable_variables
        values = [v.value for v in variables]
        with torch.enable_grad():
            loss, other = function(*arguments)
        gradients = torch.autograd.grad(
            loss, values, allow_unused=True, materialize_grads=True
        )
        return loss.detach(), other.detach(), list(gradients)

    return run
