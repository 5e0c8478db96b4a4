"""Runs the notebooks of `colab/`, and keeps the outputs.

    python tests/notebooks.py            all of them
    python tests/notebooks.py 01 03      some

A notebook is written as `colab/NN_name.py`. This executes it and writes
`colab/NN_name.ipynb`, the same cells with their outputs, for the reader.
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

COLAB = Path(__file__).parents[1] / "colab"
OWNER = "keras-svdtune"  # on GitHub
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/"
    "colab-badge.svg)](https://colab.research.google.com/github/{owner}/"
    "keras_svdtune/blob/main/colab/{name}.ipynb)"
)


def names() -> list[str]:
    """The notebooks, without their suffix."""
    return sorted(path.stem for path in COLAB.glob("*.py"))


def badge(name: str) -> str:
    """What a notebook begins with."""
    return BADGE.format(owner=OWNER, name=name)


def read(name: str, suffix: str) -> Any:
    """A notebook as nbformat has it."""
    import jupytext

    return jupytext.read(COLAB / f"{name}{suffix}")


def execute(name: str, folder: Path, cache: Path, steps: int | None) -> Any:
    """Executes a notebook in a process of its own.

    The cell that installs packages is left out, and the notebook writes its
    files to `folder`. XLA's programs and decompositions are kept in `cache`,
    since the notebooks share some.

    Args:
        name: str, without its suffix.
        folder: where it runs.
        cache: a folder that the notebooks have in common.
        steps: int or None, how many steps to train; None for as many as the
            notebook says. What is stored comes from such a run.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbclient

    notebook = read(name, ".py")
    cells = notebook.cells
    notebook.cells = [x for x in cells if "install" not in tags(x)]
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": "jax",
        "KERAS_SVDTUNE_CACHE": str(cache / "decompositions"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "",  # as users have it, whatever the tests set
    }
    if steps is not None:
        settings["STEPS"] = str(steps)
    client = nbclient.NotebookClient(
        notebook, timeout=3600, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | settings)
    notebook.cells = cells
    return notebook


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def tidy(notebook: Any) -> Any:
    """Without what differs from run to run, or belongs to one machine."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            # Backends talk on standard error.
            for kind, text in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(text, str):
                    output.data[kind] = re.sub(r" at 0x[0-9a-f]+", "", text)
        if "outputs" in cell:
            cell.outputs = [
                x for x in cell.outputs if x.get("name") != "stderr"
            ]
    language = notebook.metadata.get("language_info", {})
    language.pop("version", None)
    return notebook


def main() -> None:
    """Runs the command."""
    import jupytext

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("which", nargs="*", help="beginnings of names")
    parser.add_argument(
        "--cache", type=Path, help="kept after the run (default: removed)"
    )
    options = parser.parse_args()
    total = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        for name in names():
            if options.which and not name.startswith(tuple(options.which)):
                continue
            start, cpu = time.perf_counter(), children_seconds()
            with tempfile.TemporaryDirectory() as folder:
                notebook = execute(name, Path(folder), cache.absolute(), None)
            jupytext.write(tidy(notebook), COLAB / f"{name}.ipynb")
            seconds = time.perf_counter() - start
            total += seconds
            print(
                f"{name}: {seconds:.0f} s, of CPU "
                f"{children_seconds() - cpu:.0f} s",
                flush=True,
            )
    print(f"Together: {total:.0f} s")


def children_seconds() -> float:
    """The CPU seconds of processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()
