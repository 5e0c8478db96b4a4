"""Every test starts from the same seeds, names and settings."""

import os

# Before any backend is imported. The tests are small: no device is needed.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")
# Nothing is kept in the user's home, by processes that a test starts neither.
os.environ["KERAS_SVDTUNE_CACHE"] = "0"

import keras
import pytest


@pytest.fixture(autouse=True)
def fresh_keras():
    """Names, seeds, dtype policy and logging as at the start of a session."""
    keras.backend.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")
    keras.config.disable_interactive_logging()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def keras_backend():
    """The name of the backend that the tests run on."""
    return keras.backend.backend()


def pytest_report_header(config):
    return f"keras {keras.version()}, backend {keras.backend.backend()}"
