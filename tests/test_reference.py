"""The reference: every public name and every method is in it."""

import importlib.util
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

import keras_svdtune
from keras_svdtune import METHODS

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")
pytest.importorskip("matplotlib")

HOOKS = Path(__file__).parent.parent / ".docs" / "hooks.py"


@pytest.fixture(scope="module")
def hooks():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("docs_hooks", HOOKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_every_public_name_is_documented_once(hooks):
    text = "\n".join([*hooks.pages().values(), *hooks.written().values()])
    for name in keras_svdtune.__all__:
        line = re.escape(hooks.heading(name))
        assert len(re.findall(f"^{line}$", text, re.M)) == 1, name


def test_a_name_without_a_page_fails_the_build(hooks, monkeypatch):
    written = hooks.written()
    del written["reference/reports.md"]
    monkeypatch.setattr(hooks, "written", lambda: written)
    with pytest.raises(hooks.PluginError, match="Spectrum"):
        hooks.pages()


@pytest.mark.parametrize("missing", ["formula", "picture"])
def test_a_method_without_one_fails_the_build(hooks, monkeypatch, missing):
    monkeypatch.delattr(keras_svdtune.SVF, missing)
    with pytest.raises(
        hooks.PluginError, match="SVF needs the class attributes"
    ):
        hooks.pages()


@pytest.mark.parametrize("cls", METHODS.values(), ids=lambda x: x.name)
def test_page_of_a_method(hooks, cls):
    page = hooks.method_page(cls)
    assert page.startswith(f"# {cls.title}\n")
    formula = re.search(r"<math.*?</math>", page)[0]
    assert xml.etree.ElementTree.fromstring(formula).tag.endswith("math")
    assert f"]({cls.name}.svg)" in page
    picture = hooks.draw(cls.picture)
    assert xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")
    assert "#d55e00" in picture.lower()  # something trains
    assert picture == hooks.draw(cls.picture)  # always the same
    assert f"::: keras_svdtune.{cls.__name__}Dense" in page


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", ".docs/pages/guides/peft.md", "guides/peft.md"),
        ("index.md", "CHANGELOG.md", "changelog.md"),
        ("index.md", "#notebooks", "#notebooks"),
        ("index.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("guides/peft.md", "../benchmarks.md#sizes", "../benchmarks.md#sizes"),
        ("methods/svf.md", "svf.svg", "svf.svg"),
    ],
)
def test_links_of_the_site(hooks, page, link, expected):
    assert hooks.site_link(link, page) == expected
    assert hooks.site_link("x.py", "index.md") == hooks.GITHUB + "x.py"
    reference = hooks.SITE + "reference/files.html#save"
    found = hooks.site_link(reference, "guides/saving.md")
    assert found == "../reference/files.md#save"


def test_public_docstrings():
    for name in keras_svdtune.__all__:
        value = getattr(keras_svdtune, name)
        assert not callable(value) or value.__doc__, name
