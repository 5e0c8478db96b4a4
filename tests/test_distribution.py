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


SLOW = (
    "losses gemma",
    "losses llama3",
    "sizes gemma",
    "files gemma",
    "named gemma",
    "others gemma",
)


@pytest.mark.parametrize(
    "program",
    [
        "losses llama3 svf, sizes gemma svf lora, files gemma svf, "
        "named gemma svf lora, dropout gemma",
        *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW),
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
