"""What fine-tuning on several devices holds and sends, as it is compiled.

    python tests/benchmarks/distribution.py                  # 8 CPU devices
    pip install libtpu
    python tests/benchmarks/distribution.py --model gemma2_9b \\
        --topology v5e:2x4 --mesh 1,8 --length 1024

Nothing runs: the whole training step (forward, backward, loss, Adam's update)
of a model of shapes alone is compiled for the devices of a mesh; on a TPU by
its own compiler, which needs no TPU. From the compiled program: the bytes of
its arguments and temporaries on a device, and its collectives (all-reduce,
all-gather, ...), how many and how many bytes their results are. From the
layouts: the bytes of model, bases, trainables and optimizer on a device.

The layout is `svdtune_layout_map`'s, or with `--layout keras_hub` KerasHub's
own. Keras' `enable_lora` adapts the same layers, under the same layout. `base
model` trains the first norm alone: forward and backward pass of the model.

A program is compiled for two numbers of layers and continued in a straight
line to the model's own number, unless `--full`: layers are alike.
"""

import collections
import functools
import json
import math
import os
import re
import time
from typing import Any

# Before JAX is imported, by `common`.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    "--xla_force_host_platform_device_count=8"
)

import common
import jax
import keras
import keras_hub
import numpy as np
from tpu_compile import enable_with_zeros, topology

import keras_svdtune
from keras_svdtune.abstract import abstract
from keras_svdtune.adapter import Adapter
from keras_svdtune.targets import all_layers, find_targets

