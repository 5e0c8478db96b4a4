"""What the notebooks share."""

import keras
import pytest

from keras_svdtune.demo import notebook

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the notebooks run on JAX"
)


@pytest.fixture
def interactive():
    keras.config.enable_interactive_logging()
    yield
    keras.config.disable_interactive_logging()


def test_small_without_an_accelerator(capsys, interactive, monkeypatch):
    monkeypatch.delenv("KERAS_SVDTUNE_SMALL", raising=False)
    devices = ["cpu:0", "cpu:1"]
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: devices)
    assert notebook.small() is True
    assert capsys.readouterr().out == "No GPU or TPU here: small mode.\n"
    assert not keras.config.is_interactive_logging_enabled()


@pytest.mark.parametrize("logged_in", [True, False])
def test_small_with_an_accelerator(logged_in, interactive, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")
    monkeypatch.delenv("KERAS_SVDTUNE_SMALL", raising=False)

    def whoami(verbose):
        if not logged_in:
            raise OSError("out of reach")

    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["tpu:0"])
    monkeypatch.setattr(kagglehub, "whoami", whoami)
    assert notebook.small() is not logged_in
    assert keras.config.is_interactive_logging_enabled() is logged_in


def test_small_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("KERAS_SVDTUNE_SMALL", "1")
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["tpu:0"])
    assert notebook.small() is True


def test_a_table():
    pytest.importorskip("IPython")
    rows = [
        {"what": "a|b", "n": 12345, "x": 0.12345},
        {"what": "two\nlines", "n": None, "x": 1234.5},
        {"what": "c", "n": 1, "x": 2.0},
    ]
    assert notebook.table(rows).data.splitlines() == [
        "| what | n | x |",
        "| :-- | --: | --: |",
        "| a\\|b | 12,345 | 0.123 |",
        "| two lines |  | 1,234 |",
        "| c | 1 | 2 |",
    ]
