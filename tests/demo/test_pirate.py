"""The data and the dialect score."""

import random

import pytest

pytest.importorskip("arrr")
pytest.importorskip("chatterbot_corpus")

from keras_svdtune.demo import pirate  # noqa: E402


def test_pirate_words_score():
    assert pirate.dialect_score(["Th' sun be bright."]) == 0.5
    assert pirate.dialect_score(["Ahoy! Shiver me timbers!"]) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "It may be that I would be late, to be honest.",
        "Tell me what is in your head.",
        "It won't be long, and she'll be there.",
        "",
    ],
)
def test_plain_english_does_not_score(text):
    assert pirate.dialect_score([text]) == 0


def test_longer_pirate_phrases_count_every_word():
    marks = dict(pirate.marked_words("Ye old barnacle covered ship"))
    assert marks == {
        "ye": True,
        "old": False,
        "barnacle": True,
        "covered": True,
        "ship": False,
    }


def test_translation_reaches_words_with_punctuation_and_contractions():
    said = pirate.to_pirate("Yes, it's the captain.", seed=0)
    assert said.startswith("Aye, it be th' cap'n.")


def test_translation_depends_on_the_seed_only():
    random.seed(1)
    first = pirate.to_pirate("Hello there. You are old.", seed=7)
    drawn = random.random()
    random.seed(1)
    assert random.random() == drawn  # the global generator is left alone
    assert pirate.to_pirate("Hello there. You are old.", seed=7) == first


def test_data_is_the_same_every_time_and_clearly_pirate():
    pairs = pirate.pirate_pairs(seed=3)
    assert pairs == pirate.pirate_pairs(seed=3)
    assert pairs != pirate.pirate_pairs(seed=4)
    assert len(pairs) > 400
    assert pirate.dialect_score([pair.plain for pair in pairs]) < 0.002
    assert pirate.dialect_score([pair.answer for pair in pairs]) > 0.3


def test_no_question_is_on_both_sides_of_the_split():
    pairs = pirate.pirate_pairs()
    train, test = pirate.split(pairs, 64)
    assert (train, test) == pirate.split(pairs, 64)
    assert len(train) + len(test) == len(pairs)
    assert 64 <= len(test) < 100
    asked = [
        {" ".join(pirate.words(p.question)) for p in s} for s in (train, test)
    ]
    assert not asked[0] & asked[1]


def test_another_seed_splits_in_another_way():
    pairs = pirate.pirate_pairs()
    assert pirate.split(pairs, 64, seed=1) != pirate.split(pairs, 64, seed=2)
