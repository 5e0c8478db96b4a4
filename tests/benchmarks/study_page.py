"""Tables and pictures of what `study.py` found.

    python tests/benchmarks/study_page.py

It reads `results/study.jsonl`, and writes `study.md` and `study.json` beside
it, and the pictures of the documentation.

Differences to LoRA are of the same test examples after the same order of
training examples; their intervals are from 10,000 bootstrap samples of seeds
and examples, each at 1 - 0.05 / n, so that all n differences of a task hold
together in 19 cases of 20.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import matplotlib
import numpy as np
import study
from scipy.stats import t as student_t

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURES = Path(__file__).parents[2] / ".docs" / "pages"
LORA = "lora:rank=8"
SAMPLES = 10_000
# What papers say of their methods, and we of a decay: the first has a lower
# test loss than the second, or forgets less than it at the same test loss.
LEARNS_MORE = (
    ("svf", LORA),
    ("svf", "lora:rank=1"),
    ("svft:pattern=banded", "svf"),
    ("svft:pattern=banded", LORA),
    ("pissa:rank=8", LORA),
    ("pissa:rank=8", "milora:rank=8"),
    ("lora_xs:rank=8", LORA),
    ("dora:rank=8", LORA),
    ("adalora:rank=8", LORA),
)
DRAWN = 4  # methods that a task has, for there to be something to compare
KERAS_HUB_RATE = 2e-5  # of `compile()` without arguments
FORGETS_LESS = (
    *("svf", "svft:pattern=banded", "pissa:rank=8", "milora:rank=8"),
    *study.DECAYS,
)
COLOURS = {
    LORA: "#000000",
    "lora:rank=1": "#8C564B",
    "svf": "#D55E00",
    "svft:pattern=banded": "#E69F00",
    "pissa:rank=8": "#0072B2",
    "milora:rank=8": "#56B4E9",
    "lora_xs:rank=8": "#CC79A7",
    "dora:rank=8": "#009E73",
    "adalora:rank=8": "#999933",
    study.FULL: "#999999",
}
TITLES = {
    "pirate": "style: answers like a pirate",
    "names": "skill: who of three likes what",
    "speeches": "text like that of pre-training",
    "reviews": "classification of film reviews",
}
NAMES = {study.FULL: "full fine-tuning", study.KERAS: "Keras enable_lora(8)"}
Run = dict[str, Any]


@dataclasses.dataclass
class Group:
    """One method on one task: its rates at seed 0, and its best with seeds."""

    method: str
    rates: list[Run]
    best: list[Run]
    every: list[Run]

    @property
    def label(self) -> str:
        if self.method in NAMES:
            return NAMES[self.method]
        name, _, decay = self.method.partition(study.DECAY)
        label = common.label_of(name, study.method_for(name, seed=0))
        return f"{label}, decay {decay}" if decay else label

    @property
    def rate(self) -> float:
        return float(self.best[0]["rate"])

    @property
    def inside(self) -> bool:
        """Whether rates on both sides of the best were worse."""
        found = [run["rate"] for run in self.rates]
        return min(found) < self.rate < max(found)

    @property
    def test_loss(self) -> float:
        return float(np.mean([run["test_loss"] for run in self.best]))

    def mean(self, key: str) -> float:
        return float(np.mean([run[key] for run in self.best]))


def groups_of(runs: Iterable[Run]) -> dict[str, Group]:
    """The runs of one model, task and number of steps, by method."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    found = {}
    for method, every in by_method.items():
        rates = sorted(
            (run for run in every if run["seed"] == 0),
            key=lambda run: run["rate"],
        )
        best = min(rates, key=validation_loss)
        same = [run for run in every if run["rate"] == best["rate"]]
        same.sort(key=lambda run: run["seed"])
        found[method] = Group(method, rates, same, every)
    order = [*study.METHODS, *study.FEWER]
    known = sorted(found, key=lambda m: order.index(m) if m in order else 99)
    return {method: found[method] for method in known}


