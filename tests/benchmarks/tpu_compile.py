"""What one training step costs on a TPU v5e, by its own compiler.

    pip install libtpu
    python tests/benchmarks/tpu_compile.py --model gemma_2b gemma2_9b

No TPU is needed: libtpu compiles ahead of time, for a v5e that is not there.
Nothing runs, so no figure here is a measured time. Bytes are those that the
program will allocate; FLOPs and seconds are the compiler's own estimates.

One step is the forward and backward pass of one decoder block at its real
widths, and Adam's update, in bfloat16 with float32 adapters. The gradient of
the block's input is always computed, as the blocks below need it. All
candidates adapt the same layers, every EinsumDense of the block; they stand
beside the frozen floor (no gradient but the input's), Keras' `enable_lora` and
full fine-tuning. Attention is compiled as written, without the fused kernel
that Keras has on a real TPU; it is the same for all of them.

Only shapes matter to a compiler, so the adapters hold zeros: nothing is
decomposed for the step. What enabling itself compiles is listed too: each
method is enabled for real on one layer of each shape, and every program that
JAX compiles meanwhile is compiled again for the TPU.
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import keras
import keras_hub
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_svdtune
from keras_svdtune.adapter import Plan
from keras_svdtune.enable import attach_plans, targets_for
from keras_svdtune.targets import find_targets

FLOOR = "frozen floor"
LORA = "Keras enable_lora"
FULL = "full fine-tuning"
CHIP = "v5e"
SLOW_COMPILE = 20.0  # seconds: what enabling must not need for one program

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


def steps(
    name: str,
    tokens: list[int],
    length: int,
    methods: dict[str, keras_svdtune.Method],
    rank: int,
    device: Any,
    dump: Path | None,
    known: dict[str, dict[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The figures of every candidate, by number of tokens.

    Args:
        known: of an earlier run. The methods take the place of those in it;
            the three that frame them are kept.

    Returns:
        tokens -> candidate -> figures, and why a method is left out.
    """
    width = BLOCKS[name][0]
    shapes = {n: (max(n // length, 1), min(n, length), width) for n in tokens}
    found = {str(n): dict(known.get(str(n), {})) for n in tokens}
    left_out = {}
    frames = (FULL, FLOOR, f"{LORA}({rank})")

    def compile_all(label: str, backbone: Any) -> None:
        for n, shape in shapes.items():
            if label in frames and label in found[str(n)]:
                continue
            step = Step(backbone, shape, device)
            found[str(n)][label] = step.result()
            if dump is not None:
                dump.mkdir(parents=True, exist_ok=True)
                file = re.sub(r"\W+", "_", f"{name} {n} {label}") + ".hlo"
                (dump / file).write_text(step.compiled.as_text())

    backbone = one_block(name)
    compile_all(FULL, backbone)
    backbone.trainable = False
    compile_all(FLOOR, backbone)
    # A block of its own, since it cannot be taken back.
    lora = one_block(name)
    lora.enable_lora(
        rank, sorted({x.name for x in find_targets(lora).values()})
    )
    compile_all(f"{LORA}({rank})", lora)
    del lora
    for label, method in track(methods.items(), f"Compiling {name}"):
        title = common.label_of(label, method)
        try:
            enable_with_zeros(backbone, method)
        except ValueError as error:
            left_out[label] = str(error)
            continue
        compile_all(title, backbone)
        keras_svdtune.remove_adapter(backbone)
    for results in found.values():
        results[FULL] = results.pop(FULL)  # the floor first, this one last
        with_ratios(results)
    return found, left_out


def with_ratios(results: dict[str, dict[str, Any]]) -> None:
    """Adds the ratios to `enable_lora` and to the floor."""
    lora = next(r for name, r in results.items() if name.startswith(LORA))
    for result in results.values():
        for key in ("estimated_seconds", "flops", "bytes_moved", "temp_bytes"):
            result[f"{key}_to_lora"] = _ratio(result[key], lora[key])
            result[f"{key}_to_floor"] = _ratio(result[key], results[FLOOR][key])


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None  # a tiny block needs no temporaries


def enabling(
    name: str, methods: dict[str, keras_svdtune.Method], device: Any
) -> dict[str, Any]:
    """What JAX compiles while each method is enabled, compiled for the TPU.

    Each method decomposes one layer of each shape, for real, on the host: a
    TPU takes the same path (`svd.on_host`).

    Returns:
        `programs`: for each distinct program its operations, shapes and
        seconds to compile, and which methods need it. `enable_seconds`: what
        enabling took here.
    """
    backbone = one_block(name)
    layers = {
        (x.equation, tuple(x.kernel.shape)): path
        for path, x in find_targets(backbone).items()
    }
    programs: dict[str, dict[str, Any]] = {}
    seconds = {}
    for label, method in track(methods.items(), f"Enabling {name}"):
        with tempfile.TemporaryDirectory() as folder:
            jax.clear_caches()  # or what an earlier method compiled is missed
            jax.config.update("jax_dump_ir_to", folder)
            start = time.perf_counter()
            keras_svdtune.enable_adapter(
                backbone, method, [re.escape(x) for x in layers.values()]
            )
            seconds[label] = time.perf_counter() - start
            jax.config.update("jax_dump_ir_to", "")
            keras_svdtune.remove_adapter(backbone)
            for file in sorted(Path(folder).rglob("*compile*.mlir")):
                text = str(_parsed(file.read_text()))
                key = hashlib.sha256(text.encode()).hexdigest()
                program = programs.setdefault(key, {"text": text, "of": []})
                if label not in program["of"]:
                    program["of"].append(label)
    found = []
    for program in track(programs.values(), "Compiling for the TPU"):
        text = program.pop("text")
        start = time.perf_counter()
        _compile_text(text, device)
        found.append(
            {
                **_about(text),
                "compile_seconds": time.perf_counter() - start,
                "methods": program["of"],
            }
        )
    found.sort(key=lambda p: -p["compile_seconds"])
    return {"programs": found, "enable_seconds": seconds}


# JAX has no public way to read and compile the text of a program.
def _parsed(text: str) -> Any:
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    return ir.Module.parse(text, mlir.make_ir_context())


def _compile_text(text: str, device: Any) -> None:
    from jaxlib import _jax, xla_client

    device.client.compile(
        _parsed(text),
        executable_devices=_jax.DeviceList((device,)),
        compile_options=xla_client.CompileOptions(),
    )


def _about(text: str) -> dict[str, Any]:
    """The operations of a StableHLO program, and its types."""
    operations = collections.Counter(
        re.findall(r"(?:stablehlo|chlo)\.([a-z_0-9]+)", text)
    )
    calls = re.findall(r"custom_call @([\w.$]+)", text)
    signature = re.search(r"func\.func public @main\((.*?)\) *->", text, re.S)
    arguments = re.findall(r"tensor<[^>]*>", signature[1] if signature else "")
    module = re.search(r"module @(\w+)", text)
    return {
        "name": module[1] if module else "",
        "operations": sorted(set(operations) - {"return", "constant"}),
        "custom_calls": sorted(set(calls)),
        "arguments": [x.removeprefix("tensor<")[:-1] for x in arguments],
    }


def table_of(results: dict[str, dict[str, Any]], title: str, note: str) -> Any:
    """The results as a table."""
    table = Table(title=title, caption=note)
    table.add_column("", no_wrap=True)
    for column in (
        "ms, estimated",
        "to enable_lora",
        "to floor",
        "GFLOP",
        "to enable_lora",
        "GB moved",
        "argument MB",
        "temp MB",
        "to enable_lora",
        "trainable",
        "s to compile",
    ):
        table.add_column(column, justify="right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['estimated_seconds'] * 1e3:.3g}",
            f"{r['estimated_seconds_to_lora']:.2f}",
            f"{r['estimated_seconds_to_floor']:.2f}",
            f"{r['flops'] / 1e9:.4g}",
            f"{r['flops_to_lora']:.2f}",
            f"{r['bytes_moved'] / 1e9:.3g}",
            f"{r['argument_bytes'] / 1e6:.4g}",
            f"{r['temp_bytes'] / 1e6:.4g}",
            _short(r["temp_bytes_to_lora"]),
            f"{r['trainable_parameters']:,}",
            f"{r['compile_seconds']:.1f}",
        )
    return table


def _short(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def table_of_enabling(found: dict[str, Any], name: str) -> Any:
    """What enabling compiles, slowest first."""
    programs = found["programs"]
    slowest = programs[0]["compile_seconds"] if programs else 0.0
    table = Table(
        title=f"What enabling compiles on {name}: {len(programs)} programs",
        caption=f"The slowest takes {slowest:.1f} s for {CHIP}; custom calls: "
        + (
            ", ".join(sorted({c for p in programs for c in p["custom_calls"]}))
            or "none, so no decomposition"
        ),
    )
    for column in ("operations", "programs", "slowest, s", "methods"):
        table.add_column(column)
    groups: dict[str, list[dict[str, Any]]] = {}
    for p in programs:
        groups.setdefault(" ".join(p["operations"]) or "copy", []).append(p)
    for operations, group in groups.items():
        methods = {m for p in group for m in p["methods"]}
        table.add_row(
            operations,
            str(len(group)),
            f"{group[0]['compile_seconds']:.2f}",
            " ".join(x for x in found["enable_seconds"] if x in methods),
        )
    return table


def plot(found: dict[str, Any], title: str, note: str, path: Path) -> None:
    """Draws the estimates as bars, one panel for each number of tokens."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(found.values())))[::-1]
    figure, panels = pyplot.subplots(
        1,
        len(found),
        figsize=(2 + 4.5 * len(found), 1.6 + 0.34 * len(names)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (tokens, results) in zip(panels[0], found.items(), strict=True):
        for i, name in enumerate(names):
            r = results[name]
            framed = name in (FLOOR, FULL) or name.startswith(LORA)
            axes.barh(
                i,
                r["estimated_seconds"] * 1e3,
                height=0.66,
                color="#b0b7c0" if framed else "#2f6db3",
            )
            axes.annotate(
                f"{r['estimated_seconds_to_lora']:.2f}",
                (r["estimated_seconds"] * 1e3, i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
            if name == FLOOR or name.startswith(LORA):
                axes.axvline(
                    r["estimated_seconds"] * 1e3,
                    color="#c0392b",
                    linewidth=1,
                    linestyle="--",
                )
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{int(tokens):,} tokens")
        axes.margins(x=0.15)
        axes.set_xlabel("milliseconds, estimated by the compiler")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.supxlabel(f"number = ratio to Keras enable_lora; {note}", fontsize=9)
    figure.savefig(path, dpi=150)
    print(f"Written: {path}")


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


def options_from_command_line() -> argparse.Namespace:
    """The command line."""
    models = [x for x in BLOCKS if x != common.TINY]
    parser = common.parser(__doc__.splitlines()[0], models)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 8192], help="a step"
    )
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens in a sequence"
    )
    parser.add_argument(
        "--only",
        choices=["steps", "enabling"],
        help="one part; what an earlier run wrote stays, but for the methods "
        "and tokens of this one",
    )
    parser.add_argument(
        "--hlo", type=Path, help="folder for the compiled programs as text"
    )
    return parser.parse_args()


def main() -> None:
    """Runs the command."""
    options = options_from_command_line()
    common.require_jax()
    jax.config.update("jax_platforms", "cpu")  # the TPU is not there
    keras.config.disable_interactive_logging()  # one progress bar is enough
    device = tpu()
    methods, left_out = common.methods_for(options.methods, options.rank)
    for name in options.model:
        path = options.results / f"tpu_compile_{name}.json"
        result: dict[str, Any] = {"model": name, "dtype": "bfloat16"}
        if options.only is not None and path.exists():
            result = json.loads(path.read_text())
        result["compiled_for"] = device.device_kind
        if options.only != "enabling":
            machine = common.machine()
            found, unfit = steps(
                name,
                options.tokens,
                options.length,
                methods,
                options.rank,
                device,
                options.hlo,
                result.get("results", {}),
            )
            machine["load_at_end"] = common.load()
            result |= {
                "length": options.length,
                "machine": machine,
                "left_out": left_out | unfit,
                "results": result.get("results", {}) | found,
            }
            report(result, options.results)
            common.write_json(options.results, path.stem, result)
        if options.only != "steps":
            result["enabling"] = enabling(name, methods, device)
            common.show(table_of_enabling(result["enabling"], name))
            common.write_json(options.results, path.stem, result)
            slowest = result["enabling"]["programs"][0]["compile_seconds"]
            if slowest > SLOW_COMPILE:
                sys.exit(f"A program takes {slowest:.0f} s to compile.")


def report(result: dict[str, Any], folder: Path) -> None:
    """Prints the tables and draws the plot."""
    name, machine = result["model"], result["machine"]
    note = f"libtpu {machine['versions'].get('libtpu')}, {machine['date'][:10]}"
    title = f"One step of one block of {name}, {result['compiled_for']}"
    for tokens, results in result["results"].items():
        common.show(table_of(results, f"{title}, {tokens} tokens", note))
    for method, reason in result["left_out"].items():
        Console().print(f"Left out: {method} ({reason})")
    path = folder / f"tpu_compile_{name}.png"
    plot(result["results"], title, note, path)


if __name__ == "__main__":
    main()
