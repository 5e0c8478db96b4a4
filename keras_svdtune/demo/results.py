"""The results of a comparison: a file, and a picture of it.

    python -m keras_svdtune.demo --method all --results results.json
    python -m keras_svdtune.demo.results results.json picture.png

The picture has the numbers that each method trains, on a logarithmic axis,
against the held-out loss.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from keras_svdtune.demo.optional import require
from keras_svdtune.demo.result import Result
from keras_svdtune.demo.train import make_method
from keras_svdtune.methods.base import IN, METHODS, OUT
from keras_svdtune.runtime.types import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours are Okabe and Ito's, distinct to every kind of colour vision.
_COLOURS = {
    "singular vectors kept": "#D55E00",
    "starts from singular vectors": "#0072B2",
    "without singular vectors": "#777777",
}


def measured(results: list[Result], options: argparse.Namespace) -> Json:
    """What a comparison found, as plain values.

    Args:
        results: one for each method, on the same model.
        options: the command line of the demo.
    """
    base = results[0].before
    return {
        "command": "python -m keras_svdtune.demo",
        "model": results[0].model,
        "steps": options.steps,
        "pairs": options.pairs,
        "seed": options.seed,
        "base": {"loss": base.loss, "dialect": base.dialect},
        "dialect_of_the_data": results[0].ceiling,
        "methods": {
            x.method: {
                "learning_rate": x.learning_rate,
                "trainable": x.trainable,
                "file_bytes": x.file_bytes,
                "seconds_per_step": x.seconds_per_step,
                "loss": x.after.loss,
                "dialect": x.after.dialect,
                "training_losses": x.losses,
                "answers": len(x.after.answers),
                "reloaded_agree": _agree(x.reloaded, x.after.answers),
                "merged_agree": _agree(x.merged, x.after.answers),
            }
            for x in results
        },
    }


def write(
    results: list[Result], file: Path, options: argparse.Namespace
) -> None:
    """Writes it as JSON."""
    found = measured(results, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _agree(said: list[str], expected: list[str]) -> int:
    return sum(a == b for a, b in zip(said, expected, strict=True))


def kind(name: str) -> str:
    """What a method does with W's singular vectors: a key of `_COLOURS`."""
    method, shape = make_method(name), (1024, 256)
    if method.needs(shape) is None:
        return "without singular vectors"
    # A and B are as long as W is, and start as singular vectors do; what
    # trains between the vectors knows only their number.
    trained = [w for w in method.weights(shape) if w.trainable]
    if any(axis in (IN, OUT) for w in trained for axis in w.axes):
        return "starts from singular vectors"
    return "singular vectors kept"


def picture(found: Json, file: Path) -> None:
    """Draws trained numbers against held-out loss.

    Args:
        found: what `write` wrote.
        file: the picture; its ending says of what kind.
    """
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    # Opaque: readable on a light page and on a dark one.
    with plt.rc_context({"figure.facecolor": "white", "font.size": 11}):
        figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    base = found["base"]["loss"]
    axes.axhline(base, color="#777777", linestyle="--", linewidth=1)
    axes.annotate(
        f"base model: {base:.2f}",
        (0, base),
        xycoords=("axes fraction", "data"),
        xytext=(6, -14),
        textcoords="offset points",
        color="#555555",
    )
    for label, colour in _COLOURS.items():
        chosen = [
            x for name, x in found["methods"].items() if kind(name) == label
        ]
        axes.plot(
            [x["trainable"] for x in chosen],
            [x["loss"] for x in chosen],
            "o",
            color=colour,
            markersize=9,
            label=label,
        )
    _name_points(axes, found)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters (fewer is left)")
    axes.set_ylabel("held-out loss (lower is better)")
    axes.set_title(f"{found['model']}, {found['steps']} steps of the demo")
    axes.margins(x=0.05, y=0.1)
    counts = [x["trainable"] for x in found["methods"].values()]
    axes.set_xlim(min(counts) / 1.6, max(counts) * 3.2)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _name_points(axes: "Axes", found: Json) -> None:
    """The name of each method to the right of it, above those below it."""
    methods = found["methods"]
    losses = [found["base"]["loss"], *(x["loss"] for x in methods.values())]
    line = (max(losses) - min(losses) or 1.0) / 17
    taken: list[tuple[float, float]] = []
    for name, x in sorted(methods.items(), key=lambda item: item[1]["loss"]):
        count, height = x["trainable"], x["loss"]
        right = 1.3 * max(
            y["trainable"]
            for y in methods.values()
            if y["trainable"] < 2 * count
        )
        for other, y in taken:
            if 0.5 < other / right < 2.0 and abs(y - height) < line:
                height = y + line
        taken.append((right, height))
        axes.annotate(
            METHODS[name].title,
            (count, x["loss"]),
            xytext=(right, height),
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "lw": 0.8},
        )


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_svdtune.demo.results",
        description="Draws what `--method all --results FILE` wrote.",
    )
    parser.add_argument("results", type=Path, help="the JSON file")
    parser.add_argument("picture", type=Path, help="such as picture.png")
    options = parser.parse_args(arguments)
    found = json.loads(options.results.read_text(encoding="utf-8"))
    picture(found, options.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