def validation_loss(run: Run) -> float:
    """Infinite where the run diverged."""
    loss = run["validation_loss"]
    return math.inf if loss is None else loss


def comparisons(groups: dict[str, Group]) -> int:
    """How many differences of test losses are shown of a task."""
    pairs = {(method, LORA) for method in groups if method != LORA}
    pairs |= {pair for pair in LEARNS_MORE if set(pair) <= set(groups)}
    return len(pairs)


def difference(
    ours: Group, lora: Group, of: int
) -> tuple[float, float, float] | None:
    """Mean of ours minus LoRA's test loss, and its interval, one `of` many."""
    theirs = {run["seed"]: run for run in lora.best}
    pairs = [(x, theirs[x["seed"]]) for x in ours.best if x["seed"] in theirs]
    if not pairs:
        return None
    tokens = np.array(pairs[0][0]["test_tokens"], "float64")
    change = np.array(
        [
            np.array(x["test_sums"], "float64") - np.array(y["test_sums"])
            for x, y in pairs
        ]
    )
    random = np.random.default_rng(0)
    seeds, examples = change.shape
    means = np.empty(SAMPLES)
    for i in range(SAMPLES):
        chosen = random.integers(0, examples, examples)
        runs = random.integers(0, seeds, seeds)
        total = change[runs][:, chosen].sum() / seeds
        means[i] = total / tokens[chosen].sum()
    tail = 0.05 / of / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(change.mean(0).sum() / tokens.sum()), low, high


