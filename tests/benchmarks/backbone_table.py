"""What each method reaches and trains, on every backbone of KerasHub.

    KERAS_BACKEND=jax python tests/benchmarks/backbone_table.py

Two tables in `results/backbones.md`. The first has the tiny configurations of
`tests/tiny_backbones.py`, which the tests run on; the second a few models of
full size, built without memory for their weights (in a process of its own, on
torch's "meta" device, for which torch must be installed) and checked against
the number of parameters that KerasHub states for its preset. Nothing is
decomposed: the figures are those of `estimate`.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
from rich.progress import track

import keras_svdtune
from keras_svdtune.hosts.host import kernel_of, view_of
from keras_svdtune.model.targets import find_targets

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_census import NO_MATRIX, depthwise_kernels  # noqa: E402
from tiny_backbones import TINY, exported  # noqa: E402

RANK = 8
# The backbone, the preset with its settings, and the settings.
FULL_SIZE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT base": (
        "BertBackbone",
        "bert_base_en_uncased",
        {
            "vocabulary_size": 30522,
            "num_layers": 12,
            "num_heads": 12,
            "hidden_dim": 768,
            "intermediate_dim": 3072,
        },
    ),
    "Gemma 2B": (
        "GemmaBackbone",
        "gemma_2b_en",
        {
            "vocabulary_size": 256000,
            "num_layers": 18,
            "num_query_heads": 8,
            "num_key_value_heads": 1,
            "hidden_dim": 2048,
            "intermediate_dim": 32768,
            "head_dim": 256,
        },
    ),
    "Gemma 2 9B": (
        "GemmaBackbone",
        "gemma2_9b_en",
        {
            "vocabulary_size": 256000,
            "num_layers": 42,
            "num_query_heads": 16,
            "num_key_value_heads": 8,
            "hidden_dim": 3584,
            "intermediate_dim": 28672,
            "head_dim": 256,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
        },
    ),
    "Gemma 3 1B": (
        "Gemma3Backbone",
        "gemma3_1b",
        {
            "vocabulary_size": 262144,
            "image_size": None,
            "num_layers": 26,
            "num_query_heads": 4,
            "num_key_value_heads": 1,
            "hidden_dim": 1152,
            "intermediate_dim": 6912,
            "head_dim": 256,
            "use_query_key_norm": True,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
        },
    ),
    "Llama 3 8B": (
        "Llama3Backbone",
        "llama3_8b_en",
        {
            "vocabulary_size": 128256,
            "num_layers": 32,
            "num_query_heads": 32,
            "num_key_value_heads": 8,
            "hidden_dim": 4096,
            "intermediate_dim": 14336,
        },
    ),
    "Mixtral 8x7B": (
        "MixtralBackbone",
        "mixtral_8_7b_en",
        {
            "vocabulary_size": 32000,
            "num_layers": 32,
            "num_query_heads": 32,
            "num_key_value_heads": 8,
            "hidden_dim": 4096,
            "intermediate_dim": 14336,
            "num_experts": 8,
            "top_k": 2,
        },
    ),
    "ResNet-50": (
        "ResNetBackbone",
        "resnet_50_imagenet",
        {
            "input_conv_filters": [64],
            "input_conv_kernel_sizes": [7],
            "stackwise_num_filters": [64, 128, 256, 512],
            "stackwise_num_blocks": [3, 4, 6, 3],
            "stackwise_num_strides": [1, 2, 2, 2],
            "block_type": "bottleneck_block",
        },
    ),
    "ViT-B/16": (
        "ViTBackbone",
        "vit_base_patch16_224_imagenet",
        {
            "image_shape": (224, 224, 3),
            "patch_size": 16,
            "num_layers": 12,
            "num_heads": 12,
            "hidden_dim": 768,
            "mlp_dim": 3072,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a method can reach in a model.

    Attributes:
        parameters: int, of the model.
        matrices: int, how many; one for each expert of a bank.
        share: of the numbers in all weights that inputs are multiplied by.
        depthwise: names of weights that are multiplied but no matrices.
        trained: parameters that each method trains.
    """

    parameters: int
    matrices: int
    share: float
    depthwise: tuple[str, ...]
    trained: dict[str, int]


def reach(model: Any) -> Reach:
    """Counts them on a built model."""
    with warnings.catch_warnings():
        # Depthwise kernels, and AdaLoRA's banks, are left out: see the table.
        warnings.simplefilter("ignore")
        targets = find_targets(model)
        trained = {
            name: trained_by(cls, model, targets)
            for name, cls in keras_svdtune.METHODS.items()
        }
    reached = {id(kernel_of(x)): kernel_of(x) for x in targets.values()}
    depthwise_ids = depthwise_kernels(model)
    multiplied, depthwise = dict(reached), set()
    for v in model.trainable_variables:
        if id(v) in depthwise_ids or v.path.endswith(
            ("depthwise_kernel", "conv1d_kernel")
        ):
            multiplied[id(v)] = v
            depthwise.add(re.sub(r"[\d_]*\d[a-z]?_?", "*", name_of(v)))
        elif len([n for n in v.shape if n > 1]) > 1 and not v.path.split("/")[
            -1
        ].endswith(NO_MATRIX):
            multiplied[id(v)] = v
    return Reach(
        parameters=model.count_params(),
        matrices=sum(math.prod(view_of(x).batch) for x in targets.values()),
        share=size_of(reached.values()) / size_of(multiplied.values()),
        depthwise=tuple(sorted(depthwise)),
        trained=trained,
    )


