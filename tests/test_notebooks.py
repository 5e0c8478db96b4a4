"""The notebooks run, and what is kept of them is what they are."""

import importlib.util
from pathlib import Path

import keras
import notebooks
import pytest

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "jax", reason="the notebooks run on JAX"
    ),
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(x) is None
            for x in ("jupytext", "nbclient", "ipykernel")
        ),
        reason="needs the extra `test`",
    ),
]
NAMES = notebooks.names()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path, cache):
    done = notebooks.execute(name, tmp_path, cache, steps=8)
    assert any("outputs" in cell for cell in done.cells)


@pytest.mark.parametrize("name", NAMES)
def test_both_files_have_the_same_cells(name):
    kept, written = notebooks.read(name, ".ipynb"), notebooks.read(name, ".py")
    assert [(x.cell_type, x.source, notebooks.tags(x)) for x in kept.cells] == [
        (x.cell_type, x.source, notebooks.tags(x)) for x in written.cells
    ], "run `python tests/notebooks.py`"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_and_none_is_an_error(name):
    kept = notebooks.read(name, ".ipynb")
    code = [x for x in kept.cells if x.cell_type == "code"]
    ran = [x for x in code if "install" not in notebooks.tags(x)]
    assert len(code) == len(ran) + 1, "one cell installs"
    assert all(cell.execution_count for cell in ran)
    outputs = [output for cell in ran for output in cell.outputs]
    assert not [x for x in outputs if x.output_type == "error"]
    assert [x for x in outputs if "image/png" in x.get("data", {})]
    assert "site-packages" not in str(outputs), "a path of one machine"


@pytest.mark.parametrize("name", NAMES)
def test_begins_with_its_badge(name):
    first = notebooks.read(name, ".ipynb").cells[0].source
    assert first.startswith(notebooks.badge(name) + "\n\n# ")


def test_the_readme_lists_them_all():
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    for name in NAMES:
        assert notebooks.badge(name) in readme
