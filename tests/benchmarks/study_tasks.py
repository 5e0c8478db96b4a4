"""What the study trains on, and what it measures: models, tasks, data.

Everything comes from PyPI, pinned, and is split in the same way every time:
the seed of a run decides the order of the training examples, never the split.

    pirate    small talk answered by a pirate: a style
    names     who of three likes what, by reasoning-gym: a skill with exact
              answers, of which a guess gets a third
    speeches  speeches of 2012's conventions: text like that of pre-training
    reviews   Rotten Tomatoes, fresh or rotten: MiniLM with a new head

What a language model forgets is measured on other text that is not trained
on: the sentences of the film reviews.
"""

import dataclasses
from typing import Any

import keras
import keras_hub
import numpy as np
from wheels import minilm, rotten_tomatoes

from keras_svdtune.demo import chat, pirate
from keras_svdtune.demo import speeches as demo_speeches
from keras_svdtune.demo.optional import require
from keras_svdtune.demo.weights.weights import MODELS, load_model

LENGTH = {"pirate": 40, "names": 60, "speeches": 32, "reviews": 32}  # tokens
TRAIN, VALIDATION, TEST, NEUTRAL = 1200, 48, 96, 64  # examples
HELD_OUT = 180  # pairs: enough for both, if some are too long
REVIEWS = (1200, 400, 1200)


@dataclasses.dataclass(frozen=True)
class Data:
    """The parts of a task; `neutral` is None where nothing is forgotten."""

    train: chat.Arrays
    validation: chat.Arrays
    test: chat.Arrays
    neutral: chat.Arrays | None


def load(model: str, seed: int) -> keras.Model:
    """A pretrained model; the seed decides the head, where it has one."""
    if model in MODELS:
        task = load_model(model)
        # With a preprocessor `fit` would take sentences.
        return type(task)(backbone=task.backbone, preprocessor=None)
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.BertBackbone.from_preset(str(minilm()))
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )


def data_for(model: str, task: str) -> Data:
    """The data of a task, as tokens of a model."""
    if task == "reviews":
        return reviews()
    language_model = load_model(model)
    parts = {"pirate": talk, "names": names, "speeches": speeches}
    train, held_out = parts[task]()
    style = chat.format_for(language_model, model)

    def encoded(examples: list[Any], n: int) -> chat.Arrays:
        if isinstance(examples[0], str):
            found = encode_texts(language_model, examples, LENGTH[task])
        else:
            found = chat.encode(language_model, style, examples, LENGTH[task])
        return found.rows(np.arange(min(n, len(found))))

    held_out_arrays = encoded(held_out, VALIDATION + TEST)
    return Data(
        train=encoded(train, TRAIN),
        validation=held_out_arrays.rows(np.arange(VALIDATION)),
        test=held_out_arrays.rows(np.arange(VALIDATION, len(held_out_arrays))),
        neutral=encode_texts(
            language_model, [text for text, _ in rotten_tomatoes()], 32
        ).rows(np.arange(NEUTRAL)),
    )


def talk() -> tuple[list[pirate.Pair], list[pirate.Pair]]:
    """The demo's pairs, of which more are held out."""
    return pirate.split(pirate.pirate_pairs(0), HELD_OUT, 0)


def names() -> tuple[list[pirate.Pair], list[pirate.Pair]]:
    """Who of three likes what; no question is on both sides."""
    made = require("reasoning_gym").create_dataset(
        "needle_haystack",
        size=HELD_OUT + 1500,  # some are too long
        seed=0,
        min_num_statements=3,
        max_num_statements=3,
    )
    found = {x["question"]: x["answer"] for x in made}
    pairs = [pirate.Pair(q, a, a) for q, a in found.items()]
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def speeches() -> tuple[list[str], list[str]]:
    """Passages of speeches; those of a speaker are on one side."""
    train: list[str] = []
    held_out: list[str] = []
    for i, sentences in enumerate(demo_speeches.speeches()):
        side = held_out if i % 5 == 0 else train
        # Three sentences are about as long as an example.
        side += [
            " ".join(sentences[k : k + 3])
            for k in range(0, len(sentences) - 2, 3)
        ]
    order = np.random.default_rng(0)
    order.shuffle(train)
    order.shuffle(held_out)
    return train, held_out


def encode_texts(task: Any, texts: list[str], length: int) -> chat.Arrays:
    """The first tokens of texts, each of which is to be predicted.

    A text of less than half as many tokens is left out.
    """
    tokenizer = task.preprocessor.tokenizer
    rows = []
    for text in texts:
        found = [tokenizer.start_token_id, *chat.ids(tokenizer, text)]
        if len(found) > length // 2:
            rows.append(found[: length + 1])
    tokens = np.full((len(rows), length + 1), tokenizer.pad_token_id, "int32")
    mask = np.zeros((len(rows), length + 1), "int32")
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
    weight = mask[:, 1:].astype("float32")
    return chat.Arrays(
        x={"token_ids": tokens[:, :-1], "padding_mask": mask[:, :-1]},
        y=tokens[:, 1:],
        weight=weight / weight.mean(),
    )


def reviews() -> Data:
    """Sentences of film reviews, and whether the film is fresh."""
    found = rotten_tomatoes()
    order = np.random.default_rng(0).permutation(len(found))
    texts, labels = zip(*(found[i] for i in order[: sum(REVIEWS)]), strict=True)
    inputs = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        str(minilm()), sequence_length=LENGTH["reviews"]
    )(list(texts))
    everything = chat.Arrays(
        {name: np.asarray(value) for name, value in inputs.items()},
        np.array(labels, "int32"),
        np.ones(len(labels), "float32"),
    )
    ends = np.cumsum((0, *REVIEWS))
    train, validation, test = (
        everything.rows(np.arange(a, b))
        for a, b in zip(ends, ends[1:], strict=False)
    )
    return Data(train, validation, test, None)
