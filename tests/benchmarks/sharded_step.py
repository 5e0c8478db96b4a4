"""One training step of a whole model, compiled for a mesh of devices.

Of a model of shapes alone. `distribution.py` makes its tables of them.
"""

import collections
import importlib.util
import math
import os
import re
import sys
from typing import Any

import jax
import keras
import keras_hub
import numpy as np
import shapes
from jax.experimental import topologies

import keras_svdtune
from keras_svdtune.adapter.plan import AdapterPlan
from keras_svdtune.model.checks import targets_for
from keras_svdtune.model.enable import attach_plans
from keras_svdtune.model.targets import adapted_targets, find_targets
from keras_svdtune.runtime.keras_internals import built_without_values

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8, "s8": 1, "u8": 1}


class Step:
    """A training step of a model of shapes alone, compiled for a mesh.

    Args:
        name: a model of `shapes.py`.
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
        cls = getattr(keras_hub.models, shapes.MODELS[name][0])
        self.mesh, self.batch, self.length = mesh, batch, length
        self.optimizer = keras.optimizers.Adam(1e-3)  # its counters are numbers
        with built_without_values():
            model = shapes.build(name, num_layers=layers)
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
        self.model = model

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
        ours = {
            id(v)
            for target in adapted_targets(self.model).values()
            for v in target.adapter.variables
        }
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


def enable_with_zeros(model: Any, method: keras_svdtune.Method) -> None:
    """Enables a method with zeros for what it would compute from W."""
    targets = targets_for(model, method, None)
    fingerprint = np.zeros(5, "float32")
    plans = {path: AdapterPlan(method, {}, fingerprint) for path in targets}
    attach_plans(model, method, targets, plans)


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