def table(groups: dict[str, Group], base: Run | None) -> list[str]:
    """The rows of a task."""
    forgets = any(
        "neutral_loss" in run for g in groups.values() for run in g.best
    )
    head = [
        *("method", "trained", "file, KiB", "best rate", "within 2 %", "seeds"),
        *("test loss", "to LoRA", "exact"),
    ]
    head += ["forgotten", "LoRA at this loss"] if forgets else []
    head += ["s a step"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    lora = groups.get(LORA)
    for group in groups.values():
        size = group.best[0]["file_bytes"]
        row = [
            group.label,
            f"{group.best[0]['trained']:,}",
            "-" if size is None else f"{size / 1024:,.0f}",
            f"{group.rate:g}" + ("" if group.inside else " (edge)"),
            near_best(group),
            str(len(group.best)),
            f"{group.test_loss:.3f}",
            to_lora(group, lora, comparisons(groups)),
            f"{group.mean('test_exact'):.0%}",
        ]
        if forgets:
            row.append(signed(forgotten(group, base)))
            row.append(signed(lora_forgets(group, lora, base)))
        row.append(f"{group.mean('seconds_per_step'):.2f}")
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def forgotten(group: Group, base: Run | None) -> float:
    """How much the loss on neutral text rose, at the best rate."""
    before = base["neutral_loss"] if base else math.nan
    return group.mean("neutral_loss") - before


def lora_forgets(group: Group, lora: Group | None, base: Run | None) -> float:
    """What LoRA has forgotten at a method's loss; NaN for LoRA itself."""
    if group is lora:
        return math.nan
    return forgotten_at(lora, base, group.test_loss)


def forgotten_at(
    group: Group | None, base: Run | None, loss: float, seed: int = 0
) -> float:
    """What a method forgets where its test loss is `loss`; NaN if never.

    Along its rates, from the lowest to the best; between two of them by a
    straight line. A seed that has the best rate alone takes those of seed 0.
    """
    if group is None or base is None:
        return math.nan
    rates = [run for run in group.every if run["seed"] == seed]
    rates.sort(key=lambda run: run["rate"])
    rates = rates if len(rates) > 1 else group.rates
    runs = [base, *(r for r in rates if r["rate"] <= group.rate)]
    losses = [run["test_loss"] for run in runs]
    if loss < min(losses):
        return math.nan
    rises = [run["neutral_loss"] - base["neutral_loss"] for run in runs]
    return float(np.interp(-loss, -np.array(losses), rises))


def claims(groups: dict[str, Group], base: Run | None) -> dict[str, Any]:
    """For each claim of a paper a difference, and its interval of 95 %.

    A claim holds where the whole interval is below 0. Those of test losses
    hold together in 19 cases of 20; those of what is forgotten are of
    Student's t over the seeds, and each for itself.
    """
    found: dict[str, Any] = {}
    for ours, theirs in LEARNS_MORE:
        if ours in groups and theirs in groups:
            pair = groups[ours], groups[theirs]
            if min(len(group.best) for group in pair) > 1:
                found[f"{pair[0].label} learns more than {pair[1].label}"] = (
                    difference(*pair, comparisons(groups))
                )
    for ours in FORGETS_LESS:
        if base is None or not {ours, LORA} <= set(groups):
            continue
        if len(groups[ours].best) == 1:
            continue
        rises = [
            run["neutral_loss"]
            - base["neutral_loss"]
            - forgotten_at(
                groups[LORA], base, run["test_loss"], seed=run["seed"]
            )
            for run in groups[ours].best
        ]
        mean, half = float(np.mean(rises)), half_width(rises)
        name = f"{groups[ours].label} forgets less than LoRA at one loss"
        if not math.isnan(half):
            found[name] = (mean, mean - half, mean + half)
    return found


def half_width(values: list[float]) -> float:
    """Half the interval of 95 % of a mean, by Student's t."""
    freedom = len(values) - 1
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(student_t.ppf(0.975, freedom) * error)


def signed(number: float) -> str:
    """Two decimals and a sign, or a dash."""
    return "-" if math.isnan(number) else f"{number:+.2f}"


def summary(groups: dict[str, Group], base: Run | None) -> dict[str, Any]:
    """What README and the documentation say of a task."""
    lora = groups.get(LORA)
    methods = {}
    for name, group in groups.items():
        first = group.best[0]
        found: dict[str, Any] = {"label": group.label}
        found |= {k: first[k] for k in ("trained", "file_bytes", "rate")}
        found["inside"] = group.inside
        slow = [x for x in group.rates if x["rate"] == KERAS_HUB_RATE]
        found["at_keras_hub_rate"] = slow[0]["test_loss"] if slow else None
        found["seeds"] = len(group.best)
        found["test_loss"] = group.test_loss
        found["exact"] = group.mean("test_exact")
        if lora is not None and group is not lora:
            found["to_lora"] = difference(group, lora, comparisons(groups))
        if base is not None:
            found["forgotten"] = forgotten(group, base)
            at = lora_forgets(group, lora, base)
            found["lora_forgets"] = None if math.isnan(at) else at
        methods[name] = found
    return {
        "base": base
        and {k: base[k] for k in ("test_loss", "test_exact", "neutral_loss")},
        "methods": methods,
        "claims": claims(groups, base),
    }


def to_lora(group: Group, lora: Group | None, of: int) -> str:
    """The difference as text."""
    if lora is None or group is lora:
        return ""
    found = difference(group, lora, of)
    if found is None:
        return ""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)


def near_best(group: Group) -> str:
    """The rates whose validation loss is within 2 % of the best."""
    most = 1.02 * validation_loss(group.best[0])
    near = [run["rate"] for run in group.rates if validation_loss(run) <= most]
    return f"{near[0]:g}" if len(near) == 1 else f"{near[0]:g} to {near[-1]:g}"


