"""One run: measure, train, measure again, save, reload, merge."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

from keras_hub.models import CausalLM

from keras_svdtune.demo import chat, fit, pirate, show
from keras_svdtune.demo.result import Measured, Result
from keras_svdtune.methods.base import METHODS, Method
from keras_svdtune.methods.data_method import DataMethod

# Not in the corpus.
PROMPTS = (
    "Where is the treasure?",
    "What is the sun?",
    "Are you happy, my friend?",
)
HELD_OUT = 64  # pairs that measure the loss
ANSWERED = 16  # of their questions are answered for the dialect score
LENGTH = 40  # tokens


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on, and what is measured."""

    style: chat.ChatFormat
    train: chat.Arrays
    test: chat.Arrays
    questions: list[str]
    ceiling: float  # dialect score of the held-out answers themselves


def make_data(task: CausalLM, name: str, pairs: int, seed: int) -> Data:
    """Makes the data of a run for one model.

    Args:
        task: a `keras_hub.models.CausalLM`.
        name: str, the model's name.
        pairs: int, how many pairs to train on, at most.
        seed: int.

    Returns:
        `Data`.

    Raises:
        ValueError: the model takes more than text.
    """
    if set(task.input) != {"token_ids", "padding_mask"}:
        raise ValueError(
            "The demo can train models that take text and nothing else. "
            f"{type(task).__name__} '{name}' takes {sorted(task.input)}."
        )
    style = chat.format_for(task, name)
    train, test = pirate.split(pirate.pirate_pairs(seed), HELD_OUT, seed)
    questions = list(dict.fromkeys(pair.question for pair in test))
    return Data(
        style=style,
        train=chat.encode(task, style, train[:pairs], LENGTH),
        test=chat.encode(task, style, test, LENGTH),
        questions=[*PROMPTS, *questions[:ANSWERED]],
        ceiling=pirate.dialect_score([pair.answer for pair in test]),
    )


def make_method(name: str, rank: int = 8) -> Method:
    """A method by its short name, with `rank` where it has no default."""
    cls = METHODS[name]
    setting = inspect.signature(cls).parameters.get("rank")
    if setting is not None and setting.default is setting.empty:
        return cls(rank=rank)
    return cls()


def run(
    load: Callable[[], CausalLM],
    name: str,
    method: Method,
    *,
    steps: int,
    pairs: int,
    learning_rate: float | None = None,
    folder: Path,
    seed: int = 0,
    before: Measured | None = None,
) -> Result:
    """Trains one method on one model, from the base to the merged model.

    Args:
        load: loads the base model. Called twice: the second model is what the
            adapter file is loaded into.
        name: str, the model's name.
        method: what to train.
        steps: int, training steps.
        pairs: int, training pairs.
        learning_rate: float. Defaults to what the method suggests.
        folder: where the adapter file goes.
        seed: int.
        before: the base model's `Measured`, if it is known already.

    Returns:
        `Result`.
    """
    folder.mkdir(parents=True, exist_ok=True)  # an error now, not at the end
    rate = learning_rate or method.suggested_learning_rate
    task = load()
    data = make_data(task, name, pairs, seed)
    fit.prepare(task, rate, steps)
    if before is None:
        show.step("Measuring the base model")
        before = measure(task, data)

    show.step(f"Enabling {method}")
    if isinstance(method, DataMethod):
        pairs_to_see = (data.train.x, data.train.y, data.train.weight)
        method = dataclasses.replace(method, data=pairs_to_see)
    with fit.raw_tokens(task):
        task.enable_adapter(method)
    cost = task.backbone.adapter_summary()
    fit.prepare(task, rate, steps)
    show.step(
        f"Training on {len(data.train)} pairs: {steps} steps of {fit.BATCH}, "
        f"learning rate {rate:g}"
    )
    losses, seconds = fit.train(task, data.train, steps, seed)
    penalty = fit.penalty(task)
    show.step("Measuring the trained model")
    after = measure(task, data)

    file = folder / f"{name}-{method.name}.safetensors"
    task.backbone.save_adapter(file)
    del task

    show.step(f"Loading {file.name} into a new model, then merging it")
    fresh = load()
    fresh.backbone.load_adapter(file)
    fit.prepare(fresh, rate, steps)
    reloaded = chat.answers(fresh, data.style, data.questions)
    fresh.backbone.merge_adapter()
    fit.prepare(fresh, rate, steps)
    merged = chat.answers(fresh, data.style, data.questions)
    return Result(
        model=name,
        method=method.name,
        learning_rate=rate,
        trainable=cost.trainable,
        file=file,
        file_bytes=file.stat().st_size,
        seconds_per_step=seconds,
        losses=losses,
        penalty=penalty,
        ceiling=data.ceiling,
        before=before,
        after=after,
        reloaded=reloaded,
        merged=merged,
    )


def measure(task: CausalLM, data: Data) -> Measured:
    """The held-out loss, and the dialect of the model's own answers."""
    loss = fit.evaluate(task, data.test)
    said = chat.answers(task, data.style, data.questions)
    return Measured(loss, pirate.dialect_score(said), said)
