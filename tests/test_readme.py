"""README.md holds what it says: code, links, commands, files, figures.

No network here, as in CI: an address is looked at, not opened.
"""

import ast
import inspect
import json
import re
import shlex
import tomllib
import urllib.parse
from pathlib import Path

import keras_hub
import numpy as np
import pytest
from helpers import randomise

import keras_svdtune

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
RESULTS = ROOT / "tests/benchmarks/results"

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [code for language, code in BLOCKS if language == "bash"]
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
LINKS = re.findall(r"\]\(([^)\s]+)\)", TEXT)
HOSTS = {
    "ai.google.dev",
    "arxiv.org",
    "colab.research.google.com",
    "img.shields.io",
}


def batches():
    """Token ids and the next ones."""
    import tensorflow as tf

    ids = np.random.default_rng(0).integers(1, 32, (4, 9))
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((4, 8), "int32")}
    return tf.data.Dataset.from_tensor_slices((x, ids[:, 1:])).batch(2)


def tiny_gemma3(*preset):
    """A model of the class in the README, with a few thousand weights."""
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=32,
        image_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        head_dim=4,
    )
    randomise(backbone)
    return keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=None)


class FitForTiny(ast.NodeTransformer):
    """`loss=...` becomes a loss, and a large rank a small one."""

    def visit_Constant(self, node):
        if node.value is ...:
            return ast.copy_location(
                ast.parse(
                    "keras.losses.SparseCategoricalCrossentropy("
                    "from_logits=True)",
                    mode="eval",
                ).body,
                node,
            )
        return node

    def visit_keyword(self, node):
        self.generic_visit(node)
        if node.arg == "rank":
            node.value = ast.copy_location(ast.Constant(2), node.value)
        return node


def known(name):
    """What a function of the README is, or None."""
    found = getattr(keras_svdtune, name, None)
    return found or getattr(keras_hub.models.Backbone, name, None)


def check_call(call):
    """Whether a call of the README fits a function of ours; None if none."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else None
    if isinstance(function, ast.Name):
        name = function.id
    value = known(name or "")
    if not callable(value):
        return None
    given = [x for x in call.args if not _is_ellipsis(x)]
    names = [x.arg for x in call.keywords if x.arg]
    signature = inspect.signature(value)
    takes_model = next(iter(signature.parameters), "") in ("model", "self")
    model = [None] if takes_model and function_of_a_model(name) else []
    # Without the model too: in the text `estimate(model, ...)` has it.
    for first in ([], model):
        try:
            signature.bind_partial(*first, *given, **dict.fromkeys(names))
        except TypeError as error:
            problem = error
        else:
            return True
    raise AssertionError(f"{ast.unparse(call)}: {problem}")


def function_of_a_model(name):
    return hasattr(keras_hub.models.Backbone, name)


def _is_ellipsis(node):
    return isinstance(node, ast.Constant) and node.value is ...


def calls_in(code):
    """The calls in a piece of code; none if it is no Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    return [x for x in ast.walk(tree) if isinstance(x, ast.Call)]


def test_first_block_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        keras_hub.models.Gemma3CausalLM, "from_preset", tiny_gemma3
    )
    tree = ast.fix_missing_locations(FitForTiny().visit(ast.parse(PYTHON[0])))
    scope = {"data": batches()}
    exec(compile(tree, "README.md", "exec"), scope)
    assert (tmp_path / "pirate.safetensors").stat().st_size < 20_000
    # Merged: a plain model again.
    with pytest.raises(ValueError, match="has no adapter"):
        keras_svdtune.adapter_summary(scope["gemma"])


def test_quantized_block_runs(capsys):
    (code,) = [x for x in PYTHON if "quantize=" in x]
    tree = ast.fix_missing_locations(FitForTiny().visit(ast.parse(code)))
    exec(compile(tree, "README.md", "exec"), {"gemma": tiny_gemma3()})
    assert "quantization error" in capsys.readouterr().out


def test_every_block_of_python_is_valid():
    assert len(PYTHON) == 5
    checked = [check_call(x) for code in PYTHON for x in calls_in(code)]
    assert checked.count(True) >= 6


def test_calls_in_the_text_are_of_functions_that_exist():
    calls = [x for code in INLINE for x in calls_in(code)]
    checked = [x for x in calls if check_call(x)]
    names = {ast.unparse(x.func).rsplit(".", 1)[-1] for x in checked}
    assert {"enable_svf", "enable_pissa", "compose", "spectrum"} <= names
    assert len(names) > 25
    for call in calls:
        name = ast.unparse(call.func).rsplit(".", 1)[-1]
        ours = name.startswith("enable_") and name != "enable_lora"
        assert not ours or known(name), name


