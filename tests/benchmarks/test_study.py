"""The study runs, goes on where it was, and reads its figures as it says."""

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the study is run with JAX"
)


def test_study_and_its_page(
    tiny_study: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import study
    import study_page

    methods = ["lora:rank=8", "svf", "svf+decay=16"]
    plan = (("smollm2_135m", "pirate", 3, methods, 2),)
    monkeypatch.setattr(study, "PLAN", plan)
    monkeypatch.setattr(study_page, "DRAWN", 2)
    file = tmp_path / "study.jsonl"

    def run(module: Any, *arguments: str) -> str:
        arguments = ("", "--results", str(file), *arguments)
        monkeypatch.setattr(sys, "argv", list(arguments))
        module.main()
        return capsys.readouterr().out

    run(study)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-2]) + "\n")  # as if it was killed
    run(study)
    runs = study.Log(file).runs
    assert len(file.read_text().splitlines()) == len(lines) == len(runs)
    for method in methods:
        seeds = [cell.seed for cell in runs if cell.method == method]
        assert seeds.count(0) >= 3 and seeds.count(1) == 1

    cell = next(x for x in runs if x.method == "svf" and x.seed == 1)
    cell_of = ["--task", "pirate", "--method", "svf", "--seed", "1"]
    printed = run(study, *cell_of, "--rate", f"{cell.rate:g}")
    stored, now = printed.split("Stored: ")[1].split(". Now: ")
    assert float(now) == pytest.approx(float(stored), abs=1e-3)
    assert float(stored) == runs[cell]["test_loss"]
    assert len(file.read_text().splitlines()) == len(lines)

    run(study_page, "--pictures", str(tmp_path))
    page = (tmp_path / "study.md").read_text()
    assert "| SVF | " in page and "| SVF, decay 16 | " in page
    for picture in ("rates", "parameters", "forgetting"):
        assert (tmp_path / f"study_{picture}.png").stat().st_size > 10_000


@pytest.mark.parametrize("best", [-9, -4, -3, 0])
def test_rates_are_extended_until_the_best_is_inside(
    best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import study

    sweep = study.Sweep(
        study.Log(tmp_path / "x"), "smollm2_135m", "pirate", "svf", 3
    )

    def run(seed: int, rate: float) -> Any:
        cell = study.Cell("smollm2_135m", "pirate", "svf", 3, seed, rate)
        away = abs(2 * np.log10(rate * study.step_of("svf")) - best)
        sweep.log.runs[cell] = {"validation_loss": float(away)}
        return cell

    monkeypatch.setattr(sweep, "run", run)
    found = sweep.rates(0)
    rates = sorted(cell.rate for cell in sweep.log.runs)
    assert found.rate == float(f"{study.grid(best, 'svf'):.3g}")
    assert rates[0] < found.rate < rates[-1]


def test_what_lora_forgets_at_a_loss() -> None:
    import study_page

    base = {"test_loss": 5.0, "neutral_loss": 4.0}
    runs = [
        {"seed": 0, "rate": rate, "test_loss": test, "neutral_loss": neutral}
        for rate, test, neutral in ((1e-3, 3.0, 4.2), (1e-2, 2.0, 4.6))
    ]
    lora = study_page.Group("lora:rank=8", runs, runs[1:], runs)
    found = [
        study_page.forgotten_at(lora, base, loss) for loss in (4, 3, 2.5, 1.9)
    ]
    assert found == pytest.approx([0.1, 0.2, 0.4, np.nan], nan_ok=True)


def test_differences_are_paired_by_seed_and_example() -> None:
    import study_page

    random = np.random.default_rng(0)
    hard = random.gamma(2.0, 50.0, 40)  # what an example costs every method
    tokens = [10] * 40

    def group(name: str, more: float) -> Any:
        runs = [
            {"seed": s, "test_tokens": tokens, "test_sums": sums}
            for s in range(3)
            for sums in [hard + 10 * more + random.normal(0, 1, 40)]
        ]
        return study_page.Group(name, runs, runs, runs)

    lora, worse = group("lora:rank=8", 0.0), group("svf", 0.5)
    mean, low, high = study_page.difference(worse, lora, of=2)
    assert mean == pytest.approx(0.5, abs=0.05)
    assert 0.3 < low < mean < high < 0.7  # unpaired: wider than 2
