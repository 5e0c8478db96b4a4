"""One training step of a whole model, compiled for a mesh of devices.

Of a model of shapes alone. `distribution.py` makes its tables of them.
"""

import collections
import math
import re
from typing import Any

import common
import jax
import keras
import keras_hub
from tpu_step import enable_with_zeros

import keras_svdtune
from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.model.targets import all_layers, find_targets
from keras_svdtune.runtime.valueless import abstract

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2_9b": (
        "GemmaBackbone",
        {
            "vocabulary_size": 256000,
            "num_layers": 42,
            "num_query_heads": 16,
            "num_key_value_heads": 8,
            "hidden_dim": 3584,
            "intermediate_dim": 28672,
            "head_dim": 256,
            "query_head_dim_normalize": True,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "final_logit_soft_cap": 30.0,
            "attention_logit_soft_cap": 50.0,
            "use_sliding_window_attention": True,
            "dtype": "bfloat16",
        },
    ),
    "gemma3_270m": (
        "Gemma3Backbone",
        {
            "vocabulary_size": 262144,
            "image_size": 0,
            "num_layers": 18,
            "num_query_heads": 4,
            "num_key_value_heads": 1,
            "hidden_dim": 640,
            "intermediate_dim": 2048,
            "head_dim": 256,
            "use_query_key_norm": True,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "use_sliding_window_attention": True,
            "sliding_window_size": 512,
            "vision_encoder": None,
            "dtype": "float32",
        },
    ),
    "llama3_small": (
        "Llama3Backbone",
        {
            "vocabulary_size": 4096,
            "num_layers": 4,
            "num_query_heads": 16,
            "num_key_value_heads": 8,
            "hidden_dim": 512,
            "intermediate_dim": 1536,
            "dtype": "float32",
        },
    ),
    common.TINY: (
        "GemmaBackbone",
        {
            "vocabulary_size": 64,
            "num_layers": 2,
            "num_query_heads": 8,
            "num_key_value_heads": 8,
            "hidden_dim": 64,
            "intermediate_dim": 256,
            "head_dim": 8,
            "dtype": "float32",
        },
    ),
}
KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8, "s8": 1, "u8": 1}


