"""What each method adds to large models, from their configs alone.

    python tests/benchmarks/scale.py

No weights are made or fetched. Each model is KerasHub's own backbone at full
size, built in a `keras.StatelessScope`, where variables get shapes and no
values; its parameters must be as many as KerasHub publishes. What a method
adds is what `keras_svdtune.estimate` says of it.
"""

import math
from typing import Any

import common
import keras
import shapes
from rich.progress import track

import keras_svdtune

LARGE = [
    *("gemma_2b", "gemma_7b", "gemma2_9b"),
    *("gemma3_27b_text", "llama3_8b", "llama3_70b"),
]
A_LAYER = 250  # as in the files of Gemma 3 270M


def without_values(name: str) -> keras.Model:
    """The backbone; no variable of it has a value."""
    with keras.StatelessScope(initialize_variables=False):
        backbone = shapes.build(name)
    # Or else Keras gives them values when it leaves the next scope.
    keras.utils.clear_session()
    published = shapes.published_parameters(name)
    if published not in (None, backbone.count_params()):
        raise SystemExit(
            f"{name} has {backbone.count_params():,} parameters here; KerasHub "
            f"publishes {published:,}."
        )
    return backbone


def figures(backbone: keras.Model, method: Any) -> dict[str, int]:
    """What a method adds to a model."""
    cost = keras_svdtune.estimate(backbone, method)
    saved = sum(
        math.prod(weight.shape)
        for layer in cost.layers
        for weight in method.weights(layer.matrix)
        if weight.saved
    )
    return {
        "trainable": cost.trainable,
        "frozen_bytes": cost.bytes - 4 * cost.trainable,
        "optimizer_bytes": 8 * cost.trainable,
        "file_bytes": 4 * saved + A_LAYER * len(cost.layers),
    }


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Scale, on paper",
        "",
        "Written by `python tests/benchmarks/scale.py`: KerasHub's backbones "
        "in bfloat16, without values, and what `estimate` says of them, rank "
        f"{result['rank']}, every linear layer of every block. Of the file: "
        f"its numbers, and {A_LAYER} bytes a layer for names and fingerprints.",
    ]
    for name, model in result["models"].items():
        lines += [
            "",
            f"## {name}: {model['parameters']:,} parameters",
            "",
            "| | trainable | extra frozen, MB | Adam, MB | file, MB |",
            "|---|---:|---:|---:|---:|",
        ]
        for title, row in model["results"].items():
            sizes = ("frozen_bytes", "optimizer_bytes", "file_bytes")
            cells = (f"{row[size] / 1e6:,.2f}" for size in sizes)
            lines.append(
                f"| {title} | {row['trainable']:,} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0], LARGE)
    options = parser.parse_args()
    methods, _ = common.methods_for(options.methods, options.rank)
    result: dict[str, Any] = {"rank": options.rank, "models": {}}
    for name in track(options.model, "Counting"):
        backbone = without_values(name)
        result["models"][name] = {
            "parameters": backbone.count_params(),
            "results": {
                common.label_of(spec, method): figures(backbone, method)
                for spec, method in methods.items()
            },
        }
    result["machine"] = common.machine()
    page = markdown(result)
    print(page)
    common.write_json(options.results, "scale", result)
    (options.results / "scale.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
