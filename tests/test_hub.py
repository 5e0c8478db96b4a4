"""Adapters pushed to the hubs, and loaded from them: `hub_stand_in.py` plays
the hubs, so none of this says how the live services behave."""

import json
import pathlib
import re
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from helpers import (
    adapted,
    assert_close,
    assert_differ,
    assert_same,
    default_methods,
    eager,
    method_id,
    must_stay,
    perturb,
    randomise,
    small_data,
    small_model,
    tiny_gemma,
    tokens,
    trainables,
)

import keras_svdtune
from keras_svdtune import SVF, LoRA, load_adapter, push_adapter
from keras_svdtune.files import hub, hub_client

pytest.importorskip("huggingface_hub")
kagglehub = pytest.importorskip("kagglehub")
import hub_stand_in  # noqa: E402

once = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="knows no backend: on JAX"
)
pytestmark = [
    pytest.mark.xdist_group("hub"),
    pytest.mark.filterwarnings("ignore:Use 'content="),  # the client's
]

X, _ = small_data()
HF, KAGGLE = "hf://user/pirate", "kaggle://user/pirate/keras/small"
FILE, FILES = "adapter.safetensors", {"adapter.safetensors", "README.md"}


@pytest.fixture
def hf(monkeypatch, tmp_path):
    with hub_stand_in.hugging_face(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    return hub_stand_in.kaggle(monkeypatch, tmp_path)


def fresh(make=small_model):
    keras.backend.clear_session(free_memory=False)
    return make()


def trained(make=small_model, method=None, seed=1):
    model = fresh(make)
    keras_svdtune.enable_adapter(model, method or SVF())
    perturb(model, seed)
    return model


def gemma():
    return tiny_gemma(num_layers=1)


@pytest.fixture(scope="module")
def models():
    """One without an adapter and one with; nobody may change them."""
    return {False: fresh(), True: trained()}


def refused(model, parts, function, *args, error=ValueError, **kwargs):
    """It is an error that says `parts`, and the model stays as it is."""
    learned = trainables(model)
    with must_stay(model, X, compiled=False):
        with pytest.raises(error) as caught:
            function(model, *args, **kwargs)
        assert_same(trainables(model), learned)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_round_trip(hf, tmp_path):
    model = trained(gemma)
    with must_stay(model, tokens(), compiled=False):
        model.push_adapter(HF)
    model.save_adapter(tmp_path / FILE)
    assert set(hf.files()) == FILES
    assert hf.files()[FILE] == (tmp_path / FILE).read_bytes()
    for _ in range(2):
        again = fresh(gemma)
        base = eager(again, tokens())
        again.load_adapter(HF)
        assert_same(eager(again, tokens()), eager(model, tokens()))
        assert_differ(eager(again, tokens()), base)
        hf.fail[""] = (503, b"")  # the second time it is in the cache


@once
def test_a_repository_of_peft(hf):
    """It has no `adapter.safetensors`, but the two files of a folder."""
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=32,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
    )
    randomise(backbone)
    ids = tokens()
    base = eager(backbone, ids)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    arrays = {f"{key}A.weight": (2, 16), f"{key}B.weight": (16, 2)}
    rng = np.random.default_rng(0)
    arrays = {
        k: rng.standard_normal(shape).astype("float32")
        for k, shape in arrays.items()
    }
    config = {"peft_type": "LORA", "lora_alpha": 2}
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors.numpy.save(arrays),
    }
    hf.repos["user/peft"] = {"private": False, "history": [files]}
    backbone.load_adapter("hf://user/peft")
    assert_differ(eager(backbone, ids), base)
    assert set(adapted(backbone)) == {
        x for x in adapted(backbone) if x.endswith("query")
    }
    backbone.remove_adapter()
    del files["adapter_config.json"]
    hf.repos["user/half"] = {"private": False, "history": [files]}
    with pytest.raises(ValueError, match="no file 'adapter.safetensors'"):
        backbone.load_adapter("hf://user/half")


@once
def test_both_hubs(hf, kaggle):
    """The newest and older versions of each, and a sum of the two."""
    models, versions = [], []
    for seed in (1, 2):
        models.append(trained(seed=seed))
        for uri in (HF, KAGGLE):
            push_adapter(models[-1], uri)
        versions.append((f"{HF}@{hf.head()}", f"{KAGGLE}/{seed}"))
    folder = kaggle / "user/pirate/keras/small/2"
    assert {x.name for x in folder.iterdir()} == FILES
    assert (folder / FILE).read_bytes() == hf.files()[FILE]
    assert f'(model, "{KAGGLE}")' in (folder / "README.md").read_text()
    for model, uris in zip(models, versions, strict=True):
        newest = (HF, KAGGLE) if model is models[-1] else ()
        for uri in (*uris, *newest):
            again = fresh()
            load_adapter(again, uri)
            assert_same(eager(again, X), eager(model, X), uri)
    again = fresh()
    load_adapter(again, keras_svdtune.compose({HF: 0.25, KAGGLE: 0.75}))
    assert_close(eager(again, X), eager(models[-1], X), 1e-5)


