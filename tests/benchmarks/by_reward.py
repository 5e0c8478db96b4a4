r"""The same number of steps by reward and by examples, on one task.

    python tests/benchmarks/by_reward.py --task pirate
    python tests/benchmarks/by_reward.py \
        --task names --rate-after 3e-4 --asked 96

The tasks are two of the study's. By reward, `train_policy` gets the questions
alone, and a reward of each answer: the share of its words that are pirate
speech, or 1 for the right name and 0 for another. By examples, `fit` gets the
right answers. A base model never answers like that by chance, and where no
answer is better than another there is nothing to learn from: so both go on from
an SVF that has seen a few examples (`--warm-up`), with Adam. The table has the
mean reward of the greedy answers to held-out questions, and the held-out loss
of an answer token.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import keras
import numpy as np
import rich.box
import study_tasks
from rich.table import Table

from keras_svdtune import train_policy
from keras_svdtune.demo import chat, fit, pirate, show, train
from keras_svdtune.demo.weights.weights import MODELS, load_model


@dataclasses.dataclass(frozen=True)
class Job:
    """What is learnt, and how an answer is rewarded.

    Attributes:
        learnt, held_out: pairs.
        reward: of an answer, given the right one.
        tokens: of an answer, at most.
    """

    learnt: list[pirate.Pair]
    held_out: list[pirate.Pair]
    reward: Callable[[str, str], float]
    tokens: int


def job_of(task: str, seed: int) -> Job:
    """The task of this name."""
    if task == "pirate":
        pairs = pirate.pirate_pairs(seed)
        return Job(
            *pirate.split(pairs, train.HELD_OUT, seed),
            reward=lambda said, _: pirate.dialect_score([said]),
            tokens=16,
        )
    return Job(
        *study_tasks.names(),
        reward=lambda said, right: float(said.strip() == right),
        tokens=8,
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=[*MODELS], default="smollm2_135m")
    parser.add_argument("--task", choices=["names", "pirate"], default="pirate")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--warm-up", type=int, default=24, help="steps by examples before both"
    )
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument(
        "--rate-after", type=float, help="of the steps by reward and after it"
    )
    parser.add_argument("--answers", type=int, default=4, help="a prompt")
    parser.add_argument("--kl", type=float, default=0.05)
    parser.add_argument("--asked", type=int, default=16, help="held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results"
    )
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    task = load_model(options.model)
    style = chat.format_for(task, options.model)
    job = job_of(options.task, options.seed)
    length = study_tasks.LENGTH[options.task]
    arrays = chat.encode(task, style, job.learnt, length)
    test = chat.encode(task, style, job.held_out, length)
    asked = job.held_out[: options.asked]
    rights = {style.prompt(x.question): x.answer for x in job.learnt}

    def measured(start: float) -> dict[str, float]:
        seconds = time.perf_counter() - start
        said = chat.answers(task, style, [x.question for x in asked])
        rewards = [
            job.reward(x, pair.answer)
            for x, pair in zip(said, asked, strict=True)
        ]
        return {
            "reward": float(np.mean(rewards)),
            "loss": fit.evaluate(task, test),
            "seconds": seconds,
        }

    def prepare(rate: float) -> None:
        task.compile(
            keras.optimizers.Adam(rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[],
            sampler="greedy",
        )

    show.step("Measuring the base model")
    task.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        sampler="greedy",
    )
    rows = {"base model": measured(time.perf_counter())}

    show.step(f"Training {options.warm_up} steps by examples")
    task.backbone.enable_svf()
    prepare(options.rate)
    start = time.perf_counter()
    fit.train(task, arrays, options.warm_up, options.seed)
    rows["the start"] = measured(start)
    folder = tempfile.TemporaryDirectory()
    begun = Path(folder.name) / "begun.safetensors"
    task.backbone.save_adapter(begun)

    show.step(f"Training {options.steps} steps by reward")
    prepare(options.rate_after or options.rate)
    order = np.random.default_rng(options.seed).permutation(len(job.learnt))
    order = order[: options.steps * fit.BATCH]
    curve: list[dict[str, float]] = []
    start = time.perf_counter()
    train_policy(
        task,
        [style.prompt(job.learnt[i].question) for i in order],
        lambda prompt, answer: job.reward(answer, rights[prompt]),
        answers=options.answers,
        kl=options.kl,
        batch_size=fit.BATCH,
        max_new_tokens=job.tokens,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda _, logs: curve.append(logs)
            )
        ],
        seed=options.seed,
    )
    rows["by reward"] = measured(start)

    show.step(f"Training {options.steps} steps by examples")
    task.backbone.load_adapter(begun)
    folder.cleanup()
    prepare(options.rate_after or options.rate)
    start = time.perf_counter()
    fit.train(task, arrays, options.steps, options.seed + 1)
    rows["by examples"] = measured(start)

    machine["load_at_end"] = common.load()
    common.show(
        table_of(rows, f"SVF on {options.model}: {options.task}", machine)
    )
    common.write_json(
        options.results,
        f"by_reward_{options.task}_{options.model}",
        {
            "machine": machine,
            "settings": {
                k: x for k, x in vars(options).items() if k != "results"
            },
            "ceiling": float(
                np.mean([job.reward(x.answer, x.answer) for x in asked])
            ),
            "rows": rows,
            "steps_by_reward": curve,
        },
    )


def table_of(
    rows: dict[str, dict[str, float]], title: str, machine: dict[str, Any]
) -> Table:
    """The scores as a table."""
    table = Table(
        title=title,
        caption=common.describe(machine),
        box=rich.box.HEAVY_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in ("reward", "held-out loss", "seconds to train"):
        table.add_column(name, justify="right")
    for label, found in rows.items():
        table.add_row(
            label,
            f"{found['reward']:.1%}",
            f"{found['loss']:.3f}",
            f"{found['seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
