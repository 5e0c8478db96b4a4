"""README.md and the pages of the documentation hold what they say.

Code runs as it is written, from the top of a page to its end; links, commands,
files and figures are what they are. No network here, as in CI: SmolLM2 is a
Llama of a few thousand weights, and addresses are looked at, not opened.
"""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.parse
from pathlib import Path

import keras_hub
import pytest

import keras_svdtune

ROOT = Path(__file__).parent.parent
DOCS = ROOT / ".docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
}
README = PAGES["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
HOSTS = {
    "ai.google.dev",
    "arxiv.org",
    "colab.research.google.com",
    "img.shields.io",
    "keras-svdtune.github.io",
}


def blocks(page, *languages):
    """The blocks of code of a page, and all of them if no language is given."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S)
    return [code for x, code in found if not languages or x in languages]


def prose(page):
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)


INLINE = [x for page in PAGES for x in re.findall(r"`([^`\n]+)`", prose(page))]
COMMANDS = blocks("README.md", "bash")
CODE = [page for page in PAGES if blocks(page, "python")]
# These change the process: its devices, its methods.
ALONE = {".docs/pages/guides/devices.md", ".docs/pages/guides/new_method.md"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny Llama, converted as the demo converts SmolLM2."""
    for module in ("arrr", "chatterbot_corpus", "gguf", "tokenizers", "yaml"):
        pytest.importorskip(module)
    from demo.tiny_llama_gguf import write_tiny_llama

    from keras_svdtune.demo.weights import gguf_to_hf

    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder / "tiny.gguf")
    gguf_to_hf.convert(folder / "tiny.gguf", folder / "converted")
    return folder / "converted"