@once
def test_one_of_several(hf, tmp_path):
    model = fresh()
    for seed, name in enumerate(("pirate", "poet")):
        keras_svdtune.enable_svf(model, name=name)
        perturb(model, seed + 1)
    poet = eager(model, X)
    with must_stay(model, X, compiled=False):
        push_adapter(model, HF, name="pirate")
    keras_svdtune.save_adapter(model, tmp_path / FILE, name="pirate")
    assert hf.files()[FILE] == (tmp_path / FILE).read_bytes()
    refused(model, ["no adapter 'x'"], push_adapter, HF, name="x")
    assert_same(eager(model, X), poet)
    # A sum that trained is what is set, and lost unless it is in a file.
    keras_svdtune.set_adapter(model, {"pirate": 0.5, "poet": 0.5})
    perturb(model, 5)
    push_adapter(model, HF, name="poet")
    with pytest.raises(ValueError, match="would be lost"):
        keras_svdtune.set_adapter(model, "poet")
    push_adapter(model, HF)
    learned = eager(model, X)
    keras_svdtune.set_adapter(model, "poet")
    again = fresh()
    load_adapter(again, HF)
    assert_same(eager(again, X), learned)


# The card.


@once
def test_the_card(hf):
    push_adapter(trained(), HF, include_basis=True)
    assert (
        hf.files()["README.md"].decode()
        == f"""---
library_name: keras_svdtune
tags:
- keras
- svf
---
{hub_client.MARK}

# pirate

An adapter (SVF) for a Sequential, made with keras_svdtune. It is not a whole \
model:
it loads onto the base that it belongs to, and onto no other.

| | |
|---|---|
| method | `SVF()` |
| paper | https://arxiv.org/abs/2206.06122, https://arxiv.org/abs/2501.06252 |
| base | Sequential, 53 parameters |
| adapted layers | 2, in float32 |
| trainable parameters | 8 (15.0943%) |
| file | `adapter.safetensors`, {len(hf.files()[FILE]) / 1024:.1f} KiB |
| written with | keras_svdtune {keras_svdtune.__version__}, keras \
{keras.version()}, keras_hub {keras_hub.__version__} |

```python
import keras_svdtune

# `model` is the Sequential it belongs to
keras_svdtune.load_adapter(model, "hf://user/pirate")
```
"""
    )


@once
@pytest.mark.parametrize("preset", [None, "gemma", "hf://user/gemma"])
def test_the_code_of_the_card_runs(preset, hf, monkeypatch):
    model = trained(gemma)
    model.push_adapter(HF, preset)
    card = hf.files()["README.md"].decode()
    assert ("\nbase_model: user/gemma\n" in card) == (
        preset == "hf://user/gemma"
    )
    assert (f"| `{preset}` |" in card) == bool(preset)
    names = {} if preset else {"model": fresh(gemma)}
    monkeypatch.setattr(
        keras_hub.models.Backbone,
        "from_preset",
        lambda name: {preset: fresh(gemma)}[name],
    )
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert_same(eager(names["model"], tokens()), eager(model, tokens()))


@once
@pytest.mark.fast
@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_the_papers_are_those_of_our_readme(method):
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    papers = re.compile(r"arxiv\.org/abs/[\d.]+\d")
    starts = (f"| `enable_{method.name}(", f"| `enable_adapter({method.title}(")
    rows = [x for x in readme.splitlines() if x.startswith(starts)]
    found = papers.findall(" ".join(hub._papers(method)))
    assert found and set(found) == set(papers.findall("".join(rows)))


@once
def test_a_card_of_ones_own_stays(hf):
    push_adapter(trained(), HF)
    first = hf.files()
    push_adapter(trained(method=LoRA(rank=2)), HF)
    assert b"LoRA(rank=2" in hf.files()["README.md"]
    mine = first["README.md"].replace(hub_client.MARK.encode(), b"Arr!")
    hf.files()["README.md"] = mine
    with pytest.warns(UserWarning, match="is left as it is") as caught:
        push_adapter(trained(), HF)
    assert caught[0].filename == __file__
    assert hf.files() == first | {"README.md": mine}


# What is refused.


@once
@pytest.mark.parametrize("function", [push_adapter, load_adapter])
def test_no_uri_of_an_adapter(function, models, hf, kaggle):
    for uri in (
        *("hf://pirate", "hf://user/pirate/adapter", "hf://user/pirate@"),
        *("hf://user/../pirate", "hf://user/pi rate", "HF://user/pirate"),
        *("kaggle://user/pirate", "kaggle://user/pirate/kreas/small"),
        *(f"{KAGGLE}/v1", f"{KAGGLE}/0", "gs://user/pirate", "://"),
    ):
        parts = ["'hf://user/name[@revision]'", "'kaggle://user/", repr(uri)]
        refused(models[True], parts, function, uri)
    assert hf.asked == [] and not kaggle.exists()


