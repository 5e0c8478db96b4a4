"""The whole demo, on a model with a few thousand weights."""

import json

import keras
import numpy as np
import pytest

for module in ("arrr", "chatterbot_corpus", "gguf", "matplotlib", "yaml"):
    pytest.importorskip(module)

from helpers import slow_elsewhere  # noqa: E402
from tiny_llama_gguf import write_tiny_llama  # noqa: E402

from keras_svdtune.demo import __main__, results, show, train  # noqa: E402
from keras_svdtune.demo.weights import gguf_to_hf, weights  # noqa: E402
from keras_svdtune.methods import METHODS  # noqa: E402


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder / "tiny.gguf")
    gguf_to_hf.convert(folder / "tiny.gguf", folder / "converted")
    return folder / "converted"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "LENGTH", 160)  # a token is a letter here
    monkeypatch.setattr(train, "HELD_OUT", 8)
    monkeypatch.setattr(train, "ANSWERED", 2)


@pytest.fixture
def demo(converted, monkeypatch, tmp_path, capsys):
    """Runs the command line on the tiny model, and returns what it says."""
    # Without the variable, the demo would start again with JAX.
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())
    monkeypatch.setattr(
        weights, "load_model", lambda *_: gguf_to_hf.load(converted)
    )
    monkeypatch.setattr(show.console, "width", 120)

    def run(*options):
        status = __main__.main([*options, "--out", str(tmp_path / "out")])
        return status, capsys.readouterr()

    return run


@slow_elsewhere
def test_command_line(demo, monkeypatch, tmp_path):
    """Two runs: each trains, saves, reloads and merges."""
    monkeypatch.setattr(
        __main__, "METHODS", {name: METHODS[name] for name in ("svf", "lora")}
    )
    results_of, run = [], train.run

    def kept(*args, **kwargs):
        results_of.append(run(*args, **kwargs))
        return results_of[-1]

    monkeypatch.setattr(train, "run", kept)
    file = tmp_path / "results.json"
    options = "--model gemma3_270m --method all --steps 6 --pairs 4"
    status, said = demo(
        *options.split(), "--learning-rate", "0.1", "--results", str(file)
    )
    assert status == 0
    for result in results_of:
        assert len(result.losses) == 6
        assert np.isfinite(result.losses).all()
        assert result.losses[-1] < result.losses[0]
        assert result.file.stat().st_size == result.file_bytes
        assert result.before.answers != result.after.answers
        assert result.reloaded == result.after.answers
        assert len(result.merged) == len(train.PROMPTS) + 2
        # Untrained weights know no pirate: the score of noise is about 0.
        assert result.before.dialect < 0.05 < result.ceiling
    # Of SVF; key and value have rank 16.
    assert results_of[0].trainable == 7 * 32 - 2 * 16

    found = json.loads(file.read_text())
    assert found["steps"] == 6 and found["base"]["loss"] > 0
    assert list(found["methods"]) == ["svf", "lora"]
    for method in found["methods"].values():
        assert len(method["training_losses"]) == 6
        assert method["reloaded_agree"] == method["answers"] == 5
    picture = tmp_path / "picture.png"
    results.main([str(file), str(picture)])
    assert picture.stat().st_size > 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "gemma3_270m-all-parameters.png",
        "gemma3_270m-all.png",
        "gemma3_270m-lora.png",
        "gemma3_270m-lora.safetensors",
        "gemma3_270m-svf.png",
        "gemma3_270m-svf.safetensors",
    ]
    for part in (
        "Gemma Terms of Use",
        "Before and after",
        "dialect score",
        "answers the same",
        "All methods",
    ):
        assert part in said.out


def test_errors_are_one_line(demo, monkeypatch):
    def offline(*_):
        raise weights.WeightsError("no network here")

    monkeypatch.setattr(weights, "load_model", offline)
    status, said = demo()
    assert status == 1
    assert said.err.strip() == "WeightsError: no network here"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_settings_for_the_demo(name):
    assert train.make_method(name).name == name
