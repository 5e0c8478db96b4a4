"""Fine-tuning in two processes, as on two hosts, against one process.

    python tests/benchmarks/two_processes.py

Starts two processes on this machine, each with four of JAX's CPU devices,
joined by `keras.distribution.initialize` into one mesh of (2, 4); and one
process with eight. In each a tiny Gemma is enabled, trained, saved and loaded,
by the same code. The losses must be equal to 1e-5, and the adapter files,
written by the first process alone, must load into the other program to the bit.

On real hosts, each runs the same program, with the address of the first host
and its own number (on a TPU slice JAX finds these itself: pass none of them):

    keras.distribution.initialize("10.0.0.1:1234,10.0.0.2:1234", 2, host)

and gives `fit` its own part of each batch (or a batched `tf.data.Dataset` of
all, without `auto_shard_dataset=False`). Enabling, saving and loading are
called in all processes; `save_adapter` writes in the first, which is also the
one that `load_adapter` reads in.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MESH = (2, 4)
METHODS = {
    "svf": {},
    "svft": {},
    "lora": {"rank": 4},
    "pissa": {"rank": 4},
    "milora": {"rank": 4},
    "lora_xs": {"rank": 4},
    "dora": {"rank": 4},
    "adalora": {"rank": 4},
}
STEPS, BATCH, LENGTH, VOCABULARY = 6, 8, 12, 64


def main() -> None:
    """Runs the command, or one of the processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(METHODS)
    )
    parser.add_argument("--results", type=Path, help="folder for a JSON file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        address, count, index = options.worker
        work(options, address, int(count), int(index))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = compare(options.methods, Path(folder))
    print(json.dumps(results, indent=1))
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / "two_processes.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Written: {path}")


def compare(methods: list[str], folder: Path) -> dict[str, Any]:
    """Both programs, and how far apart they are.

    The second one loads what the first one saved, and the other way round.
    """
    start(methods, folder, 1)
    two = start(methods, folder, 2)
    # Once more: now the files of the two processes are there.
    one = start(methods, folder, 1)
    results = {}
    for name in methods:
        difference = max(
            abs(a - b)
            for a, b in zip(
                one[name]["losses"], two[name]["losses"], strict=True
            )
        )
        assert difference < 1e-5, f"{name}: the losses differ by {difference}"
        assert one[name]["losses"][-1] < one[name]["losses"][0]
        for program in (one, two):
            assert program[name]["came_back"], f"{name}: another file"
        results[name] = {
            "losses_of_one_process": one[name]["losses"],
            "losses_of_two_processes": two[name]["losses"],
            "largest_difference": difference,
        }
    return results


def start(methods: list[str], folder: Path, count: int) -> dict[str, Any]:
    """Runs one program of `count` processes, and returns its results."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # A group of its own for each, so that none outlives this command.
    running = [
        subprocess.Popen(
            [
                *(sys.executable, __file__, "--folder", str(folder)),
                *("--methods", *methods),
                *("--worker", address, str(count), str(index)),
            ],
            env={**os.environ, **environment(count)},
        )
        for index in range(count)
    ]
    try:
        deadline = time.monotonic() + 900
        codes = [p.wait(max(deadline - time.monotonic(), 1)) for p in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * count, f"{count} processes ended with {codes}"
    return json.loads((folder / f"{count}.json").read_text())


def environment(count: int) -> dict[str, str]:
    """What must be set before JAX is imported."""
    devices = MESH[0] * MESH[1] // count
    return {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "KERAS_SVDTUNE_CACHE": "0",
    }


def work(options: Any, address: str, count: int, index: int) -> None:
    """What each process does: a program as a user would write it."""
    import jax
    import keras

    if count > 1:
        keras.distribution.initialize(address, count, index)
    keras.config.disable_interactive_logging()
    assert jax.device_count() == 8 and jax.process_count() == count

    import keras_svdtune

    mesh = keras.distribution.DeviceMesh(
        MESH, ("batch", "model"), keras.distribution.list_devices("cpu")
    )
    results = {}
    for name in options.methods:
        method = keras_svdtune.METHODS[name](**METHODS[name])
        model = make_model(mesh, method if name == "svf" else None)
        if name != "svf":
            model.backbone.enable_adapter(method)
        results[name] = train(model, options.folder, name, count, index)
        if name == "svf":
            check_error(model, method, index)
    if index == 0:
        file = options.folder / f"{count}.json"
        file.write_text(json.dumps(results))


def make_model(mesh: Any, method: Any) -> Any:
    """A tiny Gemma; with its adapter if that is to be made in the scope."""
    import keras
    import keras_hub

    layout_map = keras_hub.models.GemmaBackbone.get_layout_map(mesh)
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map,
        batch_dim_name="batch",
        auto_shard_dataset=False,  # `data` gives each process its part
    )
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        hidden_dim=32,
        intermediate_dim=64,
    )
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    if method is not None:
        backbone.enable_adapter(method)
    return model


def data(index: int, count: int) -> tuple[Any, Any]:
    """This process's part of the batch."""
    import numpy as np

    random = np.random.RandomState(0)
    tokens = random.randint(1, VOCABULARY, (BATCH, LENGTH))
    part = BATCH // count
    tokens = tokens[index * part : (index + 1) * part]
    mask = np.ones_like(tokens)
    return {"token_ids": tokens, "padding_mask": mask}, np.roll(tokens, -1, 1)


def train(
    model: Any, folder: Path, name: str, count: int, index: int
) -> dict[str, Any]:
    """Trains, saves, loads what is there, and takes the adapter away."""
    import keras

    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = data(index, count)
    history = model.fit(
        x, y, batch_size=len(y), epochs=STEPS, shuffle=False, verbose=0
    )
    ours = folder / f"{name} {count}.safetensors"
    model.backbone.save_adapter(ours)
    # The other program's file too: its base is this one's, so it must load.
    theirs = folder / f"{name} {3 - count}.safetensors"
    came_back = all(
        comes_back(model.backbone, path)
        for path in (theirs, ours)
        if path.exists()
    )
    model.backbone.merge_adapter()
    return {"losses": history.history["loss"], "came_back": came_back}


def comes_back(backbone: Any, path: Path) -> bool:
    """Whether a file that is loaded and saved is the same to the bit."""
    import numpy as np
    from safetensors.numpy import load_file

    backbone.remove_adapter()
    backbone.load_adapter(path)
    again = path.with_name("again.safetensors")
    backbone.save_adapter(again)
    before, after = load_file(path), load_file(again)
    # Others than an adapter's arrays are sums, which may be rounded.
    return all(
        np.array_equal(value, after[key])
        for key, value in before.items()
        if "/" in key
    )


def check_error(model: Any, method: Any, index: int) -> None:
    """An error in one process's layer is raised in all, and none waits."""
    import numpy as np

    kernel = model.backbone.get_layer("decoder_block_0").gating_ffw.kernel
    kernel.assign(np.full(kernel.shape, np.inf, "float32"))
    try:
        model.backbone.enable_adapter(method)
    except ValueError as error:
        assert "ffw_gating" in str(error), error
    else:
        raise AssertionError(f"no error in process {index}")


if __name__ == "__main__":
    main()
