"""The benchmark commands run, on a tiny model. No time is asserted."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the benchmarks read XLA's figures"
)
slow = pytest.mark.slow

TINY_MODEL = ("--model", "tiny")


def run(command: str, results: Path, *arguments: str) -> str:
    """Runs a benchmark command and returns what it printed."""
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / command),
            *("--results", str(results)),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=900,
        # As users run them: libtpu does not know the flags of our tests.
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


METHODS = ("svf", "svft:pattern=random", "pissa")


@slow
def test_compare(tmp_path: Path) -> None:
    printed = run(
        *("compare.py", tmp_path, "--models", "tiny", "--backends", "jax"),
        *("--layers", "8x16", "--tokens", "8", "--batch", "1"),
        *("--length", "8", "--steps", "2", "--rank", "2"),
        *("--methods", *METHODS),
    )
    assert "SVFT pattern=random" in printed
    table = (tmp_path / "compare.md").read_text()
    for name in ("tiny_jax", "8x16_jax_8"):
        written = json.loads((tmp_path / f"step_time_{name}.json").read_text())
        results = written["results"]
        assert list(results) == [
            *("frozen floor", "Keras enable_lora(2)", "full fine-tuning"),
            *("SVF", "SVFT pattern=random", "PiSSA (rank 2)"),
        ]
        for label, result in results.items():
            assert len(result["all_seconds"]) == 2
            assert result["flops"] > 0 and result["temp_bytes"] > 0
            assert f"| {label} | " in table
        assert written["machine"]["cores"] >= 1


@slow
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_step_time(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    monkeypatch.setenv("KERAS_BACKEND", backend)
    run(
        *("step_time.py", tmp_path, *TINY_MODEL, "--batch", "1"),
        *("--length", "8", "--steps", "1", "--rank", "2"),
        *("--methods", *METHODS),
    )
    path = tmp_path / f"step_time_tiny_{backend}.json"
    results = json.loads(path.read_text())["results"]
    assert len(results) == 6
    for result in results.values():
        assert result["seconds_to_lora"] > 0 and "flops" not in result


@slow
def test_enable_time(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    printed = run(
        *("enable_time.py", tmp_path, *TINY_MODEL, "--rounds", "1"),
        *("--rank", "2", "--methods", "svf", "lora"),
    )
    assert "Enabling on tiny" in printed
    path = tmp_path / "enable_time_tiny_jax_rank2.json"
    written = json.loads(path.read_text())
    assert written["enabling"]["svf"]["kept_bytes"] > 0
    assert all(row["equal_bits"] for row in written["cache"].values())


@slow
def test_qpissa_error(tmp_path: Path) -> None:
    printed = run("qpissa_error.py", tmp_path, *TINY_MODEL, "--ranks", "2")
    assert "ffw_linear" in printed
    written = json.loads((tmp_path / "qpissa_error_tiny_jax.json").read_text())
    assert len(written["results"]) == 4
    for result in written["results"]:
        assert result["all"]["layers"] == 14
        assert result["all"]["nuclear"] < 1


def test_compose_tasks(
    tiny_study: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    import compose_tasks

    monkeypatch.setattr(compose_tasks, "WEIGHTS", [(1.0, 0.0), (0.5, 0.5)])
    monkeypatch.setattr(
        sys, "argv", ["", "--steps", "4", "--results", str(tmp_path)]
    )
    compose_tasks.main()
    path = tmp_path / "compose_smollm2_135m_svf.json"
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["base model", "1 pirate", "0.5 pirate + 0.5 names"]
    of_base, of_pirate, of_sum = (x["pirate"]["loss"] for x in rows.values())
    assert of_pirate < of_sum < of_base


@pytest.mark.parametrize("task", ["pirate", "names"])
def test_by_reward(
    task: str,
    tiny_llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if task == "names":
        pytest.importorskip("reasoning_gym")
    import by_reward
    import study_tasks

    monkeypatch.setattr(by_reward, "load_model", tiny_llama)
    monkeypatch.setitem(study_tasks.LENGTH, task, 200)  # a token is a letter
    arguments = ["--task", task, "--steps", "2", "--asked", "2"]
    arguments += ["--warm-up", "2"]
    monkeypatch.setattr(
        sys, "argv", ["", *arguments, "--results", str(tmp_path)]
    )
    by_reward.main()
    path = tmp_path / f"by_reward_{task}_smollm2_135m.json"
    written = json.loads(path.read_text())
    assert list(written["rows"]) == [
        *("base model", "the start", "by reward", "by examples"),
    ]
    assert len(written["steps_by_reward"]) == 2


@pytest.mark.parametrize("task", ["letters", "speeches"])
def test_mixtures(
    task: str,
    tiny_llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("reasoning_gym")
    import mixtures

    monkeypatch.setattr(mixtures, "load_model", tiny_llama)
    spoken = [(f"We said {i}.", f"We meant {i}.") for i in range(80)]
    monkeypatch.setattr(mixtures, "speech_pairs", lambda: spoken)
    job_of = mixtures.job_of
    monkeypatch.setattr(  # a token is a letter here
        *(mixtures, "job_of"),
        lambda *x: dataclasses.replace(job_of(*x), longest=200),
    )
    monkeypatch.setattr(mixtures, "LENGTH", dict.fromkeys(mixtures.LENGTH, 200))
    arguments = ["--task", task, "--steps", "1", "--shots", "5", "--asked", "4"]
    arguments += ["--iterations", "2", "--cem-iterations", "1"]
    arguments += ["--population", "4", "--experts", str(tmp_path / "experts")]
    monkeypatch.setattr(
        sys, "argv", ["", *arguments, "--results", str(tmp_path)]
    )
    path = tmp_path / f"mixtures_{task}_smollm2_135m.json"
    rows = []
    for _ in range(2):  # the second time with the experts of the first
        mixtures.main()
        rows.append(json.loads(path.read_text())["rows"])
    assert list(rows[0]) == [
        *("base model", "pirate alone", "letters alone", "speeches alone"),
        *("mean of the three", "gradient", "gradient, per layer", "CEM"),
    ]
    for row in rows[0].values():
        assert all(len(row[part]["loss"]) == 2 for part in mixtures.PARTS)
    per_layer = rows[0]["gradient, per layer"]
    assert len(per_layer["weights"]["pirate"]) == 7
    if task == "letters":  # whose answers all have as many tokens
        # What the search says of an iteration is what the mixture has.
        shots, held = per_layer["curve"][per_layer["best"]]
        found = [per_layer[x]["loss"][0] for x in ("shots", "held out")]
        assert found == pytest.approx([-shots, -held], abs=1e-3)
    same = rows[1]["letters alone"]["others"]["loss"]
    assert same == rows[0]["letters alone"]["others"]["loss"]


def test_generation_and_per_example(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import common
    import generation
    import per_example

    monkeypatch.setattr(generation.weights, "load_model", tiny_llama)
    results = ["--results", str(tmp_path)]
    short = ["--rounds", "1", "--methods", "lora"]
    options = ["--prompt", "4", "--tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["", *short, *options, *results])
    generation.main()
    path = tmp_path / "generation_smollm2_135m_jax.json"
    rows = json.loads(path.read_text())["results"]
    assert list(rows) == [
        *("base model", "SVF, merged", "LoRA (rank 8)"),
        "Keras enable_lora(8), query and value",
    ]
    assert rows["base model"]["of_base"] == 1.0

    monkeypatch.setattr(
        common, "load_backbone", lambda name: tiny_llama(name).backbone
    )
    monkeypatch.setattr(per_example, "LENGTH", 4)
    monkeypatch.setattr(sys, "argv", ["", *short, "--rows", "2", *results])
    per_example.main()
    path = tmp_path / "per_example_smollm2_135m_jax.json"
    (row,) = json.loads(path.read_text())["results"].values()
    assert len(row["all_seconds"]["each"]) == 2


def test_scale(tmp_path: Path) -> None:
    run("scale.py", tmp_path, "--model", "gemma_2b", "--methods", "svf", "dora")
    written = json.loads((tmp_path / "scale.json").read_text())
    model = written["models"]["gemma_2b"]
    assert model["parameters"] == 2_506_172_416
    assert model["results"]["SVF"]["trainable"] == 193_536
    assert "| DoRA (rank 8) | " in (tmp_path / "scale.md").read_text()


@slow
def test_distribution(tmp_path: Path) -> None:
    """SVF: one collective a layer in either pass, an eighth of the bytes."""
    run(
        *("distribution.py", tmp_path, *TINY_MODEL, "--mesh", "1,8"),
        *("--length", "16", "--rank", "2", "--methods", "svf"),
    )
    written = json.loads((tmp_path / "distribution_tiny_cpu.json").read_text())
    (found,) = written["meshes"].values()
    base, svf = found["base model"], found["SVF"]
    layers = 2 * 7
    assert 0 < svf["collectives"] - base["collectives"] <= 2 * layers
    adapter = svf["bases"] + svf["trainables"]
    assert adapter <= svf["adapter on one device"] / 6
    assert svf["bases"] > svf["trainables"] > 0 < svf["optimizer"]
    page = (tmp_path / "distribution_tiny_cpu.md").read_text()
    assert "Keras enable_lora(2)" in page


@slow
def test_two_processes(tmp_path: Path) -> None:
    run("two_processes.py", tmp_path, "--methods", "svf")
    written = json.loads((tmp_path / "two_processes.json").read_text())
    losses = written["svf"]["losses_of_two_processes"]
    assert len(losses) == 6 and losses[-1] < losses[0]
