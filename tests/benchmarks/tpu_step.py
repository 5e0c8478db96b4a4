"""One training step of a decoder block, compiled for a TPU that is not there.

`tpu_compile.py` makes its tables of them.
"""

import hashlib
import importlib.util
import math
import os
import sys
import time
from typing import Any

import common
import jax
import keras
import keras_hub
import numpy as np
from jax.experimental import topologies

import keras_svdtune
from keras_svdtune.adapter.plan import Plan
from keras_svdtune.model.enable import attach_plans, targets_for

CHIP = "v5e"
# hidden_dim, and what a GemmaDecoderBlock takes. KerasHub counts both halves
# of a gated feed-forward block in `intermediate_dim`.
BLOCKS: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma_2b": (
        2048,
        {
            "num_query_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_dim": 2 * 16384,
        },
    ),
    "gemma2_9b": (
        3584,
        {
            "num_query_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "intermediate_dim": 2 * 14336,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "logit_soft_cap": 50.0,
            "use_sliding_window_attention": True,
        },
    ),
    common.TINY: (
        64,
        {
            "num_query_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "intermediate_dim": 2 * 128,
        },
    ),
}


def one_block(name: str) -> Any:
    """A backbone of one decoder block, without embeddings."""
    # By its full name: KerasHub exports no layer of one model only.
    from keras_hub.src.models.gemma import gemma_decoder_block

    width, settings = BLOCKS[name]
    inputs = keras.Input((None, width), dtype="bfloat16")
    block = gemma_decoder_block.GemmaDecoderBlock(
        hidden_dim=width, dtype="bfloat16", name="decoder_block_0", **settings
    )
    return keras_hub.models.Backbone(
        inputs=inputs, outputs=block(inputs), dtype="bfloat16"
    )


class Step:
    """The compiled step of a model, as it is to be trained.

    Args:
        backbone: the model.
        shape: (batch, length, width) of its input.
        device: the TPU to compile for.
    """

    def __init__(self, backbone: Any, shape: Any, device: Any):
        trainables = backbone.trainable_variables
        self.parameters = common.trained_numbers(trainables)
        place = jax.sharding.SingleDeviceSharding(device)

        def abstract(shape: Any, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)

        def all_of(variables: list[Any]) -> list[Any]:
            return [abstract(v.shape, v.dtype) for v in variables]

        optimizer = keras.optimizers.Adam()
        if trainables:
            optimizer.build(trainables)

        def step(train: Any, slots: Any, frozen: Any, x: Any, dy: Any) -> Any:
            def forward(train: Any, x: Any) -> Any:
                y, _, losses = backbone.stateless_call(
                    train, frozen, x, training=True, return_losses=True
                )
                return y, sum(losses, jax.numpy.zeros(()))

            (y, loss), pull = jax.vjp(forward, train, x)
            dtrain, dx = pull((dy, jax.numpy.ones_like(loss)))
            if train:
                train, slots = optimizer.stateless_apply(slots, dtrain, train)
            return train, slots, y, dx

        x = abstract(shape, "bfloat16")
        arguments = (
            all_of(trainables),
            all_of(optimizer.variables if trainables else []),
            all_of(backbone.non_trainable_variables),
            *(x, x),
        )
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
        # PiSSA and MiLoRA are one program: it is compiled once.
        self.compiled, self.compile_seconds = _compiled(lowered)

    def result(self) -> dict[str, Any]:
        """The figures, but for ratios to other candidates."""
        memory = self.compiled.memory_analysis()
        cost = self.compiled.cost_analysis()
        return {
            "estimated_seconds": whole(cost["optimal_seconds"]),
            "flops": cost["flops"],
            "bytes_moved": cost["bytes accessed"],
            "argument_bytes": memory.argument_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "trainable_parameters": self.parameters,
            "compile_seconds": self.compile_seconds,
        }


_COMPILED: dict[str, tuple[Any, float]] = {}


def _compiled(lowered: Any) -> tuple[Any, float]:
    """The compiled program, and the seconds that it took."""
    key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    if key not in _COMPILED:
        start = time.perf_counter()
        compiled = lowered.compile()
        _COMPILED[key] = compiled, time.perf_counter() - start
    return _COMPILED[key]


def whole(seconds: float) -> float:
    """The compiler's estimate, without -1 for each op that it cannot judge."""
    return seconds - min(math.floor(seconds), 0)


def enable_with_zeros(backbone: Any, method: keras_svdtune.Method) -> None:
    """Enables a method with zeros for what it would compute from W."""
    layers = targets_for(backbone, method, None)
    plans = {path: Plan(method, {}, np.zeros(5, "float32")) for path in layers}
    attach_plans(backbone, method, layers, plans)


def tpu(chip: str = CHIP) -> Any:
    """A device to compile for; ends the command if libtpu is missing."""
    return topology(f"{chip}:2x2")[0]


def topology(name: str) -> Any:
    """The devices of a slice, such as `v5e:2x4`; none of them is there."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("This benchmark needs the TPU's compiler: pip install libtpu")
    # There is no TPU to ask for these.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nothing runs on a TPU, so no process need have it for itself.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(
        platform="tpu", topology_name=name
    ).devices
