"""A new method is one file: `plugins/olora.py`, outside of the package.

It is imported in processes of their own, so that no other test meets it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_svdtune

TESTS = Path(__file__).parent
CONFORMANCE = TESTS / "test_conformance.py"


def run_with_plugin(*arguments):
    """Runs pytest with the plugin imported.

    Returns:
        The names of the tests that passed (or were skipped on this backend),
        without their parameters.
    """
    command = [sys.executable, "-m", "pytest", "-p", "plugins.olora"]
    command += ["-n0", "-v", "-p", "no:cacheprovider", *map(str, arguments)]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for name in [x for x in environment if x.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return re.findall(r"::(test_\w+)\S* (?:PASSED|SKIPPED)", done.stdout)


def names_in(file):
    return set(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))


def test_what_follows_from_one_file():
    file = TESTS / "plugins" / "what_follows.py"
    # And of the conformance suite what is quick.
    names = {
        "test_gradients_equal_dense_autodiff",
        "test_file_gives_the_same_outputs",
    }
    selected = f"what_follows or olora and ({' or '.join(names)})"
    passed = run_with_plugin(file, CONFORMANCE, "-k", selected)
    assert set(passed) == names_in(file) | names
    assert "olora" not in keras_svdtune.METHODS  # in this process


@pytest.mark.slow
def test_all_conforms():
    passed = run_with_plugin(CONFORMANCE, "-k", "olora")
    assert set(passed) == names_in(CONFORMANCE)
