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
import json
import re
import sys
from pathlib import Path
from typing import Any

import common
import jax
import keras
from rich.console import Console
from rich.progress import track
from tpu_enabling import enabling, table_of_enabling
from tpu_step import BLOCKS, Step, enable_with_zeros, one_block, tpu
from tpu_tables import FLOOR, FULL, LORA, plot, table_of

import keras_svdtune
from keras_svdtune.model.targets import find_targets

SLOW_COMPILE = 20.0  # seconds: what enabling must not need for one program


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
    keras_svdtune.set_decomposition_cache(False)  # every enabling from nothing
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
