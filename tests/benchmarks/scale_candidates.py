"""The ways to train a model, and what each costs: FLOPs and bytes.

`scale.py` makes its table of them. What a method adds is what `estimate` says
of the model.
"""

import dataclasses
import math

import common
import numpy as np
from scale_configs import Config
from scale_traces import (
    Trace,
    block_bytes,
    trace_floor,
    trace_full,
    trace_keras_lora,
    trace_method,
)

import keras_svdtune
from keras_svdtune.methods.base import Method

FLOOR = "frozen floor"
LORA = "Keras enable_lora"
FULL = "full fine-tuning"
QUERY_VALUE = f"{LORA}, query and value"
# Layers that read the same tensor keep it once.
_SHARED_INPUTS = ((0, 1, 2), (3,), (4, 5), (6,))


@dataclasses.dataclass
class Candidate:
    """A way to train a model.

    Attributes:
        name: str.
        traces: one for each matrix of a block, in order.
        trainable: int, trainables of the model; `trainable_bytes` of each.
        frozen: int, extra frozen numbers; `frozen_bytes` of all.
        saved_bytes: int, of the adapter file.
        enable_flops: float, of all decompositions.
    """

    name: str
    traces: list[Trace]
    trainable: int = 0
    trainable_bytes: int = 4
    frozen: int = 0
    frozen_bytes: int = 0
    saved_bytes: int = 0
    enable_flops: float = 0.0


def candidates(
    config: Config,
    methods: dict[str, Method],
    rank: int,
    tokens: int,
    dtype: str = "bfloat16",
) -> list[Candidate]:
    """All ways to train a model."""
    views = config.matrices
    shapes = [v.shape for v in views.values()]
    floor = [trace_floor(s, tokens, dtype) for s in shapes]
    found = [Candidate(FLOOR, floor)]
    for name, targets in (
        (QUERY_VALUE, ("query", "value")),
        (f"{LORA}({rank})", tuple(views)),
    ):
        traces, trainable = [], 0
        for (target, view), frozen in zip(views.items(), floor, strict=True):
            if target not in targets:
                traces.append(frozen)
                continue
            kernel = view.kernel_shape
            traces.append(
                trace_keras_lora(kernel, view.shape, rank, tokens, dtype)
            )
            trainable += rank * (math.prod(kernel[:-1]) + kernel[-1])
        trainable *= config.layers
        found.append(
            Candidate(name, traces, trainable, saved_bytes=4 * trainable)
        )
    for name, method in methods.items():
        title = common.label_of(name, method)
        found.append(_of_method(title, config, method, tokens, dtype))
    full = [trace_full(s, tokens, dtype) for s in shapes]
    size = 2 if dtype == "bfloat16" else 4
    found.append(
        Candidate(
            FULL,
            full,
            config.parameters,
            size,
            saved_bytes=config.parameters * size,
        )
    )
    return found


def _of_method(
    title: str, config: Config, method: Method, tokens: int, dtype: str
) -> Candidate:
    cost = keras_svdtune.estimate(config.backbone, method)
    found = Candidate(title, [], cost.trainable)
    found.frozen = cost.frozen
    found.frozen_bytes = cost.bytes - found.trainable_bytes * cost.trainable
    for name, view in config.matrices.items():
        shape = view.shape
        found.traces.append(trace_method(method, shape, tokens, dtype))
        found.enable_flops += config.layers * enable_flops(method, shape)
        for w in method.weights(shape):
            if w.saved:
                count = config.layers * math.prod(w.shape)
                # In the file: the array in float32, its key and its shape.
                found.saved_bytes += 4 * count
                found.saved_bytes += config.layers * (100 + len(name))
        # Fingerprint and effect; the layer's row of the metadata.
        found.saved_bytes += config.layers * (4 * 13 + 100 + len(name))
    return found


def enable_flops(method: Method, shape: tuple[int, int]) -> float:
    """About how many operations enabling takes for W (in, out).

    The Gram matrix, of which half is computed: n²·m. All its eigenvectors:
    9·n³; a few, after it has been made tridiagonal: 4/3·n³. The other side of k
    components, 2·m·n·k; of all of them for a replaced kernel. A randomised
    range finder: 2·n_iter + 2 products with n_iter·k and more columns. DoRA:
    norms.
    """
    n, m = min(shape), max(shape)
    needs = method.needs(shape)
    if needs is None:
        norms = any(w.name == "squared_norms" for w in method.weights(shape))
        return 2.0 * n * m if norms else 0.0
    if needs.n_iter is not None and isinstance(needs.rank, int):
        k = needs.rank + 10
        return (2 * needs.n_iter + 2) * (2.0 * m * n * k + 4.0 * m * k * k)
    gram = 1.0 * n * n * m
    if needs.few_of(n):
        return gram + 4.0 / 3.0 * n**3 + 2.0 * m * n * int(needs.rank or 0)
    k = n if method.replaces_base else 0
    return gram + 9.0 * n**3 + 2.0 * m * n * k


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def step_flops(
    config: Config, found: Candidate, batch: int, length: int, head: bool
) -> float:
    """FLOPs of one step, forward and backward."""
    block = sum(t.flops for t in found.traces)
    block += config.attention_flops(batch, length)
    total = config.layers * block
    return total + (config.head_flops(batch * length) if head else 0.0)


def activation_bytes(
    config: Config, found: Candidate, batch: int, length: int, dtype: str
) -> tuple[int, int]:
    """What one block keeps for the backward pass.

    Returns:
        Bytes that grow with the tokens, and bytes that do not.
    """
    size, tokens = _size(dtype), batch * length
    kept = round(tokens * block_bytes(config, length, dtype))
    shapes = [v.shape for v in config.matrices.values()]
    for group in _SHARED_INPUTS:
        if any(found.traces[i].keeps_input for i in group):
            kept += tokens * shapes[group[0]][0] * size
    kept += sum(t.kept for t in found.traces)
    return kept, sum(t.fixed for t in found.traces)


def memory(
    config: Config, found: Candidate, batch: int, length: int, remat: bool
) -> dict[str, int]:
    """Bytes of one training step in bfloat16, by what they are for."""
    kept, fixed = activation_bytes(config, found, batch, length, "bfloat16")
    tokens, layers = batch * length, config.layers
    activations = layers * (kept + fixed)
    if remat:
        activations = 2 * layers * tokens * config.width + kept + fixed
    return {
        "weights": 2 * config.parameters,
        "adapter": found.frozen_bytes
        + (found.trainable * 4 if found.name != FULL else 0),
        "gradients": found.trainable * found.trainable_bytes,
        "optimizer": 2 * found.trainable * found.trainable_bytes,
        "activations": activations,
        "logits": 6 * tokens * config.vocabulary,
    }