def test_a_call_that_does_not_fit_is_noticed():
    (call,) = calls_in("enable_svf(rank=8)")
    with pytest.raises(AssertionError, match="rank"):
        check_call(call)


def slugs():
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", PROSE, re.M)
    return {
        re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings
    }


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_links(link):
    parts = urllib.parse.urlsplit(link)
    if parts.scheme:
        assert parts.scheme == "https" and parts.hostname in HOSTS
        assert not re.search(r"[\s<>\"{}|\\^`]", link)
        if parts.hostname == "arxiv.org":
            assert re.fullmatch(r"/abs/\d{4}\.\d{5}", parts.path)
    elif link.startswith("#"):
        assert link[1:] in slugs()
    else:
        assert (ROOT / parts.path).is_file()


def test_files_and_modules_in_the_text():
    code = [*INLINE, *(x for _, x in BLOCKS)]
    found = {
        path
        for x in code
        for path in re.findall(
            r"(?<![\w/.:])((?:tests|keras_svdtune|\.docs|\.ci)/[\w./-]*)", x
        )
    }
    assert len(found) > 10
    for path in found:
        assert (ROOT / path).exists() or path == (
            "keras_svdtune/decompositions"
        ), path
    modules = {m for x in code for m in re.findall(r"python -m ([\w.]+)", x)}
    assert "keras_svdtune.demo" in modules
    for module in modules:
        if module.startswith("keras_svdtune"):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), module


def test_commands():
    assert len(COMMANDS) == 2
    code = [*INLINE, *COMMANDS]
    extras = {
        extra
        for x in code
        for found in re.findall(r"(?:\.|keras_svdtune)\[([\w,]+)\]", x)
        for extra in found.split(",")
    }
    assert {"jax", "demo", "test", "docs"} <= extras
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    for x in code:
        for arguments in re.findall(r"-m keras_svdtune\.demo( [^`&\n]*)?$", x):
            pytest.importorskip("matplotlib")
            from keras_svdtune.demo.__main__ import parser

            filled = arguments.replace("NAME", "gemma3_1b")
            parser().parse_args(shlex.split(filled))


def test_badges_say_what_the_project_says():
    badges = "".join(x for x in LINKS if "img.shields.io" in x)
    badges = urllib.parse.unquote(badges)
    project = PROJECT["project"]
    python = project["requires-python"].removeprefix(">=")
    (keras_version,) = [
        x.removeprefix("keras>=")
        for x in project["dependencies"]
        if x.startswith("keras>=")
    ]
    assert f"python-{python}+" in badges
    assert f"keras-{keras_version}+" in badges
    assert project["license"].replace("-", "--") in badges
    script = (ROOT / ".ci/run").read_text("utf-8")
    for backend in ("jax", "tensorflow", "torch"):
        assert backend in badges and backend in script
    assert f"version = {{{keras_svdtune.__version__}}}" in TEXT


def tables():
    """(section, rows of cells) of each table."""
    section, rows = "", []
    for line in [*PROSE.splitlines(), ""]:
        if line.startswith("#"):
            section = line.lstrip("# ")
        if line.startswith("|"):
            rows.append([x.strip() for x in line.strip("|").split("|")])
        elif rows:
            yield section, rows
            rows = []


def text_of(section):
    """The text from a heading to the next one of the same rank or a higher."""
    start = re.search(rf"^(#+) {re.escape(section)}$", TEXT, re.M)
    end = re.compile(rf"^#{{1,{len(start[1])}}} ", re.M)
    found = end.search(TEXT, start.end())
    return TEXT[start.end() : found.start() if found else len(TEXT)]


def test_tables_of_figures_name_the_command_that_made_them():
    checked = 0
    for section, rows in tables():
        cells = [x for row in rows[2:] for x in row[1:]]
        figures = [x for x in cells if re.match(r"\d[\d.,]*( %)?$", x)]
        if len(figures) < len(rows):
            continue
        checked += 1
        text = text_of(section)
        named = re.findall(r"tests/benchmarks/(\w+)\.py", text)
        if "keras_svdtune.demo" in text:
            named.append("demo_smollm2_135m")
        if "scale.md" in text:
            named.append("scale")
        assert named, section
        stems = {name.split("_")[0] for name in named}
        assert any(list(RESULTS.glob(f"{x}*")) for x in stems), section
    assert checked >= 5