@pytest.fixture
def hubs(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("kagglehub")
    import hub_stand_in

    with hub_stand_in.hugging_face(monkeypatch, tmp_path):
        yield


@pytest.mark.filterwarnings("ignore:Use 'content=")  # Hugging Face's client's
@pytest.mark.parametrize("page", sorted(set(CODE) - ALONE))
def test_code_runs(page, llama, hubs, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from keras_svdtune.demo import weights
    from keras_svdtune.demo.weights import gguf_to_hf

    monkeypatch.setattr(weights, "load_model", lambda _: gguf_to_hf.load(llama))
    monkeypatch.setenv("KERAS_BACKEND", os.environ["KERAS_BACKEND"])
    monkeypatch.chdir(tmp_path)
    scope = {}
    for code in blocks(page, "python"):
        if "poet" in code and page == "README.md":  # somebody else's file
            scope["model"].backbone.save_adapter("poet.safetensors")
        exec(compile(code, page, "exec"), scope)


@pytest.mark.parametrize("page", sorted(ALONE))
def test_code_runs_alone(page, llama, tmp_path):
    if os.environ["KERAS_BACKEND"] != "jax" and "devices" in page:
        pytest.skip("keras.distribution is JAX's")
    stand_in = f"""
import keras_svdtune.demo.weights as weights
from keras_svdtune.demo.weights import gguf_to_hf
weights.load_model = lambda _: gguf_to_hf.load(gguf_to_hf.Path({str(llama)!r}))
"""
    code = "".join(blocks(page, "python"))
    if "load_model" in code:
        code = stand_in + code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def known(name):
    """What a function of the text is, or None."""
    found = getattr(keras_svdtune, name, None)
    return found or getattr(keras_hub.models.Backbone, name, None)


def check_call(call):
    """Whether a call of the text fits a function of ours; None if none."""
    name = ast.unparse(call.func).rpartition(".")[2]
    value = known(name)
    if not callable(value):
        return None
    names = [x.arg for x in call.keywords if x.arg]
    signature = inspect.signature(value)
    of_a_model = hasattr(keras_hub.models.Backbone, name)
    # Without the model too: in the text `estimate(model, ...)` has it.
    for first in ([], [None]) if of_a_model else ([],):
        try:
            given = [*first, *(x for x in call.args if not is_ellipsis(x))]
            signature.bind_partial(*given, **dict.fromkeys(names))
        except TypeError as error:
            problem = error
        else:
            return True
    raise AssertionError(f"{ast.unparse(call)}: {problem}")


def is_ellipsis(node):
    return isinstance(node, ast.Constant) and node.value is ...


def calls_in(code):
    """The calls in a piece of code; none if it is no Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    return [x for x in ast.walk(tree) if isinstance(x, ast.Call)]


def test_calls_in_the_text_are_of_functions_that_exist():
    calls = [x for code in INLINE for x in calls_in(code)]
    checked = [x for x in calls if check_call(x)]
    names = {ast.unparse(x.func).rpartition(".")[2] for x in checked}
    assert {"enable_svf", "enable_pissa", "to_lora", "LoRA"} <= names
    for call in calls:
        name = ast.unparse(call.func).rpartition(".")[2]
        ours = name.startswith("enable_") and name != "enable_lora"
        assert not ours or known(name), name
    (call,) = calls_in("enable_svf(alpha=8)")
    with pytest.raises(AssertionError, match="alpha"):
        check_call(call)


def slugs(page):
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {
        re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        parts = urllib.parse.urlsplit(link)
        target = page
        if parts.scheme:
            assert parts.scheme == "https" and parts.hostname in HOSTS, link
            assert not re.search(r"[\s<>\"{}|\\^`]", link)
            if parts.hostname == "arxiv.org":
                assert re.fullmatch(r"/abs/\d{4}\.\d{5}", parts.path)
            continue
        if parts.path:
            path = (ROOT / page).parent.joinpath(parts.path).resolve()
            assert path.exists(), link
            target = path.relative_to(ROOT).as_posix()
        if parts.fragment:
            assert parts.fragment in slugs(target), link


def test_files_and_modules_in_the_text():
    code = [*INLINE, *(x for page in PAGES for x in blocks(page))]
    paths = r"(?<![\w/.:])((?:tests|keras_svdtune|\.docs|\.ci)/[\w./-]*)"
    found = {path for x in code for path in re.findall(paths, x)}
    assert len(found) > 10
    assert not [x for x in found if not (ROOT / x).exists()]
    modules = {m for x in code for m in re.findall(r"python -m ([\w.]+)", x)}
    assert "keras_svdtune.demo" in modules
    for module in modules:
        if module.startswith("keras_svdtune"):
            assert importlib.util.find_spec(module), module


def test_commands():
    code = [*INLINE, *COMMANDS]
    extras = {
        extra
        for x in code
        for found in re.findall(r"(?:\.|keras_svdtune)\[([\w,]+)\]", x)
        for extra in found.split(",")
    }
    assert {"jax", "demo", "test"} <= extras
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    python = "python" + PROJECT["project"]["requires-python"].strip(">=")
    fresh = [x for x in COMMANDS if x.startswith(f"{python} -m venv .venv")]
    demo, tests = (x.strip().rpartition(" && ")[2] for x in fresh)
    assert demo == ".venv/bin/python -m keras_svdtune.demo"
    assert tests == ".venv/bin/python -m pytest"
    pytest.importorskip("matplotlib")
    from keras_svdtune.demo.__main__ import parser

    for x in code:
        for arguments in re.findall(r"-m keras_svdtune\.demo( [^`&\n]*)?$", x):
            parser().parse_args(shlex.split(arguments))


def test_badges_say_what_the_project_says():
    links = re.findall(r"\]\((https://img.shields.io[^)\s]+)\)", README)
    badges = urllib.parse.unquote("".join(links))
    project = PROJECT["project"]
    python = project["requires-python"].removeprefix(">=")
    needs = dict(x.split(">=") for x in project["dependencies"] if ">=" in x)
    assert f"python-{python}+" in badges
    assert f"keras-{needs['keras']}+" in badges
    versions = f"Python {python}, Keras {needs['keras']} and KerasHub "
    assert versions + needs["keras-hub"] in README
    assert project["license"].replace("-", "--") in badges
    script = (ROOT / ".ci/run").read_text("utf-8")
    for backend in ("jax", "tensorflow", "torch"):
        assert backend in badges and backend in script
    version = keras_svdtune.__version__
    assert f"version = {{{version}}}" in README
    citation = (ROOT / ".github/CITATION.cff").read_text("utf-8")
    assert f"\nversion: {version}\n" in citation


def test_methods_and_their_papers():
    rows = [x for x in README.splitlines() if x.startswith("| `enable_")]
    assert len(rows) == len(keras_svdtune.METHODS)
    for cls in keras_svdtune.METHODS.values():
        call = f"enable_{cls.name}(" if cls.has_enable else f"({cls.title}("
        (row,) = [x for x in rows if call in x]
        papers = re.findall(r"abs/\d+\.\d+", cls.__doc__)
        assert any(x in row for x in papers), cls


def test_figures_of_the_readme():
    path = ROOT / "tests/benchmarks/results/study.json"
    task = json.loads(path.read_text())["smollm2_135m, pirate, 120"]
    for name in ("svf", "lora:rank=8", "lora:rank=1"):
        found = task["methods"][name]
        assert f"{found['trained']:,}" in README
        assert f"{found['file_bytes'] / 1024:,.0f}" in README
    at_its_loss = task["methods"]["svf"]["lora_forgets"]
    assert f"LoRA forgets {at_its_loss:.2f}." in README


def test_tables_of_the_benchmarks_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import tables

    named = []
    for path in tables.PAGES:
        page = path.read_text("utf-8")
        named += re.findall(r"<!-- table: (\w+) -->", page)
        assert tables.filled(page) == page, "run `python .docs/tables.py`"
    assert sorted(named) == sorted(tables.TABLES)
