"""What enabling compiles, compiled again for a TPU by `tpu_compile.py`."""

import collections
import hashlib
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.progress import track
from rich.table import Table
from tpu_step import CHIP, one_block

import keras_svdtune
from keras_svdtune.model.targets import find_targets


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