def valleys(
    axes: Any, groups: dict[str, Group], base: Run | None, of_weights: bool
) -> None:
    """Validation loss over the rate, a line for each method.

    The rate is that of the variables, which is what a user sets; or that of the
    weights, as they would move if each were a variable itself.
    """
    top = base["validation_loss"] if base else None
    for method, group in groups.items():
        if method not in COLOURS:
            continue
        step = study.step_of(method) if of_weights else 1.0
        rates = [step * run["rate"] for run in group.rates]
        losses = [validation_loss(run) for run in group.rates]
        axes.plot(
            rates,
            losses,
            "o-",
            color=COLOURS[method],
            markersize=4,
            linewidth=2.2 if method in (LORA, "svf") else 1.2,
            label=group.label,
        )
    every = [validation_loss(r) for g in groups.values() for r in g.rates]
    lowest = min(every)
    # A method that fails at a high rate must not hide where the others lie.
    highest = min(max(x for x in every if x < math.inf), top or 2 * lowest)
    room = 0.08 * (highest - lowest)
    axes.set_ylim(lowest - room, highest + room)
    if top == highest:
        axes.axhline(top, color="#777777", linestyle="--", linewidth=1)
        axes.annotate(
            "base model",
            (0, top),
            xycoords=("axes fraction", "data"),
            xytext=(4, -12),
            textcoords="offset points",
            color="#555555",
        )
    axes.set_xscale("log")
    kind = "of the weights" if of_weights else "as built in"
    axes.set_xlabel(f"learning rate, {kind}")
    axes.set_xlim(1e-5, 1)
    axes.set_ylabel("validation loss a token")


def front(axes: Any, groups: dict[str, Group], base: Run) -> None:
    """Forgetting over test loss: every rate a point, the best ones large.

    With a decay the points are open squares.
    """
    drawn = {}
    for method, group in groups.items():
        name, _, decay = method.partition(study.DECAY)
        if name not in COLOURS:
            continue
        drawn[method] = group
        colour = COLOURS[name]
        marker = {"marker": "s" if decay else "o", "color": colour}
        marker["markerfacecolor"] = "white" if decay else colour
        runs = [r for r in group.rates if r["test_loss"] is not None]
        x = [run["test_loss"] for run in runs]
        y = [run["neutral_loss"] - base["neutral_loss"] for run in runs]
        axes.plot(x, y, "-", color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(x, y, linestyle="", markersize=3, **marker)
        axes.plot(
            group.test_loss,
            group.mean("neutral_loss") - base["neutral_loss"],
            linestyle="",
            markersize=9,
            label=group.label,
            **marker,
        )
    losses = [group.test_loss for group in drawn.values()]
    wide = max(max(losses) - min(losses), 0.02 * base["test_loss"])
    axes.set_xlim(min(losses) - 0.1 * wide, max(losses) + 0.4 * wide)
    axes.set_ylim(-0.1, 2.0)
    axes.axhline(0, color="#777777", linewidth=1)
    axes.set_xlabel("test loss a token (left is better)")
    axes.set_ylabel("forgotten, nats a token (lower is better)")


def parameters(axes: Any, groups: dict[str, Group]) -> None:
    """Test loss over trained numbers, at each method's own best rate."""
    for method, group in groups.items():
        losses = [run["test_loss"] for run in group.best]
        spread = [
            [group.test_loss - min(losses)],
            [max(losses) - group.test_loss],
        ]
        axes.errorbar(
            group.best[0]["trained"],
            group.test_loss,
            yerr=spread,
            fmt="o",
            capsize=3,
            color=COLOURS.get(method, "#bbbbbb"),
            markersize=7,
            label=group.label if method in COLOURS else "others",
        )
    axes.set_xscale("log")
    axes.set_xlabel("trained numbers")
    axes.set_ylabel("test loss a token (lower is better)")


def draw(file: Path, *rows: list[tuple[str, Any]]) -> None:
    """One picture of a panel for each task, with one legend."""
    columns = len(rows[0])
    with plt.rc_context({"figure.facecolor": "white", "font.size": 10}):
        figure, axes = plt.subplots(
            len(rows),
            columns,
            figsize=(5.2 * columns, 4.0 * len(rows) + 0.6),
            layout="constrained",
            squeeze=False,
        )
    labels: dict[str, Any] = {}
    panels = [panel for row in rows for panel in row]
    for each, (title, fill) in zip(axes.flat, panels, strict=True):
        fill(each)
        each.set_title(title)
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
        handles, names = each.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside lower center",
        ncols=min(5, 3 * columns),
        frameon=False,
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)
    print(f"Written: {file}")


