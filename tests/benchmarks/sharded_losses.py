"""The losses of a real model over eight devices, against one device.

    python tests/benchmarks/sharded_losses.py
    python tests/benchmarks/sharded_losses.py --model smollm2_135m --mesh 1,8

For every method: the same weights, the same sentences, the same optimizer, 20
steps of `fit`; once split over eight virtual devices of the CPU by
`svdtune_layout_map`, once on one of them. The losses must agree to 1e-4. A
method that the written JSON has already is not run again.
"""

import contextlib
import json
import os
import time
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    "--xla_force_host_platform_device_count=8"
)

import common
import keras
import numpy as np
from rich.table import Table

import keras_svdtune
from keras_svdtune.demo import chat, fit, pirate
from keras_svdtune.demo.weights.weights import MODELS, load_model

STEPS, TOLERANCE = 20, 1e-4


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="2,4", help="batch,model")
    parser.add_argument("--batch", type=int, default=4, help="sentences")
    parser.add_argument("--length", type=int, default=32, help="tokens each")
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    shape = tuple(int(x) for x in options.mesh.split(","))
    methods, left_out = common.methods_for(options.methods, options.rank)
    for reason in left_out.values():
        print("Left out:", reason)

    mesh = "x".join(map(str, shape))
    batch, length = options.batch, options.length
    name = f"sharded_losses_{options.model}_{mesh}_{batch}x{length}"
    path = options.results / f"{name}.json"
    written: dict[str, Any] = {"rows": {}}
    if path.exists():
        written = json.loads(path.read_text(encoding="utf-8"))
    written |= {"steps": STEPS, "batch": batch, "length": length}
    # In this order: the model of one device is made outside any scope.
    one = load_task(options.model)
    data = sentences(one, options.model, batch, length)
    many = distribution(one.backbone, shape)
    with many.scope():
        split = load_task(options.model)
    for key, method in methods.items():
        label = common.label_of(key, method)
        if label in written["rows"]:
            continue
        start = time.perf_counter()
        found = train(split, method, data, many.scope())
        middle = time.perf_counter()
        expected = train(one, method, data)
        difference = float(np.max(np.abs(np.subtract(found, expected))))
        assert difference < TOLERANCE, f"{label}: {difference}"
        assert expected[-1] < expected[0], f"{label}: {expected}"
        written["rows"][label] = {
            "learning_rate": method.suggested_learning_rate,
            "losses_of_one_device": expected,
            "losses_of_eight": found,
            "largest_difference": difference,
            "seconds_of_eight": middle - start,
            "seconds_of_one": time.perf_counter() - middle,
        }
        written["machine"] = common.machine()
        common.write_json(options.results, name, written)
    show(options.model, shape, written["rows"])


def load_task(name: str) -> keras.Model:
    """The causal language model: real, or the tiny one of the benchmarks."""
    if name in MODELS:
        return load_model(name)
    import keras_hub

    keras.utils.set_random_seed(0)
    return keras_hub.models.GemmaCausalLM(
        backbone=common.load_backbone(name), preprocessor=None
    )


def sentences(task: Any, name: str, batch: int, length: int) -> Any:
    """A batch of a pirate's answers; random tokens for the tiny model.

    Returns:
        The inputs, the targets and their weights.
    """
    if name in MODELS:
        style = chat.format_for(task, name)
        data = chat.encode(task, style, pirate.pirate_pairs(), length)
        if len(data) < batch:
            raise SystemExit(f"Only {len(data)} answers fit: use --length 32")
        data = data.rows(np.arange(batch))
        return data.x, data.y, data.weight
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 64, (batch, length)).astype("int32")
    ones = np.ones_like(ids)
    x = {"token_ids": ids, "padding_mask": ones}
    return x, np.roll(ids, -1, axis=1), ones.astype("float32")


def distribution(
    backbone: keras.Model, shape: tuple[int, ...]
) -> keras.distribution.ModelParallel:
    """Our layout map for the model, on a mesh of the CPU's devices."""
    mesh = keras.distribution.DeviceMesh(
        shape, ("batch", "model"), keras.distribution.list_devices("cpu")
    )
    return keras.distribution.ModelParallel(
        layout_map=keras_svdtune.svdtune_layout_map(backbone, mesh),
        batch_dim_name="batch",
    )


def train(
    task: Any,
    method: keras_svdtune.Method,
    data: Any,
    scope: Any = None,
) -> list[float]:
    """The losses of `STEPS` steps; the model is given back as it was."""
    keras.utils.set_random_seed(0)
    with scope or contextlib.nullcontext():
        task.backbone.enable_adapter(method)
        task.compile(
            optimizer=keras.optimizers.Adam(method.suggested_learning_rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[],
        )
        x, y, weights = data
        with fit.raw_tokens(task):
            losses = task.fit(
                *(x, y),
                sample_weight=weights,
                batch_size=len(y),
                epochs=STEPS,
                shuffle=False,
                verbose=0,
            ).history["loss"]
        task.backbone.remove_adapter()
    return losses


def show(name: str, shape: tuple[int, ...], rows: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table(title=f"{name} on {shape}, {STEPS} steps, against one device")
    for column in ("method", "first loss", "last loss", "largest difference"):
        table.add_column(
            column, justify="left" if not table.columns else "right"
        )
    for label, row in rows.items():
        losses = row["losses_of_one_device"]
        table.add_row(
            label, f"{losses[0]:.4f}", f"{losses[-1]:.4f}",
            f"{row['largest_difference']:.1e}",
        )  # fmt: skip
    common.show(table)


if __name__ == "__main__":
    main()
