"""The progress bar of work that goes layer by layer."""

import contextlib
from collections.abc import Callable, Iterator

import keras
from rich import progress


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with a layer's name before its turn.

    Shows what is done, the layer, how many of how many, and the time left.
    `keras.config.disable_interactive_logging()` turns it off.
    """
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        progress.TextColumn("[dim]{task.fields[layer]}"),
        disable=not keras.config.is_interactive_logging_enabled(),
    ) as bar:
        task = bar.add_task(what, total=total, layer="")
        started = False

        def step(layer: str) -> None:
            nonlocal started
            bar.update(task, advance=int(started), layer=layer)
            started = True

        yield step
        bar.update(task, completed=total, layer="")
