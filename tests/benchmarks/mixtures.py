"""What a mixture of experts is worth on a task that none of them has learnt.

    python tests/benchmarks/mixtures.py --task letters
    python tests/benchmarks/mixtures.py --task speeches --asked 44

Three SVF adapters are trained: on a pirate's small talk, on how often a letter
is in a word (reasoning-gym), and on speeches, a sentence and the next. The task
is how often a letter is in three words, or a sentence of a speech and the next
one as a pirate would say it. `search_mixture` gets a few examples of it, of
which it holds out a third: by gradient with one weight for each expert, by
gradient with one for each expert and layer, and by the cross-entropy method,
for a score that has no gradient. Every row is measured on these examples and on
others, which no search has seen.
"""

import argparse
import collections
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import keras
import numpy as np
import rich.box
from rich.table import Table

import keras_svdtune
from keras_svdtune import search_mixture
from keras_svdtune.demo import chat, fit, pirate, show
from keras_svdtune.demo.optional import require
from keras_svdtune.demo.speeches import speech_pairs
from keras_svdtune.demo.weights.weights import MODELS, load_model
from keras_svdtune.experts.language import a_third

LENGTH = {"pirate": 40, "letters": 32, "speeches": 40}  # tokens
HELD_OUT = 64  # pairs of an expert's task that are not learnt


def letters(words: int, count: int, seed: int) -> list[pirate.Pair]:
    """How often a letter is in some words; no question occurs twice."""
    made = require("reasoning_gym").create_dataset(
        "letter_counting",
        size=count,
        seed=seed,
        min_words=words,
        max_words=words,
    )
    found = {x["question"]: x["answer"] for x in made}
    return [pirate.Pair(q, a, a) for q, a in found.items()]


def experts() -> dict[str, list[pirate.Pair]]:
    """What each expert learns from."""
    tasks = {
        "pirate": pirate.pirate_pairs(0),
        "letters": letters(1, 1500, 0),
        "speeches": spoken(),
    }
    return {k: pirate.split(x, HELD_OUT, 0)[0] for k, x in tasks.items()}


def spoken() -> list[pirate.Pair]:
    """Sentences of speeches, and the next ones."""
    return [pirate.Pair(q, a, a) for q, a in speech_pairs()]


def exact(answer: str, right: str) -> float:
    """Whether an answer is the right one."""
    return float(answer.strip() == right)


def common_words(answer: str, right: str) -> float:
    """The words that two answers have in common, of all that are in them."""
    said, wanted = (set(pirate.words(x)) for x in (answer, right))
    return len(said & wanted) / max(len(said | wanted), 1)


@dataclasses.dataclass(frozen=True)
class Job:
    """The task that a mixture is looked for.

    Attributes:
        pairs: its examples, none of which an expert has seen.
        longest: tokens of an example.
        score: of an answer, for the cross-entropy method.
        tokens: of an answer that is scored, at most.
    """

    pairs: list[pirate.Pair]
    longest: int
    score: Callable[[str, str], float]
    tokens: int


def job_of(name: str, count: int, seed: int) -> Job:
    """The task of this name, with so many examples."""
    if name == "letters":
        return Job(letters(3, count, seed + 1), 36, exact, 3)
    unseen = pirate.split(spoken(), HELD_OUT, 0)[1]
    pairs = [
        pirate.Pair(x.question, x.plain, pirate.to_pirate(x.plain, i))
        for i, x in enumerate(unseen)
    ]
    short = [x for x in pairs if len(x.question + x.answer) < 160]
    return Job(short[:count], 64, common_words, 16)


