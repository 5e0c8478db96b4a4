"""A tiny language model in place of those that the benchmarks load."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keras_svdtune.layers import LAYERS
from keras_svdtune.methods.base import METHODS


@pytest.fixture(autouse=True)
def methods_as_they_were() -> Iterator[None]:
    """What the study tries is registered where it is imported."""
    before = [(found, dict(found)) for found in (METHODS, LAYERS)]
    yield
    for found, known in before:
        found.clear()
        found.update(known)


@pytest.fixture
def tiny_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a Llama of a few thousand weights, for the demo's task."""
    for module in ("arrr", "chatterbot_corpus", "gguf", "yaml"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "demo")
    from tiny_llama_gguf import write_tiny_llama

    from keras_svdtune.demo import train
    from keras_svdtune.demo.weights import gguf_to_hf

    write_tiny_llama(tmp_path / "tiny.gguf")
    gguf_to_hf.convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    monkeypatch.setattr(train, "HELD_OUT", 8)
    return lambda _: gguf_to_hf.load(tmp_path / "converted")


@pytest.fixture
def tiny_study(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study has the tiny model, and other texts to be forgotten."""
    import study_tasks

    monkeypatch.setattr(study_tasks, "load_model", tiny_llama)
    for task in study_tasks.LENGTH:  # a token is a letter
        monkeypatch.setitem(study_tasks.LENGTH, task, 160)
    texts = [
        (f"A film of {i} hours, which is {i} too many.", 0) for i in (2, 3)
    ]
    monkeypatch.setattr(study_tasks, "rotten_tomatoes", lambda: texts)
    counts = {"TRAIN": 40, "VALIDATION": 8, "TEST": 8, "NEUTRAL": 2}
    for part, examples in counts.items():
        monkeypatch.setattr(study_tasks, part, examples)