def ratios(found: dict[tuple[Any, ...], dict[str, Group]]) -> list[str]:
    """Each method's best rate in units of LoRA's, for every task."""
    methods = [m for m in study.METHODS if m not in (LORA,)]
    head = ["task, steps", *methods]
    rows = [head, ["---", *["---:"] * len(methods)]]
    for (_, task, steps), groups in found.items():
        if LORA not in groups:
            continue
        row = [f"{task}, {steps}"]
        for method in methods:
            group = groups.get(method)
            row.append(
                "" if group is None else f"{group.rate / groups[LORA].rate:.2g}"
            )
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=study.RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args()
    log = study.Log(options.results)
    folder = options.results.parent
    tasks: dict[tuple[Any, ...], list[Run]] = {}
    bases: dict[tuple[str, str], Run] = {}
    for cell, run in log.runs.items():
        if cell.method == "base":
            bases[cell.model, cell.task] = run
        else:
            key = (cell.model, cell.task, cell.steps)
            tasks.setdefault(key, []).append(run)
    found = {key: groups_of(runs) for key, runs in tasks.items()}
    page = ["# The study of learning rates", ""]
    summaries = {}
    before_panels, rate_panels = [], []
    front_panels, count_panels = [], []
    for (model, task, steps), groups in found.items():
        base = bases.get((model, task))
        title = f"{TITLES[task]}\n{model}, {steps} steps"
        page += [f"## {title.replace(chr(10), ', ')}", ""]
        if base:
            page += [
                f"Base model: test loss {base['test_loss']:.3f}, exact "
                f"{base['test_exact']:.0%}, neutral text "
                f"{base['neutral_loss']:.3f}.",
                "",
            ]
        decayed = {m: groups[m] for m in study.DECAYS if m in groups}
        fewer = {m: groups.pop(m) for m in study.FEWER if m in groups}
        keras_lora = groups.pop(study.KERAS, None)
        page += [*table(groups, base), ""]
        summaries[f"{model}, {task}, {steps}"] = summary(groups, base)
        if keras_lora:  # at KerasHub's rate alone, so in no other table
            found_of = summaries[f"{model}, {task}, {steps}"]
            found_of["enable_lora"] = summary({study.KERAS: keras_lora}, base)[
                "methods"
            ][study.KERAS]
        if fewer:
            first = {m: groups[m] for m in (LORA, "svf") if m in groups}
            page += ["Against forgetting:", "", *table(first | fewer, base), ""]
            found_of = summaries[f"{model}, {task}, {steps}"]
            of_fewer = summary(first | fewer, base)
            found_of["fewer"] = of_fewer["methods"]
            for name, claim in of_fewer["claims"].items():
                found_of["claims"].setdefault(name, claim)
        if len(groups) < DRAWN:
            continue
        for panels, of_weights in (
            (before_panels, True),
            (rate_panels, False),
        ):
            panels.append(
                (
                    title,
                    lambda axes, g=groups, b=base, w=of_weights: valleys(
                        axes, g, b, w
                    ),
                )
            )
        count_panels.append((title, lambda axes, g=groups: parameters(axes, g)))
        if base:
            of_front = groups | decayed
            front_panels.append(
                (title, lambda axes, g=of_front, b=base: front(axes, g, b))
            )
    page += ["## Best rates in units of LoRA's", "", *ratios(found), ""]
    (folder / "study.md").write_text("\n".join(page), encoding="utf-8")
    text = json.dumps(summaries, indent=1)
    (folder / "study.json").write_text(text + "\n", encoding="utf-8")
    print(f"Written: {folder / 'study.md'} and study.json")
    draw(options.pictures / "study_rates.png", before_panels, rate_panels)
    draw(options.pictures / "study_parameters.png", count_panels)
    draw(options.pictures / "study_forgetting.png", front_panels)


if __name__ == "__main__":
    main()
