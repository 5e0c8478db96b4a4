"""Pairs as training arrays."""

import types

import numpy as np
import pytest

from keras_svdtune.demo import chat
from keras_svdtune.demo.pirate import Pair


class Letters:
    """A tokenizer with one token a letter; 0 pads, 1 starts, 2 ends."""

    pad_token_id, start_token_id, end_token_id = 0, 1, 2

    def __call__(self, text):
        return [ord(letter) for letter in text]


TASK = types.SimpleNamespace(
    preprocessor=types.SimpleNamespace(tokenizer=Letters())
)
STYLE = chat.ChatFormat("<", ">")


def test_only_the_answer_and_its_end_are_learnt():
    arrays = chat.encode(TASK, STYLE, [Pair("q", "", "yo")], length=8)
    text = [1, *map(ord, "<q>yo"), 2]
    assert arrays.x["token_ids"].tolist() == [[*text, 0]]
    assert arrays.x["padding_mask"].tolist() == [[1] * 7 + [0]]
    assert arrays.y.tolist() == [[*text[1:], 0, 0]]
    assert np.flatnonzero(arrays.weight[0]).tolist() == [3, 4, 5]  # y, o, end


def test_weights_average_one():
    pairs = [Pair("q", "", "yo"), Pair("q", "", "yo ho ho")]
    arrays = chat.encode(TASK, STYLE, pairs, length=16)
    assert arrays.weight.mean() == pytest.approx(1)
    assert len(set(arrays.weight.flatten().tolist())) == 2


def test_long_pairs_are_left_out_and_none_is_an_error():
    pairs = [Pair("q", "", "y" * 20), Pair("q", "", "yo")]
    assert len(chat.encode(TASK, STYLE, pairs, length=8)) == 1
    with pytest.raises(ValueError, match="None of the 1 pairs"):
        chat.encode(TASK, STYLE, pairs[:1], length=8)