class Step:
    """A training step of a model of shapes alone, compiled for a mesh.

    Args:
        name: a model of `MODELS`.
        layers: int, how many of its layers.
        method: a `Method`, a rank for `enable_lora`, or None for the base.
        mesh: `keras.distribution.DeviceMesh`.
        layout: `"svdtune"` or `"keras_hub"`.
        batch, length: of the tokens, over all devices.
    """

    def __init__(
        self,
        name: str,
        layers: int,
        method: Any,
        mesh: Any,
        layout: str,
        batch: int,
        length: int,
    ):
        keras.backend.clear_session(free_memory=False)
        class_name, config = MODELS[name]
        cls = getattr(keras_hub.models, class_name)
        self.mesh, self.batch, self.length = mesh, batch, length
        self.optimizer = keras.optimizers.Adam(1e-3)  # its counters are numbers
        with abstract():
            model = cls(**{**config, "num_layers": layers})
            self.layout_map = (
                cls.get_layout_map(mesh)
                if layout == "keras_hub"
                else keras_svdtune.svdtune_layout_map(model, mesh)
            )
            self._lay_out(model.variables)
            if isinstance(method, int):
                names = sorted({x.name for x in find_targets(model).values()})
                model.enable_lora(method, names)
            elif method is not None:
                enable_with_zeros(model, method)
            else:
                only_first_norm(model)
            self._lay_out(model.variables)
            self.optimizer.build(model.trainable_variables)
            self._lay_out(self.optimizer.variables)
        self.model, self.config = model, config

    def _lay_out(self, variables: list[Any]) -> None:
        """What Keras does when it makes a variable under a distribution."""
        for variable in variables:
            if variable._layout is None:
                variable._layout = self.layout_map[
                    variable.path
                ] or keras.distribution.TensorLayout(
                    [None] * len(variable.shape), self.mesh
                )

    def bytes_per_device(self) -> dict[str, int]:
        """What a device holds between two steps, by what it is."""
        found: dict[str, int] = collections.Counter()
        adapters = [x for x in all_layers(self.model) if isinstance(x, Adapter)]
        ours = {id(v) for x in adapters for v in x.variables}
        trained = {id(v) for v in self.model.trainable_variables}
        for v in self.model.variables:
            kind = "bases" if id(v) in ours else "model"
            kind = "trainables" if id(v) in trained else kind
            found[kind] += shard_bytes(v)
            if kind != "model":
                found["adapter on one device"] += math.prod(v.shape) * size(v)
        found["optimizer"] = sum(map(shard_bytes, self.optimizer.variables))
        return dict(found)

    def compiled(self) -> Any:
        """The compiled program."""
        model, optimizer = self.model, self.optimizer
        trainables = model.trainable_variables
        where = self.mesh.backend_mesh
        rows = jax.sharding.NamedSharding(
            where, jax.sharding.PartitionSpec("batch", None)
        )
        whole = jax.sharding.NamedSharding(where, jax.sharding.PartitionSpec())
        frozen = model.non_trainable_variables

        def step(train: Any, slots: Any, fixed: Any, tokens: Any) -> Any:
            def loss(train: Any) -> Any:
                pairs = [
                    *zip(trainables, train, strict=True),
                    *zip(frozen, fixed, strict=True),
                ]
                with keras.StatelessScope(pairs, collect_losses=True) as scope:
                    mask = jax.numpy.ones_like(tokens)
                    h = model({"token_ids": tokens, "padding_mask": mask})
                    logits = model.token_embedding(h, reverse=True)
                    extra = sum(scope.losses, jax.numpy.zeros(()))
                logits = logits.astype("float32")
                targets = jax.numpy.roll(tokens, -1, axis=1)[..., None]
                picked = jax.numpy.take_along_axis(logits, targets, axis=-1)
                total = jax.nn.logsumexp(logits, axis=-1)
                return extra + (total - picked[..., 0]).mean()

            value, gradients = jax.value_and_grad(loss)(train)
            train, slots = optimizer.stateless_apply(slots, gradients, train)
            return train, slots, value

        tokens = jax.ShapeDtypeStruct(
            (self.batch, self.length), "int32", sharding=rows
        )
        state = [
            abstract_values(trainables),
            abstract_values(optimizer.variables),
        ]
        out = [[x.sharding for x in part] for part in state]
        return (
            jax.jit(step, donate_argnums=(0, 1), out_shardings=(*out, whole))
            .lower(*state, abstract_values(frozen), tokens)
            .compile()
        )


def only_first_norm(model: Any) -> None:
    """Freezes all but the first norm of the first block."""
    for variable in model.variables:
        variable.trainable = False
    first = next(v for v in model.variables if re.search("_0/.*norm", v.path))
    first.trainable = True


def abstract_values(variables: list[Any]) -> list[Any]:
    """Shapes, dtypes and shardings for variables without values."""
    return [
        jax.ShapeDtypeStruct(tuple(v.shape), v.dtype, sharding=sharding_of(v))
        for v in variables
    ]


def sharding_of(variable: Any) -> Any:
    """JAX's sharding of a variable that has a layout."""
    layout = variable._layout
    return getattr(layout, "backend_layout", layout)


def shard_bytes(variable: Any) -> int:
    """Bytes of a variable on one device."""
    shape = sharding_of(variable).shard_shape(tuple(variable.shape))
    return math.prod(shape) * size(variable)


def size(variable: Any) -> int:
    """Bytes of one number of a variable."""
    return jax.numpy.dtype(variable.dtype).itemsize


def collectives(text: str) -> dict[str, list[int]]:
    """Kind -> [how many, bytes of their results] in a compiled program.

    An instruction may join several arrays; each counts, as XLA joins them or
    not for reasons of its own.
    """
    found = {kind: [0, 0] for kind in KINDS}
    for line in text.splitlines():
        match = re.search(
            rf"= (.*?) ({'|'.join(KINDS)})(-start|-done)?\(", line
        )
        if match is None or match[3] == "-start":  # its -done has the result
            continue
        for dtype, dims in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", match[1]):
            count = math.prod(int(x) for x in dims.split(",") if x)
            found[match[2]][0] += 1
            found[match[2]][1] += count * _BYTES.get(dtype, 4)
    return {kind: x for kind, x in found.items() if x[0]}
