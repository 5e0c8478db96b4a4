"""Writes the pages of the documentation from the package.

Each method has a page with its formula, the picture of what it trains, its
docstring and its layers. Reference pages hold every other public name, and
README.md is the front page. All of it follows from `METHODS` and
`keras_svdtune.__all__`: a new method needs no line here.

A public name that has no page, or a method without a formula or a picture,
fails the build.
"""

import importlib
import inspect
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if importlib.util.find_spec("jax") and "KERAS_BACKEND" not in os.environ:
    os.environ["KERAS_BACKEND"] = "jax"

from latex2mathml import converter  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from pictures import draw  # noqa: E402

import keras_svdtune  # noqa: E402
from keras_svdtune import METHODS  # noqa: E402
from keras_svdtune.keras_hub_methods import ON_MODELS  # noqa: E402
from keras_svdtune.layers import LAYERS  # noqa: E402
from keras_svdtune.methods.base import Method  # noqa: E402

REPOSITORY = HERE.parent


def pages() -> dict[str, str]:
    """The text of every page and picture, by its path.

    Raises:
        PluginError: a method has no formula or no picture, or a public name
            is not on exactly one page.
    """
    for cls in METHODS.values():
        if not cls.formula or not cls.picture:
            raise PluginError(
                f"{cls.__name__} needs the class attributes `formula` and "
                f"`picture`. Received: formula={cls.formula!r}, "
                f"picture={cls.picture!r}"
            )
    found = {
        "index.md": front_page(),
        "changelog.md": (REPOSITORY / "CHANGELOG.md").read_text("utf-8"),
        "methods/index.md": methods_page(),
    }
    for name, cls in METHODS.items():
        found[f"methods/{name}.md"] = method_page(cls)
        found[f"methods/{name}.svg"] = draw(cls.picture)
    for title, names in groups().items():
        found[f"reference/{title.lower()}.md"] = reference_page(title, names)
    text = "\n".join(found.values())
    counts = {
        name: len(re.findall(f"^{re.escape(heading(name))}$", text, re.M))
        for name in keras_svdtune.__all__
    }
    wrong = {name: n for name, n in counts.items() if n != 1}
    if wrong:
        raise PluginError(f"Public names that are not on one page: {wrong}")
    return found


def heading(name: str) -> str:
    """The line that the documentation of a public name begins with."""
    value = getattr(keras_svdtune, name)
    if not callable(value):
        return f"## {name}"
    # A method that another package registers is looked up there.
    outside = value.__module__.partition(".")[0] != "keras_svdtune"
    return f"::: {value.__module__ if outside else 'keras_svdtune'}.{name}"


def entry(name: str) -> str:
    """The documentation of a public name."""
    value = getattr(keras_svdtune, name)
    if not callable(value):
        return f"{heading(name)}\n\n{CONSTANTS[name]}"
    if not inspect.isclass(value):
        return heading(name)
    # Attributes are in the docstring of the class; and a method's own methods
    # are those of the base class, `Method`.
    members = [
        x
        for x, member in vars(value).items()
        if not x.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property))
        and member.__doc__
    ]
    if name in LAYERS or value in METHODS.values():
        members = []
    return f"{heading(name)}\n    options:\n      members: {members or 'false'}"


def groups() -> dict[str, list[str]]:
    """The public names that are not on a method's page, by their page."""
    found: dict[str, list[str]] = {"Model": [], "Functions": [], "Classes": []}
    on_methods_pages = {x for cls in METHODS.values() for x in names_of(cls)}
    for name in keras_svdtune.__all__:
        value = getattr(keras_svdtune, name)
        if name in on_methods_pages:
            continue
        if inspect.isclass(value) or not callable(value):
            found["Classes"].append(name)
        else:
            found["Model" if name in ON_MODELS else "Functions"].append(name)
    return found


def names_of(cls: type[Method]) -> list[str]:
    """The public names that follow from a method, in the order of its page."""
    enable = f"enable_{cls.name}"
    layers = [k for k, x in LAYERS.items() if x.method_class is cls]
    return [
        cls.__name__,
        *([enable] if enable in ON_MODELS else []),
        *sorted(layers),
    ]


def front_page() -> str:
    """README.md, its links to files of the repository as they are there."""
    text = (REPOSITORY / "README.md").read_text("utf-8")

    # Of a badge, the link around its picture too.
    return re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", r"](files/\1)", text)


def methods_page() -> str:
    """The table of methods."""
    lines = [
        "# Methods",
        "",
        "| method | trainable in a layer of 1024 x 256, rank 8 | learning rate "
        "to start from |",
        "|---|---|---|",
    ]
    for name, cls in METHODS.items():
        settings = inspect.signature(cls).parameters
        method = cls(rank=8) if "rank" in settings else cls()
        shapes = [w.shape for w in method.weights((1024, 256)) if w.trainable]
        count = sum(map(math.prod, shapes))
        lines.append(
            f"| [{cls.title}]({name}.md) | {count:,} | "
            f"{method.suggested_learning_rate:g} |"
        )
    return "\n".join(lines) + "\n"


def method_page(cls: type[Method]) -> str:
    """One method: its formula, its picture, and all that has its name."""
    formula = converter.convert(cls.formula, display="block")
    parts = [
        f"# {cls.title}",
        f"<div>{formula}</div>",
        f"![What {cls.title} trains]({cls.name}.svg)",
        *map(entry, names_of(cls)),
    ]
    return "\n\n".join(parts) + "\n"


CONSTANTS = {
    "METHODS": "A dict with the class of each method by its short name: "
    '`METHODS["svf"]` is `SVF`.',
}

INTRODUCTIONS: dict[str, str] = {
    "Model": "Methods of every KerasHub Backbone and Task, and functions that "
    "take any built `keras.Model` first. The `enable_*` of each method are on "
    "its page.",
    "Functions": "Functions of the package that are no methods of a model.",
    "Classes": "What the functions return, the callbacks, and the base class "
    "of the methods.",
}


def reference_page(title: str, names: list[str]) -> str:
    """The docstrings of some public names."""
    entries = "\n\n".join(entry(x) for x in names)
    return f"# {title}\n\n{INTRODUCTIONS[title]}\n\n{entries}\n"


def on_config(config: Any) -> Any:
    """The navigation: every page that is written."""
    generated = pages()

    def under(folder: str) -> list[str]:
        found = [x for x in generated if x.startswith(folder)]
        return [x for x in found if x.endswith(".md")]

    config.nav = [
        {"keras_svdtune": "index.md"},
        {"Methods": under("methods/")},
        {"Reference": under("reference/")},
        {"Changelog": "changelog.md"},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds what is written, and the files that README.md points to."""
    generated = pages()
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    for path in set(re.findall(r"\(files/([^)\s#]+)", generated["index.md"])):
        content = (REPOSITORY / path).read_bytes()
        files.append(File.generated(config, f"files/{path}", content=content))
    return files
