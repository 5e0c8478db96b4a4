"""Every test starts from the same seeds, names and settings."""

import atexit
import gc
import os
import shutil
import tempfile

# Before any backend is imported. The tests are small: no device is needed.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")
# Nothing is kept in the user's home, by processes that a test starts neither.
os.environ["KERAS_SVDTUNE_CACHE"] = "0"
# On JAX most of the time is XLA's compiler's, for programs that run once or
# twice. So it optimizes less, and the workers share what they compiled. With
# XLA_FLAGS set, to nothing even, all is compiled as users have it.
if os.environ["KERAS_BACKEND"] == "jax" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(
        (
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        )
    )
    # The workers find these in their environment.
    _programs = tempfile.mkdtemp(prefix="programs_of_xla_")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import keras
import keras_hub  # noqa: F401
import pytest

import keras_svdtune  # noqa: F401


def pytest_collection_finish():
    """Leaves what was imported out of every walk through all objects.

    Half a million objects live as long as the process. Whoever goes through
    all of them, the collector and every enabling do, need not meet them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_keras():
    """Names, seeds, dtype policy and logging as at the start of a session."""
    keras.backend.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")
    keras.config.disable_interactive_logging()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_files():
    """A worker that has seen many files would be slow, and large."""
    yield
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def keras_backend():
    """The name of the backend that the tests run on."""
    return keras.backend.backend()


def pytest_report_header(config):
    return f"keras {keras.version()}, backend {keras.backend.backend()}"