def name_of(variable: Any) -> str:
    """The last two names of its path: that of its layer, and its own."""
    return "/".join(variable.path.split("/")[-2:])


def size_of(variables: Any) -> int:
    """How many numbers they hold."""
    return sum(math.prod(v.shape) for v in variables)


def trained_by(cls: Any, model: Any, targets: dict[str, Any]) -> int:
    """Parameters that a method trains, by `estimate`.

    Matrices that are too small for its settings get settings of their own, so
    `estimate` is asked about all matrices with the same settings at a time.
    """
    groups: dict[keras_svdtune.Method, list[str]] = {}
    for path, layer in targets.items():
        view = view_of(layer)
        if cls.banks or not view.batch:
            method = method_for(cls, min(view.shape))
            # In brackets it is no name, which other layers may have too.
            groups.setdefault(method, []).append(f"(?:{re.escape(path)})")
    return sum(
        keras_svdtune.estimate(model, method, paths).trainable
        for method, paths in groups.items()
    )


def method_for(cls: Any, n: int) -> keras_svdtune.Method:
    """The method for matrices of min(in, out) = n."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in ("rank", "initial_rank"):
            settings[field.name] = min(RANK, n)
        elif field.name == "off_diagonals":
            settings[field.name] = min(field.default, n - 1)
            if n == 1:
                settings = {"pattern": "plain"}
    return cls(**settings)


def full_size(name: str) -> Any:
    """The model without memory for its weights."""
    cls_name, preset, settings = FULL_SIZE[name]
    cls = getattr(keras_hub.models, cls_name)
    with keras.device("meta"):
        model = cls(**settings)
    stated = cls.presets[preset]["metadata"]["params"]
    if model.count_params() != stated:
        raise SystemExit(
            f"{name} has {model.count_params():,} parameters here, but "
            f"{stated:,} as the preset '{preset}'."
        )
    return model


def table_of(rows: dict[str, Reach], sized: bool) -> list[str]:
    """A table in Markdown."""
    titles = [cls.title for cls in keras_svdtune.METHODS.values()]
    columns = ["", *(["parameters"] if sized else []), "matrices", "share"]
    columns += [*titles, "multiplied, but no matrix"]
    found = ["| " + " | ".join(columns) + " |"]
    found += ["|---|" + "---:|" * (len(columns) - 2) + "---|"]
    for name, r in rows.items():
        # 99.99 % is not 100 %.
        share = math.floor(1000 * r.share) / 10
        cells = [name, *([f"{r.parameters:,}"] if sized else [])]
        cells += [f"{r.matrices:,}", f"{share:g} %"]
        cells += [f"{r.trained[x]:,}" for x in keras_svdtune.METHODS]
        cells += [", ".join(f"`{x}`" for x in r.depthwise)]
        found.append("| " + " | ".join(cells) + " |")
    return found


def text_of(tiny: dict[str, Reach], full: dict[str, Reach]) -> str:
    """The file."""
    head = f"""\
<!-- Do not edit. Written by
`KERAS_BACKEND=jax python tests/benchmarks/backbone_table.py`
with keras {keras.version()} and keras-hub {keras_hub.version()}. -->

# What each method reaches and trains

`enable_*` with its default targets. *Matrices* counts each expert of a bank.
*Share* is that of the reached matrices in the numbers of all weights that
inputs are multiplied by; what is looked up or added (embeddings, biases,
tables of positions) is not among them. The last column names what makes up
the rest: depthwise kernels, each of whose outputs reads one channel. Then the
parameters that each method trains: SVFT with its default pattern, others with
rank {RANK}, or less of either where the matrix is too small for that. AdaLoRA
leaves banks out, and starts from that rank here (by default: 12).
"""
    parts = [head, "## Models of full size\n", *table_of(full, True)]
    parts += ["\n## The tiny configurations that the tests run on\n"]
    parts += table_of(tiny, False)
    return "\n".join(parts) + "\n"


def full_size_rows(only: list[str] | None) -> dict[str, Reach]:
    """The second table's rows, from a process with torch as backend."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--full-size", str(path)]
        command += ["--only", *only] if only is not None else []
        environment = {**os.environ, "KERAS_BACKEND": "torch"}
        subprocess.run(command, check=True, env=environment)
        found = json.loads(path.read_text())
    return {name: Reach(**values) for name, values in found.items()}


def rows_of(
    builders: dict[str, Callable[[], Any]], only: list[str] | None
) -> dict[str, Reach]:
    """A row for each model, or for those that are wanted."""
    chosen = [x for x in builders if only is None or x in only]
    return {x: reach(builders[x]()) for x in track(chosen, "Counting")}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", help="these models alone")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results"
    )
    parser.add_argument("--full-size", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full_size is not None:
        models = {x: lambda x=x: full_size(x) for x in FULL_SIZE}
        rows = rows_of(models, options.only)
        values = {name: dataclasses.asdict(r) for name, r in rows.items()}
        options.full_size.write_text(json.dumps(values))
        return
    # Some classes have two names.
    unique = {cls: name for name, cls in exported().items()}.values()
    full = full_size_rows(options.only)
    tiny = rows_of(
        {x: lambda x=x: TINY[x]()[0] for x in sorted(unique)}, options.only
    )
    path = options.results / "backbones.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(tiny, full), encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
