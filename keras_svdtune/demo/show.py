"""What the demo prints and plots."""

import time
from pathlib import Path

import keras
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from keras_svdtune.demo import pirate
from keras_svdtune.demo.optional import require
from keras_svdtune.demo.result import Result

console = Console()
_start = time.perf_counter()


def step(what: str) -> None:
    """Says what comes next, and how long it took to get here."""
    minutes, seconds = divmod(int(time.perf_counter() - _start), 60)
    console.print(f"[dim]{minutes}:{seconds:02d}[/] [bold]{escape(what)}[/]")


class training_bar:
    """A progress bar with the loss, smoothed over about ten steps.

    `keras.config.disable_interactive_logging()` turns it off.
    """

    def __init__(self, steps: int) -> None:
        self._bar = Progress(
            TextColumn("     training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("loss [bold]{task.fields[loss]}"),
            console=console,
            disable=not keras.config.is_interactive_logging_enabled(),
        )
        self._task = self._bar.add_task("", total=steps, loss="-")
        self._smooth: float | None = None
        self._bar.start()

    def advance(self, loss: float) -> None:
        last = loss if self._smooth is None else self._smooth
        self._smooth = 0.9 * last + 0.1 * loss
        self._bar.update(self._task, advance=1, loss=f"{self._smooth:.3f}")

    def stop(self) -> None:
        self._bar.stop()


def answers(result: Result, prompts: tuple[str, ...]) -> None:
    """The answers before and after, side by side, pirate speech in colour."""
    table = Table(title="Before and after", title_style="bold", show_lines=True)
    for column in ("question", "base model", f"with {result.method}"):
        table.add_column(column, ratio=2)
    table.columns[0].ratio = 1
    for i, prompt in enumerate(prompts):
        table.add_row(
            Text(prompt, style="cyan"),
            coloured(result.before.answers[i]),
            coloured(result.after.answers[i]),
        )
    console.print(table)


def coloured(text: str) -> Text:
    """A text with its pirate words in yellow."""
    shown = Text(text)
    place = 0
    for word, is_pirate in pirate.marked_words(text):
        place = text.lower().index(word, place)
        if is_pirate:
            shown.stylize("bold yellow", place, place + len(word))
        place += len(word)
    return shown


def scores(result: Result) -> None:
    """The measurements before and after."""
    before, after = result.before, result.after
    table = Table(title="Held-out questions", title_style="bold")
    table.add_column("")
    for column in ("base model", f"with {result.method}"):
        table.add_column(column, justify="right")
    table.add_row(
        "loss per answer token",
        f"{before.loss:.3f}",
        f"[bold green]{after.loss:.3f}",
    )
    table.add_row(
        f"dialect score (arrr itself: {result.ceiling:.1%})",
        f"{before.dialect:.1%}",
        f"[bold green]{after.dialect:.1%}",
    )
    console.print(table)


def checks(result: Result) -> None:
    """Whether the file and the merged model give the same answers."""
    count = len(result.after.answers)
    console.print(
        f"{result.file}: [bold]{result.file_bytes / 1024:,.0f} KiB[/], "
        f"{result.trainable:,} trained numbers"
    )
    for what, said in (
        ("Loaded into a new model", result.reloaded),
        ("Merged into its kernels", result.merged),
    ):
        same = sum(
            a == b for a, b in zip(said, result.after.answers, strict=True)
        )
        colour = "green" if same == count else "yellow"
        console.print(
            f"{what}: [{colour}]{same} of {count} answers the same[/]"
        )


def comparison(results: list[Result]) -> None:
    """One row for each method."""
    base = results[0].before
    table = Table(title=f"All methods on {results[0].model}")
    table.title_style = "bold"
    table.add_column("method", style="cyan")
    for column in (
        "trained",
        "file, KiB",
        "s/step",
        "held-out loss",
        "dialect",
        "reload, merge agree",
    ):
        table.add_column(column, justify="right")
    table.add_row(
        "base", "", "", "", f"{base.loss:.3f}", f"{base.dialect:.1%}", ""
    )
    for result in results:
        said = result.after.answers
        agree = [
            sum(a == b for a, b in zip(other, said, strict=True))
            for other in (result.reloaded, result.merged)
        ]
        table.add_row(
            result.method,
            f"{result.trainable:,}",
            f"{result.file_bytes / 1024:,.0f}",
            f"{result.seconds_per_step:.2f}",
            f"{result.after.loss:.3f}",
            f"{result.after.dialect:.1%}",
            f"{agree[0]}, {agree[1]} of {len(said)}",
        )
    console.print(table)


def plot(results: list[Result], file: Path) -> None:
    """The loss curves, as a PNG."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for result in results:
        steps = range(1, len(result.losses) + 1)
        # The loss that AdaLoRA minimises holds one, the held-out loss does not.
        penalty = " (line: + penalty)" if result.penalty else ""
        (line,) = axes.plot(
            steps,
            smooth(result.losses),
            label=f"{result.method}: {result.after.loss:.2f} held out{penalty}",
        )
        colour = line.get_color()
        if len(results) == 1:
            axes.plot(steps, result.losses, color=colour, alpha=0.25)
        axes.plot([steps[-1]], [result.after.loss], "o", color=colour)
    base = results[0].before.loss
    axes.axhline(base, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        f"base model, held out: {base:.2f}",
        (1, base),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        horizontalalignment="right",
        color="grey",
    )
    axes.set_xlabel("training step")
    axes.set_ylabel("loss per answer token")
    axes.set_title(f"{results[0].model} learns to talk like a pirate")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the curves: eight methods would cover them.
    figure.legend(
        loc="outside right upper",
        frameon=False,
        title="line: training\ndot: held out",
    )
    figure.savefig(file, dpi=150)
    plt.close(figure)


def smooth(losses: list[float]) -> list[float]:
    """A running mean that looks back about ten steps."""
    smoothed: list[float] = []
    for loss in losses:
        last = smoothed[-1] if smoothed else loss
        smoothed.append(0.85 * last + 0.15 * loss)
    return smoothed
