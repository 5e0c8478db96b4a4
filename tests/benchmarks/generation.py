"""Tokens a second of `generate`, with adapters on, merged, and without.

    python tests/benchmarks/generation.py --model smollm2_135m

The answers are greedy and of one length, whatever is generated. Every candidate
is a model of its own, with a prompt for each row of the batch; they take turns,
and the table shows medians over the rounds. `of base` is the ratio of seconds
to the base model's in the same run. With `--peft` (on torch) PEFT's LoRA on the
same weights in transformers is measured too, with its own base.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import keras
import numpy as np
from rich.progress import track
from rich.table import Table

import keras_svdtune
from keras_svdtune.demo.weights import weights

BASE, MERGED, LORA = "base model", "SVF, merged", "Keras enable_lora"


def perturb(model: keras.Model, seed: int = 0) -> None:
    """Gives the trainable weights of an adapter values that do something."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = rng.standard_normal(variable.shape).astype("float32")
        variable.assign(variable + 0.01 * noise)


def candidates(
    name: str, methods: dict[str, keras_svdtune.Method], rank: int
) -> dict[str, Any]:
    """A model for each candidate, by its label."""

    def load() -> Any:
        task = weights.load_model(name)
        task.compile(sampler="greedy")
        return task

    found = {BASE: load(), MERGED: load()}
    found[MERGED].backbone.enable_svf()
    perturb(found[MERGED])
    for spec, method in track(methods.items(), "Enabling"):
        task = load()
        task.backbone.enable_adapter(method)
        perturb(task)
        found[common.label_of(spec, method)] = task
    lora = load()
    lora.backbone.enable_lora(rank)
    perturb(lora)
    found[f"{LORA}({rank}), query and value"] = lora
    return found


def generating(
    task: Any, prompt: np.ndarray, length: int
) -> Callable[[], float]:
    """A function that generates, and gives the seconds."""
    # With no end token, every answer has the same length.
    task.preprocessor = None
    inputs = {
        "token_ids": np.pad(prompt, ((0, 0), (0, length))),
        "padding_mask": np.pad(np.ones_like(prompt), ((0, 0), (0, length))),
    }

    def run() -> float:
        start = time.perf_counter()
        found = task.generate(inputs, stop_token_ids=None)
        np.asarray(found["token_ids"])
        return time.perf_counter() - start

    return run


def measure(
    runs: dict[str, Callable[[], float]], tasks: dict[str, Any], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every round; the first of all, which compiles, is left out."""
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for number in track(range(rounds + 1), "Rounds"):
        for label, run in runs.items():
            if label == MERGED:
                with keras_svdtune.adapter_merged(tasks[label].backbone):
                    found = run()
            else:
                found = run()
            if number:
                seconds[label].append(found)
    return seconds


def peft_runs(
    name: str, rank: int, prompt: np.ndarray, length: int
) -> dict[str, Callable[[], float]]:
    """The base in transformers, and PEFT's LoRA on it."""
    import tempfile
    from pathlib import Path

    import peft
    import torch
    import transformers

    from keras_svdtune.demo.weights import gguf_to_hf

    with tempfile.TemporaryDirectory() as folder:
        gguf_to_hf.write_hf_folder(
            weights.cache_folder() / name / "model.gguf", Path(folder)
        )
        models = [
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32
            ).eval()
            for _ in range(2)
        ]
    every = "all-linear"
    models[1] = peft.get_peft_model(
        models[1], peft.LoraConfig(r=rank, target_modules=every)
    ).eval()
    ids = torch.from_numpy(prompt.astype("int64"))

    def timed(model: Any) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=length,
                    max_new_tokens=length,
                )
            return time.perf_counter() - start

        return run

    return {
        "transformers": timed(models[0]),
        f"PEFT LoRA (rank {rank})": timed(models[1]),
    }


def table_of(results: dict[str, Any]) -> Table:
    """The results as a table."""
    table = Table(title="generate")
    for column in ("", "tokens a second", "of base"):
        table.add_column(column, justify="left" if not column else "right")
    for label, row in results.items():
        table.add_row(
            label, f"{row['tokens_per_second']:,.1f}", f"{row['of_base']:.2f}"
        )
    return table


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0])
    parser.set_defaults(model="smollm2_135m")
    parser.add_argument("--batch", type=int, default=1, help="prompts")
    parser.add_argument("--prompt", type=int, default=16, help="its tokens")
    parser.add_argument("--tokens", type=int, default=48, help="new ones")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peft", action="store_true", help="on torch")
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    methods, left_out = common.methods_for(options.methods, options.rank)
    if left_out:
        raise SystemExit(str(left_out))
    tasks = candidates(options.model, methods, options.rank)
    prompt = np.random.default_rng(0).integers(
        100, 1000, (options.batch, options.prompt), "int32"
    )
    runs = {k: generating(v, prompt, options.tokens) for k, v in tasks.items()}
    if options.peft:
        runs |= peft_runs(options.model, options.rank, prompt, options.tokens)
    seconds = measure(runs, tasks, options.rounds)
    machine["load_at_end"] = common.load()
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    tokens = options.batch * options.tokens
    base = "transformers"
    results = {
        label: {
            "tokens_per_second": tokens / medians[label],
            "of_base": medians[label]
            / medians[BASE if label in tasks else base],
            "all_seconds": [round(x, 4) for x in seconds[label]],
        }
        for label in runs
    }
    common.show(table_of(results))
    print(common.describe(machine))
    backend = keras.backend.backend()
    common.write_json(
        options.results,
        f"generation_{options.model}_{backend}",
        {
            "model": options.model,
            "batch": options.batch,
            "prompt": options.prompt,
            "tokens": options.tokens,
            "machine": machine,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
