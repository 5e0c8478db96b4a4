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


def with_gradients(
    model: Model, function: Function, by: list[Variable] | None = None
) -> Function:
    """Returns a compiled function that also computes gradients.

    Args:
        model: the model whose variables `function` reads.
        function: takes tensors, and returns (loss, other), a number and any
            further tensor.
        by: the variables to differentiate by, frozen ones too; None for
            `model.trainable_variables`.

    Returns:
        A function of the same arguments that returns (loss, other, gradients):
        a list with ∂loss/∂v for each v of `by`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        run = _on_jax(
            model, function, lambda f: jax.value_and_grad(f, has_aux=True), by
        )

        def on_jax(*arguments: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            (loss, other), gradients = run(*arguments)
            return loss, other, gradients

        return on_jax
    if backend == "tensorflow":
        found = _on_tensorflow(model, function, by)
    else:
        found = _on_torch(model, function, by)
    return lambda *arguments: found(*map(ops.convert_to_tensor, arguments))


def _on_jax(
    model: Model,
    function: Function,
    transform: Callable[[Function], Function],
    by: list[Variable] | None = None,
) -> Function:
    import jax

    def split() -> tuple[list[Variable], list[Variable]]:
        """The variables to differentiate by, and the others."""
        if by is None:
            return model.trainable_variables, model.non_trainable_variables
        chosen = {id(v) for v in by}
        return by, [v for v in model.variables if id(v) not in chosen]

    def run(
        trained: list[Tensor], others: list[Tensor], arguments: list[Tensor]
    ) -> Any:
        def of(trained: list[Tensor]) -> Any:
            ours, rest = split()
            pairs = [
                *zip(ours, trained, strict=True),
                *zip(rest, others, strict=True),
            ]
            with keras.StatelessScope(state_mapping=pairs):
                return function(*arguments)

        return transform(of)(trained)

    jitted = jax.jit(run)

    def on_values(*arguments: Tensor) -> Any:
        trained, others = ([v.value for v in x] for x in split())
        return jitted(trained, others, list(arguments))

    return on_values


def _on_tensorflow(
    model: Model, function: Function, by: list[Variable] | None
) -> Function:
    import tensorflow as tf

    def run(*arguments: Tensor) -> Any:
        values = [v.value for v in _variables(model, by)]
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss, other = function(*arguments)
        gradients = tape.gradient(
            loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return loss, other, gradients

    found: Function = tf.function(run, reduce_retracing=True)
    return found


def _on_torch(
    model: Model, function: Function, by: list[Variable] | None
) -> Function:
    import torch

    def run(*arguments: Tensor) -> Any:
        values = [v.value for v in _variables(model, by)]
        frozen = [x for x in values if not x.requires_grad]
        try:
            for x in frozen:
                x.requires_grad_(True)
            with torch.enable_grad():
                loss, other = function(*arguments)
            gradients = torch.autograd.grad(
                loss, values, allow_unused=True, materialize_grads=True
            )
        finally:
            for x in frozen:
                x.requires_grad_(False)
        return loss.detach(), other.detach(), list(gradients)

    return run


def _variables(model: Model, by: list[Variable] | None) -> list[Variable]:
    return list(model.trainable_variables if by is None else by)