BASE, LORA = "base model", "Keras enable_lora"
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
# What libtpu lets a program of a v5e allocate.
USABLE = 15.75 * 2**30
_KINDS = (
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
    found = {kind: [0, 0] for kind in _KINDS}
    for line in text.splitlines():
        match = re.search(
            rf"= (.*?) ({'|'.join(_KINDS)})(-start|-done)?\(", line
        )
        if match is None or match[3] == "-start":  # its -done has the result
            continue
        for dtype, dims in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", match[1]):
            count = math.prod(int(x) for x in dims.split(",") if x)
            found[match[2]][0] += 1
            found[match[2]][1] += count * _BYTES.get(dtype, 4)
    return {kind: x for kind, x in found.items() if x[0]}


def figures(step: Step) -> dict[str, Any]:
    """All figures of one step, as numbers that add up by layers."""
    start = time.perf_counter()
    found: dict[str, Any] = step.bytes_per_device()
    compiled = step.compiled()
    memory = compiled.memory_analysis()
    found["arguments"] = memory.argument_size_in_bytes
    found["temporaries"] = memory.temp_size_in_bytes
    found["peak"] = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    kinds = collectives(compiled.as_text())
    for kind in _KINDS:
        count, bytes_ = kinds.get(kind, (0, 0))
        found[f"{kind}s"], found[f"{kind} bytes"] = count, bytes_
    found["collectives"] = sum(count for count, _ in kinds.values())
    found["collective bytes"] = sum(x for _, x in kinds.values())
    found["compile seconds"] = time.perf_counter() - start
    return found


def for_all_layers(
    make: Any, few: tuple[int, int], layers: int
) -> dict[str, Any]:
    """The figures for all layers, from those for two numbers of layers."""
    if layers <= max(few):
        return figures(make(layers))
    a, b = (figures(make(n)) for n in few)
    slope = (layers - few[1]) / (few[1] - few[0])
    return {
        key: a[key] + b[key]
        if key == "compile seconds"
        else b[key] + slope * (b[key] - a[key])
        for key in b
    }


def candidates(wanted: list[str] | None, rank: int) -> dict[str, Any]:
    """Label -> what `Step` takes as its method."""
    methods, _ = common.methods_for(wanted, rank)
    found: dict[str, Any] = {BASE: None, f"{LORA}({rank})": rank}
    for spec, method in methods.items():
        found[common.label_of(spec, method)] = method
    return found


def mesh_on(place: str, shape: tuple[int, ...]) -> Any:
    """The devices of this machine's CPU, or of a TPU slice, as a mesh."""
    devices = jax.devices("cpu") if place == "cpu" else topology(place)
    count = math.prod(shape)
    return keras.distribution.DeviceMesh(
        shape, ("batch", "model"), np.array(devices[:count])
    )


def measure(name: str, place: str, options: Any) -> None:
    """Compiles all candidates for all meshes of one place; writes a file."""
    stem = f"distribution_{name}_{re.sub(r'[^a-z0-9]+', '_', place)}"
    if options.layout != "svdtune":
        stem += f"_{options.layout}"
    path = options.results / f"{stem}.json"
    result: dict[str, Any] = {"model": name, "place": place, "meshes": {}}
    if path.exists():
        result = json.loads(path.read_text())
    for shape in options.mesh:
        mesh = mesh_on(place, tuple(int(x) for x in shape.split(",")))
        key = f"{shape}, {options.batch} x {options.length}"
        found = result["meshes"].setdefault(key, {})
        for label, method in candidates(options.methods, options.rank).items():
            if label in found and not options.again:
                continue
            make = functools.partial(
                lambda layers, method: Step(
                    name,
                    layers,
                    method,
                    mesh,  # noqa: B023
                    options.layout,
                    options.batch,
                    options.length,
                ),
                method=method,
            )
            layers = MODELS[name][1]["num_layers"]
            few = (layers, layers) if options.full else options.layers
            try:
                found[label] = for_all_layers(make, few, layers)
            except Exception as error:  # it does not fit, or not this layout
                text = str(error).strip().splitlines()[0][:300]
                found[label] = {"error": f"{type(error).__name__}: {text}"}
            found[label]["compiled_layers"] = list(few)
            row = found[label]
            print(
                key,
                label,
                row.get("error")
                or f"{row['peak'] / 1e9:.2f} GB, {row['collectives']:.0f} "
                f"collectives, {row['compile seconds']:.0f} s",
                flush=True,
            )
            result["versions"] = common.machine()["versions"]
            common.write_json(options.results, stem, result)
    (options.results / f"{stem}.md").write_text(markdown(result))


def largest_batch(figures: dict[str, Any], batch: int) -> int:
    """How many sequences fit, if all temporaries grow with their number."""
    free = USABLE - (figures["peak"] - figures["temporaries"])
    return max(int(free * batch / figures["temporaries"]), 0)


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    name, place = result["model"], result["place"]
    lines = [
        f"# {name}: one training step on several devices ({place})",
        "",
        "Written by `tests/benchmarks/distribution.py`. Compiled, not run. MB "
        "and GB (10^6, 10^9 bytes) on each device; collectives are all in one "
        "step, and their bytes those of their results on one device.",
    ]
    layers = MODELS[name][1]["num_layers"]
    compiled = {
        tuple(x["compiled_layers"])
        for found in result["meshes"].values()
        for x in found.values()
        if "compiled_layers" in x
    }
    if any(max(few) < layers for few in compiled):
        lines[-1] += (
            f" Compiled for {' and '.join(map(str, sorted(*compiled)))} layers "
            f"and continued in a straight line to {layers}."
        )
    if place != "cpu":
        lines[-1] += (
            " The largest batch is for 15.75 GiB on each device, all "
            "temporaries counted as growing with it."
        )
    for key, found in result["meshes"].items():
        shape, tokens = key.rsplit(", ", 1)
        lines += [
            "",
            f"## Mesh ({shape}) of (batch, model), {tokens} tokens",
            "",
            "| | model MB | bases MB | trainables MB | optimizer MB | adapter, "
            "share of one device | temporaries GB | peak GB | collectives | "
            "over the base | MB sent | largest batch |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        base = found.get(BASE, {}).get("collectives")
        for label, x in found.items():
            if "error" in x:
                lines.append(f"| {label} | {x['error']} |" + " |" * 10)
                continue
            whole = x.get("adapter on one device", 0)
            part = x.get("bases", 0) + x.get("trainables", 0)
            share = f"{part / whole:.3f}" if whole and label != BASE else ""
            batch = int(tokens.split(" x ")[0])
            fits = "" if place == "cpu" else largest_batch(x, batch)
            over = "" if base is None else f"{x['collectives'] - base:+.0f}"
            lines.append(
                f"| {label} | {x['model'] / 1e6:,.1f} "
                f"| {x.get('bases', 0) / 1e6:,.2f} "
                f"| {x.get('trainables', 0) / 1e6:,.3f} "
                f"| {x['optimizer'] / 1e6:,.3f} | {share} "
                f"| {x['temporaries'] / 1e9:,.3f} | {x['peak'] / 1e9:,.3f} "
                f"| {x['collectives']:.0f} | {over} "
                f"| {x['collective bytes'] / 1e6:,.1f} | {fits} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the command."""
    parser = common.parser(
        __doc__.splitlines()[0], [x for x in MODELS if x != common.TINY]
    )
    parser.set_defaults(model=["llama3_small"])
    parser.add_argument(
        "--mesh", nargs="+", default=["1,8", "2,4", "8,1"], help="batch,model"
    )
    parser.add_argument(
        "--topology",
        nargs="+",
        help="slices of a TPU, such as v5e:2x4, in place of this CPU",
    )
    parser.add_argument(
        "--layout", default="svdtune", choices=["svdtune", "keras_hub"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--layers", type=int, nargs=2, default=[1, 2], help="to compile"
    )
    parser.add_argument("--full", action="store_true", help="compile them all")
    parser.add_argument(
        "--again", action="store_true", help="also what the file has already"
    )
    options = parser.parse_args()
    common.require_jax()
    jax.config.update("jax_platforms", "cpu")
    keras.config.disable_interactive_logging()
    for name in options.model:
        for place in options.topology or ["cpu"]:
            measure(name, place, options)


if __name__ == "__main__":
    main()