def measured(
    task: Any, style: chat.ChatFormat, job: Job
) -> dict[str, np.ndarray]:
    """Measures a task by the model as it is set.

    Returns:
        Of each example the mean loss of an answer's token, and the score of
        the greedy answer. That is exact if all tokens are the likeliest, so
        for this score nothing is answered.
    """
    arrays = chat.encode(task, style, job.pairs, job.longest)
    assert len(arrays) == len(job.pairs), "a pair is too long"
    losses: list[float] = []
    scores: list[float] = []
    with fit.raw_tokens(task):
        for start in range(0, len(arrays), fit.BATCH):
            rows = arrays.rows(
                np.arange(start, min(start + fit.BATCH, len(arrays)))
            )
            logits = task.predict_on_batch(rows.x)
            loss = keras.ops.sparse_categorical_crossentropy(
                rows.y, logits, from_logits=True
            )
            loss = keras.ops.convert_to_numpy(loss) * rows.weight
            losses += (loss.sum(-1) / rows.weight.sum(-1)).tolist()
            wrong = (np.argmax(logits, -1) != rows.y) & (rows.weight > 0)
            scores += (~wrong.any(-1)).astype(float).tolist()
    if job.score is not exact:
        prompts = [style.prompt(x.question) for x in job.pairs]
        tokenizer = task.preprocessor.tokenizer
        longest = max(len(chat.ids(tokenizer, x)) for x in prompts)
        said = task.generate(
            prompts, max_length=longest + 1 + job.tokens, strip_prompt=True
        )
        scores = [
            job.score(x, pair.answer)
            for x, pair in zip(said, job.pairs, strict=True)
        ]
    return {"loss": np.array(losses), "score": np.array(scores)}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=[*MODELS], default="smollm2_135m")
    parser.add_argument(
        "--task", choices=["letters", "speeches"], default="letters"
    )
    parser.add_argument("--steps", type=int, default=40, help="an expert")
    parser.add_argument("--shots", type=int, default=12)
    parser.add_argument("--asked", type=int, default=96, help="other examples")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--cem-iterations", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--experts", type=Path, help="keeps them, or takes those of before"
    )
    common.add_results(parser)
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    task = load_model(options.model)
    style = chat.format_for(task, options.model)
    count = options.shots + options.asked
    job = job_of(options.task, count, options.seed)
    if len(job.pairs) != count:
        parser.error(f"there are only {len(job.pairs)} examples")
    shots = job.pairs[: options.shots]
    held = a_third(options.shots, options.seed)
    parts = {
        "shots": np.flatnonzero(~held),
        "held out": np.flatnonzero(held),
        "others": np.arange(options.shots, count),
    }
    rate = keras_svdtune.SVF().suggested_learning_rate
    for name, learnt in experts().items():
        file = options.experts and options.experts / f"{name}.safetensors"
        if file and file.exists():
            task.backbone.load_adapter(file, name=name)
            continue
        show.step(f"Training {name} on {len(learnt)} pairs")
        task.backbone.enable_svf(name=name)
        fit.prepare(task, rate, options.steps)
        arrays = chat.encode(task, style, learnt, LENGTH[name])
        fit.train(task, arrays, options.steps, options.seed)
        if file:
            options.experts.mkdir(parents=True, exist_ok=True)
            task.backbone.save_adapter(file, name=name)
    names = task.backbone.adapter_names()
    fit.prepare(task, rate, options.steps)
    rows: dict[str, Any] = {}

    def measure(label: str, seconds: float | None = None) -> None:
        show.step(f"Measuring {label}")
        found = measured(task, style, job)
        rows[label] = {"seconds": seconds} | {
            part: {k: x[index] for k, x in found.items()}
            for part, index in parts.items()
        }

    for label, choice in {
        "base model": None,
        **{f"{x} alone": x for x in names},
        "mean of the three": dict.fromkeys(names, 1 / len(names)),
    }.items():
        task.backbone.set_adapter(choice)
        measure(label)
    examples = [(style.prompt(x.question), x.answer) for x in shots]
    searches: dict[str, dict[str, Any]] = {
        "gradient": {"iterations": options.iterations},
        "gradient, per layer": {
            "iterations": options.iterations,
            "per_layer": True,
        },
        "CEM": {
            "iterations": options.cem_iterations,
            "score": job.score,
            "population": options.population,
            "max_new_tokens": job.tokens,
        },
    }
    for label, settings in searches.items():
        show.step(f"Searching: {label}")
        start = time.perf_counter()
        mixture = search_mixture(
            task,
            names,
            examples,
            learning_rate=options.rate,
            seed=options.seed,
            **settings,
        )
        seconds = time.perf_counter() - start
        show.step(str(mixture))
        mixture.add_to(task.backbone, "mixture")
        measure(label, seconds)
        task.backbone.delete_adapter("mixture")
        rows[label] |= {
            "weights": {
                k: x if isinstance(x, float) else [*x.values()]
                for k, x in mixture.weights.items()
            },
            "curve": [[x.score, x.held_out] for x in mixture.curve],
            "best": mixture.best,
        }
    machine["load_at_end"] = common.load()
    result = {
        "machine": machine,
        "settings": {
            k: x
            for k, x in vars(options).items()
            if k not in ("results", "experts")
        },
        "most frequent answer": {
            k: most_frequent([job.pairs[i] for i in index])
            for k, index in parts.items()
        },
        "rows": {label: summed_up(rows, label) for label in rows},
    }
    title = f"SVF on {options.model}: {options.task}, {job.score.__name__}"
    common.show(table_of(result, title))
    name = f"mixtures_{options.task}_{options.model}"
    common.write_json(options.results, name, result)


def most_frequent(pairs: list[pirate.Pair]) -> float:
    """The share of the most frequent answer: what a constant gets."""
    found = collections.Counter(x.answer for x in pairs)
    return found.most_common(1)[0][1] / len(pairs)


def summed_up(rows: dict[str, Any], label: str) -> dict[str, Any]:
    """Means of a row with their standard errors.

    `to_expert` is the difference in loss to the expert alone that is best on
    the examples which are searched and chosen by, example by example: that
    expert one could have had without any mixture.
    """
    row = rows[label]
    found = {k: x for k, x in row.items() if k not in PARTS}
    for part in PARTS:
        found[part] = {key: mean_and_error(x) for key, x in row[part].items()}
    alone = [x for x in rows if x.endswith(" alone")]
    best = min(
        alone,
        key=lambda x: sum(
            sum(rows[x][part]["loss"]) for part in ("shots", "held out")
        ),
    )
    found["to_expert"] = mean_and_error(
        row["others"]["loss"] - rows[best]["others"]["loss"]
    )
    return found


PARTS = ("shots", "held out", "others")


def mean_and_error(values: np.ndarray) -> list[float]:
    """A mean and its standard error."""
    return [
        float(values.mean()),
        float(values.std(ddof=1) / len(values) ** 0.5),
    ]


def table_of(result: dict[str, Any], title: str) -> Table:
    """The rows as a table."""
    table = Table(
        title=title,
        caption=common.describe(result["machine"]),
        box=rich.box.HEAVY_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in (
        *("seconds", "loss: shots", "held out", "others", "to best expert"),
        *("score: shots", "held out", "others"),
    ):
        table.add_column(name, justify="right")
    for label, row in result["rows"].items():
        table.add_row(
            label,
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            *(f"{row[part]['loss'][0]:.2f}" for part in PARTS[:2]),
            "{:.3f} ± {:.3f}".format(*row["others"]["loss"]),
            "{:+.3f} ± {:.3f}".format(*row["to_expert"]),
            *(f"{row[part]['score'][0]:.0%}" for part in PARTS[:2]),
            "{:.0%} ± {:.0%}".format(*row["others"]["score"]),
        )
    return table


if __name__ == "__main__":
    main()
