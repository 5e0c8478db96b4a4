"""What autodiff computes and keeps, traced on abstract arrays.

For one matrix under each way to train it, and for the rest of a block: FLOPs
as XLA counts them in the method's own `call`, and the bytes that the backward
pass needs. `scale.py` adds them up.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import keras
from scale_configs import Config

from keras_svdtune.methods.base import Method


class _Product:
    """x·W on abstract arrays, as a method's `call` wants it."""

    def __init__(self, x: Any, matrix: Any):
        self._x, self._matrix, self.dtype = x, matrix, str(x.dtype)

    def __call__(self) -> Any:
        return self.rows(self._x)

    def times(self, a: Any) -> Any:
        return keras.ops.matmul(self._x, a)

    def moved(self, change: Any) -> Any:
        return self.rows(self._x + change)

    def rows(self, r: Any) -> Any:
        return keras.ops.matmul(r, self._matrix)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What autodiff does and keeps for one matrix.

    Attributes:
        flops: float, forward and backward, the input's gradient included.
        keeps_input: bool, whether the backward pass needs x.
        kept: int, bytes of other activations that it needs.
        fixed: int, bytes that do not grow with the tokens: merged kernels.
    """

    flops: float
    keeps_input: bool
    kept: int
    fixed: int


@functools.cache
def block_bytes(config: Config, length: int, dtype: str) -> float:
    """Bytes for a token that autodiff keeps in one frozen block.

    Of KerasHub's own block at its real size, traced and never made.
    """
    batch = 3  # no other axis has this size

    def pull(x: Any) -> Any:
        block = _decoder_block(config, dtype)
        block.build((None, None, config.width))
        return jax.vjp(block, x)[1]

    x = jax.ShapeDtypeStruct((batch, length, config.width), dtype)
    kept = _sizes(jax.make_jaxpr(pull)(x).jaxpr)
    return sum(n for shape, n in kept if shape[:1] == (batch,)) / batch / length


def _decoder_block(config: Config, dtype: str) -> Any:
    # By their full names: KerasHub exports no layer of one model only.
    from keras_hub.src.models.gemma import gemma_decoder_block
    from keras_hub.src.models.gemma3 import gemma3_decoder_block
    from keras_hub.src.models.llama import llama_decoder

    settings: dict[str, Any] = {
        "num_query_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "intermediate_dim": config.inner,
        "dtype": dtype,
    }
    if config.family == "llama":
        return llama_decoder.LlamaTransformerDecoder(**settings)
    settings |= {
        "hidden_dim": config.width,
        "head_dim": config.head_dim,
        "use_post_ffw_norm": config.post_norms,
        "use_post_attention_norm": config.post_norms,
    }
    if config.family == "gemma3":
        return gemma3_decoder_block.Gemma3DecoderBlock(
            use_query_key_norm=True, gate_dim_reduction=1, **settings
        )
    settings["intermediate_dim"] *= 2  # it counts both halves
    return gemma_decoder_block.GemmaDecoderBlock(**settings)


def _sizes(jaxpr: Any) -> list[tuple[tuple[int, ...], int]]:
    """Shape and bytes of each output that is computed, once."""
    given = set(jaxpr.invars)
    found = {
        v: v.aval for v in jaxpr.outvars if isinstance(v, type(jaxpr.invars[0]))
    }
    return [
        (a.shape, math.prod(a.shape) * a.dtype.itemsize)
        for v, a in found.items()
        if v not in given
    ]


# What a candidate trains in one matrix: trainables and the others as name ->
# (shape, dtype), and the product.
Call = Callable[[Any, _Product], Any]


@functools.cache
def trace_floor(shape: tuple[int, int], tokens: int, dtype: str) -> Trace:
    """The frozen product."""
    return _trace({}, {}, lambda weights, base: base(), shape, tokens, dtype)


@functools.cache
def trace_full(shape: tuple[int, int], tokens: int, dtype: str) -> Trace:
    """The product with a kernel that trains."""
    kernel = {"kernel": (shape, dtype)}

    def call(weights: Any, base: _Product) -> Any:
        return keras.ops.matmul(base._x, weights.kernel)

    return _trace(kernel, {}, call, shape, tokens, dtype)


@functools.cache
def trace_keras_lora(
    kernel_shape: tuple[int, ...],
    shape: tuple[int, int],
    rank: int,
    tokens: int,
    dtype: str,
) -> Trace:
    """Keras' LoRA: the kernel W + A·B, formed on every step."""
    ab = {
        "a": ((*kernel_shape[:-1], rank), "float32"),
        "b": ((rank, kernel_shape[-1]), "float32"),
    }

    def call(weights: Any, base: _Product) -> Any:
        a, b = (keras.ops.cast(x, dtype) for x in (weights.a, weights.b))
        change = keras.ops.reshape(keras.ops.matmul(a, b), shape)
        return keras.ops.matmul(base._x, base._matrix + change)

    return _trace(ab, {}, call, shape, tokens, dtype)


def trace_method(
    method: Method, shape: tuple[int, int], tokens: int, dtype: str
) -> Trace:
    """A method's own `call`, and what its weights add to the loss."""
    # Methods that differ in the base they hold count as equal.
    return _trace_method(method, method.replaces_base, shape, tokens, dtype)


@functools.cache
def _trace_method(
    method: Method,
    replaces_base: bool,
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
) -> Trace:
    weights = method.weights(shape)
    trained = {
        w.name: (w.shape, w.dtype)
        for w in weights
        if w.trainable or w.overwritten
    }
    frozen = {
        w.name: (w.shape, w.dtype or dtype)
        for w in weights
        if w.name not in trained
    }
    penalties = [(w.name, w.regularizer) for w in weights if w.regularizer]
    return _trace(
        trained,
        frozen,
        method.call,
        shape,
        tokens,
        dtype,
        penalties,
    )


def _trace(
    trained: dict[str, Any],
    frozen: dict[str, Any],
    call: Call,
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
    penalties: Any = (),
) -> Trace:
    x = jax.ShapeDtypeStruct((tokens, shape[0]), dtype)
    matrix = jax.ShapeDtypeStruct(shape, dtype)
    dy = jax.ShapeDtypeStruct((tokens, shape[1]), dtype)
    train = {k: jax.ShapeDtypeStruct(*v) for k, v in trained.items()}
    still = {k: jax.ShapeDtypeStruct(*v) for k, v in frozen.items()}

    def pull_of(x: Any, train: Any, matrix: Any, still: Any) -> Any:
        def forward(train: Any, x: Any) -> Any:
            weights = types.SimpleNamespace(**train, **still, shape=shape)
            penalty = sum(
                (p(train[name]) for name, p in penalties), jax.numpy.zeros(())
            )
            return call(weights, _Product(x, matrix)), penalty

        return jax.vjp(forward, train, x)

    def step(x: Any, train: Any, matrix: Any, still: Any, dy: Any) -> Any:
        y, pull = pull_of(x, train, matrix, still)
        return y[0], pull((dy, jax.numpy.ones(())))

    lowered = jax.jit(step).lower(x, train, matrix, still, dy)
    jaxpr = jax.make_jaxpr(lambda *a: pull_of(*a)[1])(x, train, matrix, still)
    sizes = _sizes(jaxpr.jaxpr)
    kept = sum(n for shape, n in sizes if shape[:1] == (tokens,))
    return Trace(
        lowered.cost_analysis()["flops"],
        any(v is jaxpr.jaxpr.invars[0] for v in jaxpr.jaxpr.outvars),
        kept,
        sum(n for _, n in sizes) - kept,
    )