@once
@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"uri": f"{HF}@v2"}, "a new version by itself"),
        ({"uri": f"{KAGGLE}/2"}, "a new version by itself"),
        ({"uri": "hf://user/pi--rate"}, "Cannot have -- or .."),
        ({"uri": pathlib.Path(FILE)}, "'hf://user/name"),
        ({"uri": KAGGLE, "private": True}, "Kaggle makes every new model"),
        ({"uri": HF, "base_preset": "a\n# b"}, "must be a preset"),
        ({"uri": HF, "base_preset": "gemma"}, "is for KerasHub's models"),
    ],
)
def test_no_push(arguments, part, models, hf, kaggle):
    refused(models[True], [part], push_adapter, **arguments)
    refused(models[False], [], push_adapter, **arguments)
    assert hf.repos == {} and not kaggle.exists()


@once
def test_nothing_to_push_or_nowhere(models, hf):
    refused(models[False], ["has no adapter"], push_adapter, HF)
    parts = ["push_adapter", HF]
    refused(models[True], parts, keras_svdtune.save_adapter, HF)
    assert hf.asked == []


@once
def test_private(hf):
    model = trained()
    push_adapter(model, "hf://user/secret", private=True)
    push_adapter(model, "hf://user/secret")
    push_adapter(model, HF)
    assert [x["private"] for x in hf.repos.values()] == [True, False]
    head = hf.head()
    perturb(model, seed=3)
    refused(model, ["is public"], push_adapter, HF, private=True)
    assert hf.head() == head


@once
@pytest.mark.parametrize("status", [403, 500])
def test_a_push_that_fails_changes_nothing(status, models, hf):
    push_adapter(models[True], HF)
    model = trained(seed=3)
    before = hf.files()
    for step in (
        # Of a repository that it cannot make, the client asks if it is there.
        "create|models/user/pirate$",
        *("README", "yaml", "preupload", "batch", "blob", "commit"),
    ):
        hf.fail[step] = (status, b"{}")
        refused(model, [f"'{HF}' could not be written"], push_adapter, HF)
        assert hf.files() is before
        hf.fail.clear()
    push_adapter(model, HF)
    assert hf.files()[FILE] != before[FILE]


FAILURES = {
    "no repository": "`hf auth login`",
    "no revision": "no such repository or revision",
    "no file": "has no file 'adapter.safetensors'",
    "no login": "(HTTP 401)",
    "not allowed": "(HTTP 403)",
    "out of order": "500",
    "no network": "Check the connection",
    "cut off": "could not be read",
    "corrupted": "is damaged",
    "another base": "was trained on other weights",
}


@once
@pytest.mark.parametrize("what", FAILURES)
def test_no_load(what, models, hf, monkeypatch):
    push_adapter(models[True], HF)
    uri, data = HF, hf.files()[FILE]
    match what:
        case "no repository":
            uri = "hf://user/none"
        case "no revision":
            uri = f"{HF}@v9"
        case "no file":
            del hf.files()[FILE]
        case "no login":
            monkeypatch.setenv("HF_TOKEN", "hf_another")
        case "not allowed":
            hf.fail["resolve"] = (403, b"")
        case "out of order":
            hf.fail["resolve"] = (500, b"")
        case "no network":
            hf.shutdown()
            hf.server_close()
        case "cut off":
            hf.fail["GET .*resolve"] = (200, data[:-9])
        case "corrupted":
            hf.files()[FILE] = data[:-1] + bytes([data[-1] ^ 1])
        case "another base":
            models = {False: fresh(), True: fresh()}
            for model in models.values():
                randomise(model, seed=5)
            keras_svdtune.enable_svf(models[True])
    for model in models.values():
        refused(model, [FAILURES[what], f"'{uri}'"], load_adapter, uri)


@once
def test_kaggle_fails(kaggle, monkeypatch):
    model = trained()
    refused(model, ["`kagglehub.login()`"], load_adapter, KAGGLE)
    push_adapter(model, KAGGLE)
    refused(model, ["(HTTP 404)"], load_adapter, f"{KAGGLE}/2")

    def fail(*args):
        raise ConnectionError("No route to host")

    for name in ("model_upload", "model_download"):
        monkeypatch.setattr(kagglehub, name, fail)
    for function in (load_adapter, push_adapter):
        refused(model, [f"'{KAGGLE}'", "No route to host"], function, KAGGLE)


@once
@pytest.mark.parametrize("function", [push_adapter, load_adapter])
@pytest.mark.parametrize(
    "package, uri", [("huggingface_hub", HF), ("kagglehub", KAGGLE)]
)
def test_a_package_that_is_not_there(
    package, uri, function, models, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    parts = [uri, package, "pip install 'keras_svdtune[hub]'"]
    refused(models[True], parts, function, uri, error=ImportError)


@once
@pytest.mark.slow
def test_neither_package_is_imported_before():
    """KerasHub imports both where it finds them, and does without."""
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; "
        "sys.modules['kagglehub'] = None; import keras_svdtune"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
