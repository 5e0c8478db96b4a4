"""The tables of `distribution.py`, as a page."""

from typing import Any

from shapes import MODELS

BASE = "base model"


# What libtpu lets a program of a v5e allocate.
USABLE = 15.75 * 2**30


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