def test_figures_of_the_demo_are_those_of_its_results():
    found = json.loads((RESULTS / "demo_smollm2_135m.json").read_text())
    (rows,) = [
        x
        for s, x in tables()
        if s == "What they learn" and (x[0][-1] == "dialect")
    ]
    by_title = {row[0].split(",")[0]: row for row in rows[2:]}
    assert by_title.pop("base model")[3] == f"{found['base']['loss']:.3f}"
    assert len(by_title) == len(found["methods"])
    for name, x in found["methods"].items():
        row = by_title[keras_svdtune.METHODS[name].title]
        assert row[1] == f"{x['trainable']:,}"
        assert row[2] == f"{x['file_bytes'] / 1024:,.0f}"
        assert row[3] == f"{x['loss']:.3f}"
        assert row[4] == f"{x['dialect']:.1%}".replace("%", " %")
        assert x["reloaded_agree"] == x["merged_agree"] == x["answers"] == 19


def test_step_times_are_those_of_the_results():
    path = RESULTS / "step_time_gemma3_270m_jax.json"
    results = json.loads(path.read_text())["results"]
    (rows,) = [x for _, x in tables() if x[0][-1].startswith("temporary bytes")]
    written = {
        row[0].replace("`", "").replace(", replace", " replace"): row[1:]
        for row in rows[2:]
    }
    expected = {
        name.replace("=true", ""): [
            f"{x['seconds_to_lora']:.2f}",
            f"{x['cpu_seconds_to_lora']:.2f}",
            f"{x['seconds_to_floor']:.2f}",
            f"{x['flops'] / 1e9:,.0f}",
            f"{x['temp_bytes_to_lora']:.2f}",
        ]
        for name, x in results.items()
    }
    assert written == expected


def test_steps_of_single_layers_are_those_of_the_results():
    (rows,) = [x for _, x in tables() if x[0][:2] == ["", "matrix"]]
    named = ["LoRA (rank 8)", "SVF", "SVF replace_kernel=true"]
    for _, matrix, *cells in rows[2:]:
        paths = [
            RESULTS / f"step_time_{matrix.replace(' ', '')}_jax_{tokens}.json"
            for tokens in (512, 4096)
        ]
        results = [
            json.loads(path.read_text())["results"]
            for path in paths
            if path.exists()
        ]
        for name, cell in zip(named, cells, strict=True):
            ratios = (f"{x[name]['seconds_to_lora']:.2f}" for x in results)
            assert cell == " / ".join(ratios), matrix
    assert len(rows) == 2 + 9


def test_figures_of_the_methods_are_those_of_the_model():
    results = json.loads((RESULTS / "scale.json").read_text())
    counts = {
        name.split(" (")[0]: x["trainable"]
        for name, x in results["models"]["gemma2_9b"]["results"].items()
    }
    (rows,) = [x for section, x in tables() if section == "The methods"]
    column = rows[0].index("on Gemma 2 9B")
    assert len(rows) - 2 == len(keras_svdtune.METHODS)
    for cls in keras_svdtune.METHODS.values():
        call = f"enable_{cls.name}(" if cls.has_enable else f"({cls.title}("
        (row,) = [x for x in rows if call in x[0]]
        assert row[column] == f"{counts[cls.title]:,}"
        rates = re.findall(r"\de-\d", row[column + 1])
        assert f"{cls_rate(cls):.0e}".replace("e-0", "e-") in rates
        assert any(
            x in row[-1] for x in re.findall(r"abs/\d+\.\d+", cls.__doc__)
        )


def cls_rate(cls):
    """The suggested learning rate of a method with its defaults."""
    settings = inspect.signature(cls).parameters
    method = cls(rank=8) if "rank" in settings else cls()
    return method.suggested_learning_rate


def test_steps_on_a_slice_are_those_of_the_results():
    path = RESULTS / "distribution_gemma2_9b_v5e_2x4.json"
    found = json.loads(path.read_text())["meshes"]["1,8, 1 x 1024"]
    (rows,) = [x for _, x in tables() if x[0][-1].startswith("largest batch")]
    page = path.with_suffix(".md").read_text()
    named = {
        "frozen model": "base model",
        "Keras `enable_lora(8)`": "Keras enable_lora(8)",
    }
    checked = set()
    for first, *cells in rows[2:]:
        short = first.removesuffix(" (rank 8)").split(", ")
        for title in short if len(short) > 1 else [first]:
            key = named.get(title, title)
            key = key if key in found else f"{key} (rank 8)"
            x = found[key]
            checked.add(key)
            if cells[0]:  # bases and trainables, beside the frozen model
                assert cells[1] == f"{x['optimizer'] / 1e9:.3f}"
            assert cells[2] == f"{x['peak'] / 1e9:.2f}", key
            assert cells[3] == f"{x['collectives']:,.0f}", key
            assert cells[4] == f"{x['collective bytes'] / 1e9:.1f}", key
            (row,) = [r for r in page.splitlines() if r.startswith(f"| {key} ")]
            assert cells[5] == row.split("|")[-2].strip(), key
    assert checked == set(found)
