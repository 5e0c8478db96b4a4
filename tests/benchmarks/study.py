"""How well each method learns, at each method's own best rate.

    python tests/benchmarks/study.py                      # all of the plan
    python tests/benchmarks/study.py --task pirate        # a part of it
    python tests/benchmarks/study.py --task pirate --method svf --rate 1e-2

A run trains one method on one task at one rate, from one seed. It is one line
of `results/study.jsonl`, written when the run ends; a run that is there is not
repeated, so that a killed study goes on where it was. A run that is named by
its rate is repeated, and compared with its line.

Protocol: Adam, a tenth of the steps to warm up, then a cosine to 5 % of the
rate; batches of 4 sentences (16 of the reviews). Rates go in steps of √10.
For each method they are extended until the best, by validation loss, lies
between two that are worse; at the best one, runs with other seeds follow. The
seed decides the order of the examples, which is that of every method, and the
first values of A where they are random.

`study_page.py` makes the tables and the pictures.
"""

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import keras
import numpy as np
import study_tasks
import study_variants  # noqa: F401 - registers what the study tries
from scipy.special import log_softmax

import keras_svdtune
from keras_svdtune.demo import chat, show
from keras_svdtune.demo.train import make_method
from keras_svdtune.methods.adalora import AdaLoRA
from keras_svdtune.methods.data_method import DataMethod

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
FULL = "full"
KERAS = "enable_lora"  # of KerasHub: rank 8, its own choice of layers
DECAY = "+decay="  # by AdamW: a step takes rate·decay of the variable away
# Each with the rate of its weights to start from, in half powers of ten: -5 is
# 3.2e-3.
METHODS = {
    "lora:rank=8": -5,
    "svf": -3,
    "pissa:rank=8": -7,
    "milora:rank=8": -5,
    "svft:pattern=banded": -3,
    "lora_xs:rank=8": -3,
    "adalora:rank=8": -3,
    FULL: -8,
    "dora:rank=8": -5,
    "lora:rank=1": -5,
    "lora:rank=32": -5,
    "lora_xs:rank=32": -4,
    "svft:pattern=plain": -3,
    "mica:rank=8": -4,
    "psoft:rank=32": -5,
    "oplora:rank=8": -5,
    "eva:rank=8": -6,
    "corda:rank=8": -7,
    "lora_ga:rank=8": -6,
}
MAIN = [*itertools.islice(METHODS, 9)]
# Whether less of SVF forgets less: the top singular values alone, all others,
# and a decay of δ towards 0, which LoRA may have as well.
FEWER = {
    "svf:rank=144": -3,
    "svf:rank=72": -3,
    "svf:rank=36": -3,
    "svf_tail:skip=8": -3,
    "svf+decay=4": -3,
    "svf+decay=16": -3,
    "lora:rank=8+decay=16": -5,
}
DECAYS = ["svf+decay=16", "lora:rank=8+decay=16"]
BATCH = {"reviews": 16}
# Model, task, steps, methods, seeds; in the order in which they are run.
PLAN = (
    ("minilm", "reviews", 150, MAIN, 1),
    ("smollm2_135m", "pirate", 120, MAIN[:7], 3),
    ("minilm", "reviews", 150, MAIN, 3),
    ("smollm2_135m", "pirate", 120, MAIN, 3),
    ("smollm2_135m", "names", 120, MAIN[:6], 3),
    ("smollm2_135m", "pirate", 120, [*FEWER], 1),
    ("smollm2_135m", "names", 120, DECAYS, 3),
    ("smollm2_135m", "names", 120, MAIN, 3),
    ("smollm2_135m", "speeches", 120, MAIN, 1),
    ("minilm", "reviews", 150, [*METHODS], 3),
    ("smollm2_135m", "pirate", 40, MAIN, 1),
    ("smollm2_135m", "pirate", 120, [*METHODS], 3),
    ("smollm2_135m", "speeches", 120, MAIN, 3),
    ("gemma3_270m", "pirate", 120, MAIN[:4], 1),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What names a run."""

    model: str
    task: str
    method: str
    steps: int
    seed: int
    rate: float

    def __post_init__(self) -> None:
        # Three figures: 3.16e-3 names a rate of the grid.
        object.__setattr__(self, "rate", float(f"{self.rate:.3g}"))


def grid(k: int, method: str) -> float:
    """The rate at which the method's weights move by a half power of ten.

    That is the rate times the weight's step: a method of step 8, whose
    variable holds an eighth of the weight, is given an eighth of the rate.
    """
    return float(10 ** (k / 2)) / step_of(method)


def step_of(method: str) -> float:
    """The largest step of what a method trains; 1 for full fine-tuning."""
    if method in (FULL, KERAS):
        return 1.0
    weights = method_for(method, seed=0).weights((64, 64))
    return max(weight.step for weight in weights if weight.trainable)


class Session:
    """One model with one method on one task, to be trained again and again."""

    def __init__(self, model: str, task: str, method: str, seed: int) -> None:
        self.model, self.task, self.method = model, task, method
        self.seed = seed
        self.data = study_tasks.data_for(model, task)
        self.batch = BATCH.get(task, 4)
        self.network = study_tasks.load(model, seed)
        self.compile()
        if method == KERAS:
            self.network.backbone.enable_lora(8)
        elif method != FULL:
            self.enable(method_for(method, seed))
        self.compile()
        trained = self.network.trainable_variables
        self.network.optimizer.build(trained)
        self.trained = common.trained_numbers(trained)
        self.state = [*trained, *self.network.optimizer.variables]
        self.state += [
            v
            for v in self.network.non_trainable_variables
            if v.name.startswith("adalora")
        ]
        self.start = values_of(self.state)

    def compile(self) -> None:
        """With the optimizer of the method, and the loss of all."""
        self.network.compile(
            optimizer=optimizer_for(self.method),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[],
        )

    def enable(self, method: keras_svdtune.Method) -> None:
        """Enables a method; one that starts from data has the first examples.

        They are those that training begins with.
        """
        if isinstance(method, DataMethod):
            data = self.data.train
            order = example_order(len(data), method.examples, self.seed)
            rows = data.rows(order)
            method = dataclasses.replace(
                method, data=(rows.x, rows.y, rows.weight)
            )
            self.network.enable_adapter(method)
        else:
            self.network.backbone.enable_adapter(method)

    def run(self, steps: int, rate: float) -> dict[str, Any]:
        """Trains from the start, and measures."""
        started = time.perf_counter()
        for variable, value in zip(self.state, self.start, strict=True):
            variable.assign(value)
        keras.utils.set_random_seed(self.seed)
        seconds, last = self.train(steps, rate)
        found: dict[str, Any] = {"training_loss": rounded(last)}
        found |= self.measured()
        found["trained"] = self.trained
        found["file_bytes"] = self.file_bytes()
        found["seconds_per_step"] = rounded(seconds)
        found["seconds"] = round(time.perf_counter() - started, 1)
        return found

    def train(self, steps: int, rate: float) -> tuple[float, float]:
        """Returns the seconds of a step, and the last steps' mean loss."""
        network, data = self.network, self.data.train
        order = example_order(len(data), steps * self.batch, self.seed)
        callbacks = keras.callbacks.CallbackList(
            [keras_svdtune.RankAllocator()]
            if self.method.startswith(AdaLoRA.name)
            else [],
            model=network,
            steps=steps,
            epochs=1,
        )
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(0)
        losses, times = [], []
        for step in range(steps):
            rows = data.rows(order[step * self.batch : (step + 1) * self.batch])
            network.optimizer.learning_rate = rate * schedule(step, steps)
            network.reset_metrics()
            callbacks.on_train_batch_begin(step)
            logs = network.train_on_batch(
                rows.x, rows.y, rows.weight, return_dict=True
            )
            callbacks.on_train_batch_end(step, {})
            losses.append(float(logs["loss"]))
            times.append(time.perf_counter())
            if not math.isfinite(losses[-1]):
                break  # it will not come back
        callbacks.on_epoch_end(0, {})
        callbacks.on_train_end()
        tenth = max(1, steps // 10)
        pause = float(np.median(np.diff(times))) if steps > 1 else 0.0
        return pause, float(np.mean(losses[-tenth:]))

    def measured(self) -> dict[str, Any]:
        """Losses on what is held out, and on neutral text."""
        found: dict[str, Any] = {}
        for part in ("validation", "test", "neutral"):
            examples = getattr(self.data, part)
            if examples is None:
                continue
            sums, tokens, right = scores(self.network, examples)
            found[f"{part}_loss"] = rounded(sums.sum() / tokens.sum())
            if part != "neutral":
                found[f"{part}_exact"] = rounded(right.mean())
            if part == "test":  # for intervals: of the same examples
                found["test_sums"] = [rounded(x) for x in sums]
                found["test_tokens"] = [int(x) for x in tokens]
        return found

    def file_bytes(self) -> int | None:
        """The size of the adapter's file, without a head."""
        if self.method in (FULL, KERAS):
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            self.network.backbone.save_adapter(path)
            return path.stat().st_size


def scores(
    network: Any, examples: chat.Arrays
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each example: summed loss, predicted tokens, and if all are right.

    All are right where greedy decoding would give the very answer.
    """
    sums, tokens, right = [], [], []
    for at in range(0, len(examples), 16):
        rows = examples.rows(np.arange(at, min(at + 16, len(examples))))
        logits = np.asarray(network.predict_on_batch(rows.x), "float32")
        counts = rows.weight > 0
        chosen = log_softmax(logits[counts], axis=-1)
        y = rows.y[counts]
        loss = np.zeros(counts.shape, "float64")
        loss[counts] = -np.take_along_axis(chosen, y[:, None], -1)[:, 0]
        hit = np.ones(counts.shape, bool)
        hit[counts] = chosen.argmax(-1) == y
        inner = tuple(range(1, counts.ndim))
        sums.append(loss.sum(inner))
        tokens.append(counts.sum(inner))
        right.append(hit.all(inner))
    return np.concatenate(sums), np.concatenate(tokens), np.concatenate(right)


def optimizer_for(method: str) -> keras.optimizers.Optimizer:
    """Adam, or AdamW where the method's name ends with a decay."""
    _, _, decay = method.partition(DECAY)
    if not decay:
        return keras.optimizers.Adam(1e-3)
    return keras.optimizers.AdamW(1e-3, weight_decay=float(decay))


def method_for(spec: str, seed: int) -> keras_svdtune.Method:
    """A method by its name and settings, with a seed if it draws."""
    spec, _, _ = spec.partition(DECAY)
    methods, left_out = common.methods_for([spec], 8)
    if left_out:
        raise SystemExit(f"{spec}: {left_out[spec]}")
    method = methods[spec]
    if any(f.name == "seed" for f in dataclasses.fields(method)):
        return dataclasses.replace(method, seed=seed)
    return method


def example_order(examples: int, wanted: int, seed: int) -> np.ndarray:
    """Which example comes when: whole passes, each in a new order."""
    generator = np.random.default_rng(seed)
    passes = math.ceil(wanted / examples)
    order = [generator.permutation(examples) for _ in range(passes)]
    return np.concatenate(order)[:wanted]


def schedule(step: int, steps: int) -> float:
    """The share of the rate at a step: a line up, then a cosine down."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2


def values_of(variables: list[Any]) -> list[np.ndarray]:
    """A copy of each value."""
    return [keras.ops.convert_to_numpy(v.value).copy() for v in variables]


def rounded(number: float) -> float | None:
    """Five figures, as JSON has them; None if it is not a number."""
    number = float(number)
    return float(f"{number:.5g}") if math.isfinite(number) else None


class Log:
    """The lines of the results, by what names them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[Cell, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                run = json.loads(line)
                self.runs[cell_of(run)] = run
        machine = common.machine()
        self.machine = {
            k: machine[k] for k in ("backend", "device", "cores", "versions")
        }

    def add(self, cell: Cell, found: dict[str, Any]) -> None:
        """Writes a line."""
        run = dataclasses.asdict(cell) | found
        run |= {"date": common.machine()["date"], **self.machine}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        self.runs[cell] = run

    def loss(self, cell: Cell) -> float:
        """The validation loss, infinite where there is none."""
        value = self.runs[cell]["validation_loss"]
        return math.inf if value is None else value

    def best(self, cells: list[Cell]) -> Cell:
        """The cell of the lowest validation loss."""
        return min(cells, key=self.loss)


def cell_of(run: dict[str, Any]) -> Cell:
    """What names a line."""
    return Cell(**{f.name: run[f.name] for f in dataclasses.fields(Cell)})


class Sweep:
    """All rates and seeds of one method on one task."""

    def __init__(
        self, log: Log, model: str, task: str, method: str, steps: int
    ) -> None:
        self.log = log
        self.names = (model, task, method, steps)
        self.session: Session | None = None

    def run(self, seed: int, rate: float, again: bool = False) -> Cell:
        """Makes a run, if it is not there."""
        model, task, method, steps = self.names
        cell = Cell(model, task, method, steps, seed, rate)
        if cell in self.log.runs and not again:
            return cell
        if self.session is None or self.session.seed != seed:
            self.session = None  # free the other one's memory first
            self.session = Session(model, task, method, seed)
        found = self.session.run(steps, cell.rate)
        show.step(line(cell, found))
        if cell in self.log.runs:
            stored = self.log.runs[cell]["test_loss"]
            show.step(f"Stored: {stored}. Now: {found['test_loss']}")
        else:
            self.log.add(cell, found)
        return cell

    def rates(self, seed: int) -> Cell:
        """Runs rates until the best lies between two that are worse."""
        model, task, method, steps = self.names
        start = (METHODS | FEWER).get(method)
        if start is None:
            suggested = make_method(method.split(":")[0])
            rate = suggested.suggested_learning_rate * step_of(method)
            start = round(2 * math.log10(rate))
        tried = {k: self.run(seed, grid(k, method)) for k in (start, start - 1)}
        while True:
            best = self.log.best([*tried.values()])
            k = next(k for k, cell in tried.items() if cell == best)
            missing = [j for j in (k + 1, k - 1) if j not in tried]
            if not missing:
                return best
            for j in missing:
                tried[j] = self.run(seed, grid(j, method))

    def seeds(self, seeds: int) -> None:
        """The rates with the first seed, the best of them with the others."""
        best = self.rates(0)
        for seed in range(1, seeds):
            self.run(seed, best.rate)


def base_model(log: Log, model: str, task: str) -> None:
    """A line for the model before training: a rate of 0, no steps."""
    cell = Cell(model, task, "base", 0, 0, 0.0)
    if cell in log.runs or model == "minilm":  # a new head knows nothing
        return
    session = Session(model, task, FULL, 0)
    found = session.measured()
    show.step(line(cell, found))
    log.add(cell, found)


def line(cell: Cell, found: dict[str, Any]) -> str:
    """What a run found, in one line."""
    figures = ("validation_loss", "test_loss", "test_exact", "neutral_loss")
    parts = [f"{k} {found[k]}" for k in figures if k in found]
    name = f"{cell.task} {cell.method} {cell.steps} steps, seed {cell.seed}"
    return f"{name}, rate {cell.rate:g}: {', '.join(parts)}"


def planned(options: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """The part of the plan that the options leave."""
    for model, task, steps, methods, seeds in PLAN:
        if options.model not in (None, model):
            continue
        if options.task not in (None, task):
            continue
        if options.steps not in (None, steps):
            continue
        chosen = [m for m in methods if options.method in (None, m)]
        yield model, task, steps, chosen, options.seeds or seeds


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted({row[0] for row in PLAN}))
    parser.add_argument("--task", choices=sorted({row[1] for row in PLAN}))
    parser.add_argument(
        "--method", help="a name, with settings: svf, lora:rank=8, full"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float, help="this one run alone")
    parser.add_argument("--seed", type=int, default=0, help="with --rate")
    parser.add_argument("--seeds", type=int, help="how many, at the best rate")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    log = Log(options.results)
    if options.rate is not None:
        named = next(planned(options), None)
        if named is None or options.method is None:
            parser.error("--rate names a run: give --task and --method, too")
        model, task, steps = named[:3]
        Sweep(log, model, task, options.method, steps).run(
            options.seed, options.rate, again=True
        )
        return
    for model, task, steps, methods, seeds in planned(options):
        base_model(log, model, task)
        for method in methods:
            Sweep(log, model, task, method, steps).seeds(seeds)


if __name__ == "__main__":
    main()
