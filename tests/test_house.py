"""The house: which folder stands on which, read from the imports.

`python tests/test_house.py` prints the folders as a table.
"""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "keras_svdtune"
# From the bottom to the top; the modules beside the folders are the doors, but
# for `version`, which knows nothing.
FOLDERS = (
    "version",
    "runtime",
    "matrix",
    "methods",
    "adapter",
    "hosts",
    "model",
    "reports",
    "convert",
    "files",
    "experts",
    "doors",
    "demo",
)

pytestmark = pytest.mark.fast


def modules():
    """Path of each module, by its dotted name within the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        found[name or "__init__"] = path
    return found


def folder_of(module):
    first = module.partition(".")[0]
    return first if first in FOLDERS else "doors"


def imports():
    """(module, module that it imports, name) of each import in the package."""
    known = modules()
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                pairs = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                pairs = [(node.module, alias.name) for alias in node.names]
            else:
                continue
            for target, name in pairs:
                package, _, rest = target.partition(".")
                if package != ROOT.name:
                    continue
                whole = f"{rest}.{name}".strip(".")
                yield module, whole if whole in known else rest, name


def test_imports_go_down():
    assert {folder_of(x) for x in modules()} == set(FOLDERS)
    folders = {x.partition(".")[0] for x in modules() if "." in x}
    assert folders <= set(FOLDERS), "a folder that the order does not know"
    floor = {name: i for i, name in enumerate(FOLDERS)}
    upwards = [
        f"{module} imports {target}"
        for module, target, _ in imports()
        if floor[folder_of(target)] > floor[folder_of(module)]
    ]
    assert not upwards


def test_no_circle():
    graph = {name: set() for name in modules()}
    for module, target, _ in imports():
        if target and target != module:
            graph[module].add(target)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # or CycleError


def test_what_is_private_stays_in_its_folder():
    taken = [
        f"{module} takes {target}.{name}"
        for module, target, name in imports()
        if name.startswith("_")
        and not name.startswith("__")
        and folder_of(target) != folder_of(module)
    ]
    assert not taken


def test_keras_internals_are_in_one_file():
    found = [
        module
        for module, path in modules().items()
        if "keras.src" in path.read_text("utf-8")
    ]
    assert found == ["runtime.keras_internals"]


def test_this_keras_has_the_internals_and_a_missing_one_is_named(monkeypatch):
    import keras

    from keras_svdtune.runtime.keras_internals import missing_internals

    assert missing_internals() == []
    monkeypatch.delattr(keras.layers.Layer, "_untrack_variable")
    saved = "_get_embeddings_with_merged_lora"
    monkeypatch.delattr(keras.layers.Embedding, saved)
    first, second = missing_internals()
    assert "a layer has no `_untrack_variable`" in first
    assert "for quantizing a given kernel." in first
    assert f"an Embedding layer has no `{saved}`" in second


def picture():
    """The folders from the top to the bottom, as a table."""
    below = {name: set() for name in FOLDERS}
    for module, target, _ in imports():
        below[folder_of(module)].add(folder_of(target))
    rows = [("folder", "modules", "lines", "imports")]
    for folder in reversed(FOLDERS):
        paths = [p for m, p in modules().items() if folder_of(m) == folder]
        lines = sum(len(p.read_text("utf-8").splitlines()) for p in paths)
        under = [x for x in reversed(FOLDERS) if x in below[folder] - {folder}]
        rows.append((folder, str(len(paths)), str(lines), ", ".join(under)))
    return "\n".join(f"{a:8} {b:>7} {c:>6}  {d}" for a, b, c, d in rows)


if __name__ == "__main__":
    print(picture())
