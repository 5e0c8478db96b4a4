"""What fine-tuning on several devices holds and sends, as it is compiled.

    python tests/benchmarks/distribution.py                  # 8 CPU devices
    pip install libtpu
    python tests/benchmarks/distribution.py --model gemma2_9b \\
        --topology v5e:2x4 --mesh 1,8 --batch 1 --length 1024

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

import functools
import json
import math
import os
import re
import time
from typing import Any

# Before JAX is imported, by `common`.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    "--xla_force_host_platform_device_count=8"
)

import common
import jax
import keras
import numpy as np
from distribution_page import BASE, markdown
from shapes import MODELS
from sharded_step import Step, collectives, topology

LORA = "Keras enable_lora"


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


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0], ["llama3_small"])
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
    jax.config.update("jax_platforms", "cpu")
    keras.config.disable_interactive_logging()
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.model:
        for place in options.topology or ["cpu"]:
            measure(name, place, options)


if __name__ == "__main__":
    main()
