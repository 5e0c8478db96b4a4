"""The benchmark commands run, on a tiny model. No time is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_compare(tmp_path: Path) -> None:
    printed = run(
        *("compare.py", tmp_path, "--models", "tiny", "--backends", "jax"),
        *("--layers", "8x16", "9999999x9999999", "--tokens", "8"),
        *("--batch", "1", "--length", "8", "--steps", "2", "--rank", "2"),
        *("--methods", *METHODS),
    )
    assert "SVFT pattern=random" in printed
    assert "Left out: 9999999x9999999 at 8 tokens needs" in printed
    table = (tmp_path / "compare.md").read_text()
    for name in ("tiny_jax", "8x16_jax_8"):
        path = tmp_path / f"step_time_{name}.json"
        written = json.loads(path.read_text())
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
        assert path.with_suffix(".png").stat().st_size > 0


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
    printed = run(
        *("enable_time.py", tmp_path, *TINY_MODEL, "--rounds", "1"),
        *("--rank", "2"),
        *("--methods", "svf", "lora"),
    )
    assert "Enabling on tiny" in printed
    written = json.loads(
        (tmp_path / "enable_time_tiny_jax_rank2.json").read_text()
    )
    assert written["enabling"]["svf"]["kept_bytes"] > 0
    for shape in written["alternatives"].values():
        for row in shape["alternatives"].values():
            assert row["relative_difference"] < 1e-2


@slow
def test_qpissa_error(tmp_path: Path) -> None:
    printed = run("qpissa_error.py", tmp_path, *TINY_MODEL, "--ranks", "2")
    assert "ffw_linear" in printed
    written = json.loads((tmp_path / "qpissa_error_tiny_jax.json").read_text())
    assert len(written["results"]) == 4
    for result in written["results"]:
        assert result["all"]["layers"] == 14
        assert result["all"]["nuclear"] < 1


@slow
def test_monitor_cost(tmp_path: Path) -> None:
    run(
        *("monitor_cost.py", tmp_path, *TINY_MODEL, "--rank", "2"),
        *("--matrices", "3", "--rounds", "1", "--methods", "svf", "lora"),
    )
    written = json.loads((tmp_path / "monitor_cost_tiny_jax.json").read_text())
    for rows in written["results"].values():
        assert [x["matrices"] for x in rows] == [3, 14]
        assert all(x["logs"]["sigma_drift"] > 0 for x in rows)


@slow
@pytest.mark.parametrize("command", ["text_classifier", "image_classifier"])
def test_classifiers(command: str, tmp_path: Path) -> None:
    run(f"{command}.py", tmp_path, "--tiny")
    written = json.loads((tmp_path / f"{command}_tiny.json").read_text())
    rows = written["rows"]
    assert rows["frozen backbone"]["adapter_parameters"] == 0
    for name, row in rows.items():
        assert row["head_parameters"] > 0
        assert len(row["tried"]) == 3
        assert float(row["best_rate"]) in map(float, row["tried"])
        assert (row["file_bytes"] is None) == (name == "frozen backbone")
    if command == "image_classifier":
        assert written["normalization"]["inference_same_to_the_bit"]


@slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
def test_tpu_compile(tmp_path: Path) -> None:
    printed = run(
        *(
            "tpu_compile.py",
            tmp_path,
            *TINY_MODEL,
            "--tokens",
            "32",
            "--length",
            "16",
        ),
        *("--rank", "2", "--methods", "svf", "lora"),
    )
    assert "no decomposition" in printed
    written = json.loads((tmp_path / "tpu_compile_tiny.json").read_text())
    assert list(written["results"]["32"]) == [
        *("frozen floor", "Keras enable_lora(2)", "SVF", "LoRA (rank 2)"),
        "full fine-tuning",
    ]
    for result in written["results"]["32"].values():
        assert result["flops"] > 0 and 0 < result["estimated_seconds"] < 1
    programs = written["enabling"]["programs"]
    assert programs and not any(p["custom_calls"] for p in programs)
    assert (tmp_path / "tpu_compile_tiny.png").stat().st_size > 0


@slow
def test_scale(tmp_path: Path) -> None:
    printed = run(
        *("scale.py", tmp_path, *TINY_MODEL, "--length", "16", "--rank", "2"),
        *("--methods", "svf", "dora"),
    )
    assert "FLOPs differ from XLA's by" in printed
    written = json.loads((tmp_path / "scale.json").read_text())
    results = written["models"]["tiny"]["results"]
    assert results["SVF"]["step_to_floor"] > 1.0
    # The matrices of the real models, and the FLOPs of a real one.
    assert len(written["check"]) > 2
    for row in written["check"]:
        assert abs(row["flops_ratio"] - 1.0) < 0.05


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


@slow
def test_sharded_losses(tmp_path: Path) -> None:
    arguments = ("--methods", "svf", "lora", "--rank", "2")
    run("sharded_losses.py", tmp_path, *TINY_MODEL, *arguments)
    path = tmp_path / "sharded_losses_tiny_2x4_4x32.json"
    before = path.read_text()
    rows = json.loads(before)["rows"]
    assert list(rows) == ["SVF", "LoRA (rank 2)"]
    for row in rows.values():
        assert row["largest_difference"] < 1e-4
        assert len(row["losses_of_eight"]) == 20
    # What is there is not run again.
    run("sharded_losses.py", tmp_path, *TINY_MODEL, *arguments)
    assert path.read_text() == before
