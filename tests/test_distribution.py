"""Several devices: the same numbers, in parts.

The programs are in `distributed.py`; a failed assertion in one is printed here.
"""

import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="keras.distribution is JAX's"
)


@pytest.mark.parametrize(
    "program",
    [
        "losses gemma",
        "losses llama3 svf",
        pytest.param("losses llama3", marks=pytest.mark.slow),
        "sizes gemma",
        "files gemma svf",
        pytest.param("files gemma", marks=pytest.mark.slow),
        "others gemma",
    ],
)
def test_eight_devices(program):
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "distributed.py"),
            *program.split(),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
