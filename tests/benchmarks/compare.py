"""Every method beside what it competes with: one command for all the rows.

    python tests/benchmarks/compare.py

It runs `step_time.py` for real models on each backend (PEFT's methods beside
ours on torch), and on JAX for single layers of larger models' shapes; each in
a process of its own, one after the other. Everything is written to the results
folder: a JSON file for each run, and `compare.md`, a table of them all, also of
those from earlier runs.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = ("gemma3_270m", "smollm2_135m")
BACKENDS = ("jax", "tensorflow", "torch")
LAYERS = {
    "2048x16384": "Gemma 2B, gate",
    "16384x2048": "Gemma 2B, down",
    "2048x2048": "Gemma 2B, query",
    "3584x14336": "Gemma 2 9B, gate",
    "14336x3584": "Gemma 2 9B, down",
    "3584x4096": "Gemma 2 9B, query",
    "4096x14336": "Llama 3 8B, gate",
    "14336x4096": "Llama 3 8B, down",
    "4096x4096": "Llama 3 8B, query",
}
TOKENS = (512, 4096, 16384)
METHODS = (
    *("lora", "adalora", "dora", "lora_xs", "pissa", "milora"),
    *("svf", "svf:replace_kernel=true", "svft"),
)
COLUMNS = {
    "s / step": ("seconds", 1, ".3g"),
    "to enable_lora": ("seconds_to_lora", 1, ".2f"),
    "CPU, to enable_lora": ("cpu_seconds_to_lora", 1, ".2f"),
    "to floor": ("seconds_to_floor", 1, ".2f"),
    "GFLOP": ("flops", 1e-9, ",.0f"),
    "temp MB": ("temp_bytes", 1e-6, ",.0f"),
    "temp, to enable_lora": ("temp_bytes_to_lora", 1, ".2f"),
    "peak MB": ("peak_bytes", 1e-6, ",.0f"),
    "s to enable": ("enable_seconds", 1, ".1f"),
    "trained": ("trainable_parameters", 1, ",d"),
    "file KiB": ("file_bytes", 1 / 1024, ",.0f"),
}


def run(backend: str, arguments: list[str]) -> None:
    """One run of `step_time.py`; its output goes to the terminal."""
    command = [sys.executable, str(Path(__file__).with_name("step_time.py"))]
    print(f"== {backend}: {' '.join(arguments)}", flush=True)
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run([*command, *arguments], env=environment)
    if done.returncode:
        sys.exit(f"It ended with {done.returncode}: see above.")


def markdown(folder: Path) -> str:
    """The tables of all results in `folder`."""
    lines = [
        "# Steps, method by method",
        "",
        "Written by `python tests/benchmarks/compare.py`. Compare rows within "
        "a table: all its rows took turns. `step_time.py` says what a step is, "
        "and what the columns are. Where the load was above 1 at the start, "
        "other work ran too: trust CPU seconds there. PEFT's rows are on real "
        "models only.",
    ]
    for path in sorted(folder.glob("step_time_*.json"), key=_place):
        read = json.loads(path.read_text())
        machine = read["machine"]
        layer = LAYERS.get(read["model"])
        lines += [
            "",
            f"## {read['title']}" + (f" ({layer})" if layer else ""),
            "",
            f"{machine['backend']} on {machine.get('device', 'cpu')}, "
            f"{machine['cores']} cores, {read['rounds']} rounds, "
            f"{machine['date'][:10]}, load {machine['load_at_start']} to "
            f"{machine['load_at_end']}; "
            + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
            "",
        ]
        rows = read["results"]
        for row in rows.values():
            # Memory that was resident before is used again: no peak of it.
            if (row.get("peak_bytes") or 0) < (row.get("temp_bytes") or 0):
                row["peak_bytes"] = None
        columns = [
            name
            for name in COLUMNS
            if any(cell(row, name) for row in rows.values())
        ]
        lines.append("| | " + " | ".join(columns) + " |")
        lines.append("|---" * (1 + len(columns)) + "|")
        for name, row in rows.items():
            found = [cell(row, column) for column in columns]
            lines.append(f"| {name} | " + " | ".join(found) + " |")
        lines += [
            f"\nLeft out: {name} ({why})"
            for name, why in read["left_out"].items()
        ]
    return "\n".join(lines) + "\n"


def _place(path: Path) -> tuple[Any, ...]:
    read = json.loads(path.read_text())
    layers = list(LAYERS)
    order = layers.index(read["model"]) if read["model"] in layers else -1
    tokens = read["batch"] * read["length"]
    return (order, read["model"], read["machine"]["backend"], tokens)


def cell(row: dict[str, Any], column: str) -> str:
    """What a column of `COLUMNS` has in a row; nothing if it is not known."""
    key, unit, form = COLUMNS[column]
    value = row.get(key)
    if value is None:
        return ""
    return format(value if unit == 1 else value * unit, form)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--backends", nargs="*", default=BACKENDS)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS))
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens each")
    parser.add_argument("--steps", type=int, default=5, help="rounds")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results"
    )
    options = parser.parse_args()
    common = [
        *("--methods", *options.methods, "--rank", str(options.rank)),
        *("--steps", str(options.steps), "--results", str(options.results)),
    ]
    left_out = []
    for backend in options.backends:
        if importlib.util.find_spec(backend) is None:
            left_out.append(f"{backend} is not installed")
            continue
        peft = backend == "torch" and all(
            importlib.util.find_spec(x) for x in ("peft", "transformers")
        )
        for model in options.models:
            real = peft and model in MODELS
            shape = [str(options.batch), "--length", str(options.length)]
            run(
                backend,
                ["--model", model, "--batch", *shape, *common]
                + (["--peft"] if real else []),
            )
    on_jax = "jax" in options.backends and importlib.util.find_spec("jax")
    for layer in options.layers if on_jax else []:
        for tokens in options.tokens:
            shape = ["1", "--length", str(tokens)]
            run("jax", ["--model", layer, "--batch", *shape, *common])
    path = options.results / "compare.md"
    path.write_text(markdown(options.results), encoding="utf-8")
    print(f"Written: {path}")
    for line in left_out:
        print(f"Left out: {line}")


if __name__ == "__main__":
    main()
