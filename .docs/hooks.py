"""Adds to the written pages in `pages` those that follow from the package.

Each method has a page with its formula, the picture of what it trains, its
docstring and its layers. These follow from `METHODS`: a new method needs no
line here. README.md is the front page, and the tables that benchmarks wrote
are pages too.

Links are written as they work in the repository, and become links of the
site. A public name that is not on exactly one page, or a method without a
formula or a picture, fails the build.
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
from keras_svdtune.demo.train import make_method  # noqa: E402
from keras_svdtune.keras_hub_methods import ON_MODELS  # noqa: E402
from keras_svdtune.layers import LAYERS  # noqa: E402
from keras_svdtune.methods.base import Method  # noqa: E402

REPOSITORY = HERE.parent
PAGES = HERE / "pages"
SITE = "https://keras-svdtune.github.io/keras_svdtune/"
GITHUB = "https://github.com/keras-svdtune/keras_svdtune/blob/main/"

# Files of the repository that are pages.
RESULTS = "tests/benchmarks/results"
FROM_REPOSITORY = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    f"{RESULTS}/compare.md": "benchmarks/steps.md",
    f"{RESULTS}/study.md": "benchmarks/study.md",
    f"{RESULTS}/scale.md": "benchmarks/scale.md",
    f"{RESULTS}/distribution_gemma2_9b_v5e_2x4.md": "benchmarks/tpu_slice.md",
    f"{RESULTS}/distribution_llama3_small_cpu.md": "benchmarks/cpu_devices.md",
}
# The methods in README.md's order; others follow.
ORDER = (
    *("lora", "svf", "svft", "lora_xs", "pissa", "milora", "dora", "adalora"),
    *("mica", "psoft", "oplora", "eva", "corda", "lora_ga"),
)

NAVIGATION: list[dict[str, str | list[str]]] = [
    {"Start": "index.md"},
    {
        "Guides": [
            f"guides/{x}.md"
            for x in (
                *("choosing", "answers", "saving", "many", "quantized"),
                *("devices", "your_own", "new_method", "peft", "limits"),
            )
        ]
    },
    {"Methods": "methods/"},
    {
        "Reference": [
            f"reference/{x}.md"
            for x in (
                *("enabling", "training", "files", "many", "reports"),
                *("converting", "devices", "methods"),
            )
        ]
    },
    {"Benchmarks": ["benchmarks.md", "benchmarks/"]},
    {"Changelog": "changelog.md"},
]


def pages() -> dict[str, str]:
    """The text of every page and picture that is not in `pages`, by its path.

    Raises:
        PluginError: a method has no formula or no picture, or a public name
            is not on exactly one page.
    """
    for cls in methods().values():
        if not cls.formula or not cls.picture:
            raise PluginError(
                f"{cls.__name__} needs the class attributes `formula` and "
                f"`picture`. Received: formula={cls.formula!r}, "
                f"picture={cls.picture!r}"
            )
    found = {
        page: (REPOSITORY / file).read_text("utf-8")
        for file, page in FROM_REPOSITORY.items()
    }
    found["methods/index.md"] = methods_page()
    for name, cls in methods().items():
        found[f"methods/{name}.md"] = method_page(cls)
        found[f"methods/{name}.svg"] = draw(cls.picture)
    text = "\n".join([*found.values(), *written().values()])
    counts = {
        name: len(re.findall(f"^{re.escape(heading(name))}$", text, re.M))
        for name in keras_svdtune.__all__
    }
    wrong = {name: n for name, n in counts.items() if n != 1}
    if wrong:
        raise PluginError(f"Public names that are not on one page: {wrong}")
    return found


def methods() -> dict[str, type[Method]]:
    """The registered methods, in the order of the documentation."""
    names = dict.fromkeys([*ORDER, *METHODS])
    return {name: METHODS[name] for name in names if name in METHODS}


def written() -> dict[str, str]:
    """The text of the pages in `pages`."""
    return {
        file.relative_to(PAGES).as_posix(): file.read_text("utf-8")
        for file in sorted(PAGES.rglob("*.md"))
    }


def heading(name: str) -> str:
    """The line that the documentation of a public name begins with."""
    value = getattr(keras_svdtune, name)
    if not callable(value):
        return f"## {name}"
    # A method that another package registers is looked up there.
    outside = value.__module__.partition(".")[0] != "keras_svdtune"
    return f"::: {value.__module__ if outside else 'keras_svdtune'}.{name}"


def entry(name: str) -> str:
    """The documentation of a public name that is a function or a class."""
    value = getattr(keras_svdtune, name)
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


def names_of(cls: type[Method]) -> list[str]:
    """The public names that follow from a method, in the order of its page."""
    enable = f"enable_{cls.name}"
    layers = [k for k, x in LAYERS.items() if x.method_class is cls]
    return [
        *([enable] if enable in ON_MODELS else []),
        cls.__name__,
        *sorted(layers),
    ]


def methods_page() -> str:
    """The table of methods."""
    lines = [
        "# Methods",
        "",
        "| method | trainable in a layer of 1024 x 256, rank 8 | learning rate "
        "to start from |",
        "|---|---|---|",
    ]
    for name, cls in methods().items():
        method = make_method(name)
        shapes = [w.shape for w in method.weights((1024, 256)) if w.trainable]
        count = sum(map(math.prod, shapes))
        lines.append(
            f"| [{cls.title}]({name}.md) | {count:,} | "
            f"{method.suggested_learning_rate:g} |"
        )
    return "\n".join(lines) + "\n"


def method_page(cls: type[Method]) -> str:
    """One method: its call, formula and picture, and all that has its name."""
    call = f"enable_{cls.name}({cls.example.removeprefix(', ')})"
    if not cls.has_enable:
        settings = cls.example.removeprefix(", ")
        call = f"enable_adapter(keras_svdtune.{cls.__name__}({settings}))"
    # In parts, which a narrow page has below each other.
    formula = "".join(
        converter.convert(part, display="block")
        for part in re.split(r"\\q?quad", cls.formula)
    )
    parts = [
        f"# {cls.title}",
        f"```python\nmodel.backbone.{call}\n```",
        f'<div class="formula">{formula}</div>',
        f"![What {cls.title} trains]({cls.name}.svg)",
        *map(entry, names_of(cls)),
    ]
    return "\n\n".join(parts) + "\n"


def site_link(link: str, page: str) -> str:
    """A link of the site for one that works in the repository."""
    if link.startswith(SITE):
        path, hash_, anchor = link.removeprefix(SITE).partition("#")
        target = path.replace(".html", ".md") or "index.md"
    elif re.match(r"#|\w+:", link):
        return link
    else:
        sources = {page: file for file, page in FROM_REPOSITORY.items()}
        source = sources.get(page, f".docs/pages/{page}")
        path, hash_, anchor = link.partition("#")
        file = os.path.normpath(os.path.join(os.path.dirname(source), path))
        target = FROM_REPOSITORY.get(file, "")
        if file.startswith(".docs/pages/"):
            target = file.removeprefix(".docs/pages/")
        if not target:
            return GITHUB + file + hash_ + anchor
    return os.path.relpath(target, os.path.dirname(page)) + hash_ + anchor


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links into those of the site, and fills in the reference."""

    def link(found: re.Match[str]) -> str:
        if found[1] is None:  # a block of code
            return found[0]
        return f"]({site_link(found[1], page.file.src_uri)})"

    code_or_link = r"^```.*?^```$|\]\(([^)\s]+)\)"
    text = re.sub(code_or_link, link, markdown, flags=re.M | re.S)
    if not page.file.src_uri.startswith("reference/"):
        return text
    return re.sub(
        r"^::: keras_svdtune\.(\w+)$", lambda x: entry(x[1]), text, flags=re.M
    )


def on_config(config: Any) -> Any:
    """The navigation. What docstrings of functions repeat is left out."""
    for cls in METHODS.values():
        enable = ON_MODELS.get(f"enable_{cls.name}")
        if enable is not None:
            enable.__doc__ = (
                f"Enables {cls.title} on a model, as `enable_adapter` does.\n\n"
                "`model` and `target_layer_names` are as there; the others are "
                f"the settings of `{cls.__name__}`, below."
            )
    generated = [x for x in pages() if x.endswith(".md")]

    def listed(entries: str | list[str]) -> str | list[str]:
        if isinstance(entries, str) and entries.endswith("/"):
            return [x for x in generated if x.startswith(entries)]
        if isinstance(entries, str):
            return entries
        return [y for x in entries for y in as_list(listed(x))]

    config.nav = [
        {title: listed(entries)}
        for section in NAVIGATION
        for title, entries in section.items()
    ]
    return config


def as_list(entries: str | list[str]) -> list[str]:
    """A list of one page or of several."""
    return [entries] if isinstance(entries, str) else entries


def on_files(files: Files, config: Any) -> Files:
    """Adds what follows from the package and the repository."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files
