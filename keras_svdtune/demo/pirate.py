"""The data: chatterbot's small talk, answered by a pirate.

`chatterbot-corpus` has English questions and answers, `arrr` turns the answers
into pirate speech, and `dialect_score` says how much of a text is pirate
speech. Everything here is a function of the seed.
"""

import dataclasses
import functools
import random
import re
from pathlib import Path

from keras_svdtune.demo.optional import require

LONGEST_QUESTION = 14  # words
LONGEST_ANSWER = 25

# arrr adds an oath after one sentence in six. Of so many tries the first with
# an oath is kept: nearly all answers have one, and so a model learns to swear.
TRIES = 20

# arrr knows whole words only, so what hides in a contraction is spelt out.
CONTRACTIONS = {
    "it's": "it is",
    "that's": "that is",
    "what's": "what is",
    "where's": "where is",
    "there's": "there is",
    "he's": "he is",
    "she's": "she is",
    "isn't": "is not",
    "aren't": "are not",
    "you're": "you are",
    "we're": "we are",
    "they're": "they are",
}

# Pirate words that plain English has too do not count as dialect...
PLAIN_TOO = {"me", "head", "pillage", "mutiny", "broadside"}
# ... and neither does "be" after one of these: "to be", "it may be".
BEFORE_PLAIN_BE = re.compile(
    r"to|will|would|can|could|may|might|shall|should|must|let|cannot|not"
    r"|never|always|also|only|still|just|.*n't|.*'ll|.*'d"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question, a plain answer, and the same answer from a pirate."""

    question: str
    plain: str
    answer: str


def pirate_pairs(seed: int = 0) -> list[Pair]:
    """All usable pairs of the corpus, in the order of the corpus.

    Args:
        seed: int, decides which oaths `arrr` adds.

    Returns:
        A list of pairs without repetitions.
    """
    pairs = {}
    for question, answer in corpus():
        question, answer = tidy(question), tidy(answer)
        usable = (
            2 <= len(question.split()) <= LONGEST_QUESTION
            and 3 <= len(answer.split()) <= LONGEST_ANSWER
            and re.fullmatch(r"[A-Za-z0-9 ,.!?'-]+", question + answer)
            and "etc." not in answer  # not the end of a sentence
        )
        if usable:
            pairs[question.lower(), answer.lower()] = (question, answer)
    generator = random.Random(seed)
    return [
        Pair(question, answer, to_pirate(answer, generator.getrandbits(32)))
        for question, answer in pairs.values()
    ]


def corpus(language: str = "english") -> list[tuple[str, str]]:
    """The opening question of every conversation, and its first answer."""
    package = require("chatterbot_corpus").__file__
    assert package is not None
    found = []
    for file in sorted(Path(package).parent.glob(f"data/{language}/*.yml")):
        text = file.read_text(encoding="utf-8")
        for lines in require("yaml").safe_load(text)["conversations"]:
            if len(lines) > 1:
                found.append((str(lines[0]), str(lines[1])))
    return found


def split(
    pairs: list[Pair], held_out: int, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Splits into training and held-out pairs.

    No question occurs on both sides, however it is written.

    Args:
        pairs: what to split.
        held_out: int, the least number of held-out pairs.
        seed: int.

    Returns:
        Training pairs and held-out pairs, both shuffled.
    """
    by_question: dict[str, list[Pair]] = {}
    for pair in pairs:
        key = " ".join(words(pair.question))
        by_question.setdefault(key, []).append(pair)
    questions = sorted(by_question)
    generator = random.Random(seed)
    generator.shuffle(questions)
    test: list[Pair] = []
    train: list[Pair] = []
    for question in questions:
        side = test if len(test) < held_out else train
        side.extend(by_question[question])
    generator.shuffle(train)
    return train, test


def tidy(text: str) -> str:
    """One line, straight quotes, a capital first, a full stop last."""
    text = " ".join(text.replace("\u2019", "'").split())
    if text and text[-1] not in ".!?":
        text += "."
    return text[:1].upper() + text[1:]


def to_pirate(text: str, seed: int) -> str:
    """Turns plain English into pirate speech."""
    arrr = require("arrr")
    tokens = []
    for token in re.findall(r"[\w'-]+|[^\w\s]+", text):
        spelt_out = CONTRACTIONS.get(token.lower(), token)
        tokens += spelt_out.split()
    state = random.getstate()  # arrr draws from the global generator
    random.seed(seed)
    tries = [arrr.translate(" ".join(tokens)) for _ in range(TRIES)]
    random.setstate(state)
    without = min(map(len, tries))
    with_oath = (said for said in tries if len(said) > without)
    return re.sub(r" ([,.!?])", r"\1", next(with_oath, tries[0]))


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z0-9'-]+", text.lower())


def dialect_score(texts: list[str]) -> float:
    """The share of the words that are pirate speech, from 0 to 1."""
    marks = [mark for text in texts for _, mark in marked_words(text)]
    return sum(marks) / max(len(marks), 1)


def marked_words(text: str) -> list[tuple[str, bool]]:
    """Every word of a text, and whether it is pirate speech."""
    spoken = words(text)
    pirate = [False] * len(spoken)
    for i, word in enumerate(spoken):
        before = spoken[i - 1] if i else ""
        if word == "be" and BEFORE_PLAIN_BE.fullmatch(before):
            continue
        for phrase in _pirate_phrases().get(word, ()):
            if tuple(spoken[i : i + len(phrase)]) == phrase:
                pirate[i : i + len(phrase)] = [True] * len(phrase)
    return list(zip(spoken, pirate, strict=True))


@functools.cache
def _pirate_phrases() -> dict[str, list[tuple[str, ...]]]:
    """What arrr says, as tuples of words, by their first word."""
    arrr = require("arrr")
    phrases: dict[str, list[tuple[str, ...]]] = {}
    for text in [*arrr._PIRATE_WORDS.values(), *arrr._PIRATE_PHRASES]:
        phrase = tuple(words(text))
        if phrase not in {(word,) for word in PLAIN_TOO}:
            phrases.setdefault(phrase[0], []).append(phrase)
    return phrases
