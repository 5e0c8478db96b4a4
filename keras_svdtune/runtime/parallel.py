"""Runs one job for each layer, on all cores, behind a progress bar."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import keras
import threadpoolctl
from rich import errors, progress

from keras_svdtune.runtime import processes
from keras_svdtune.runtime.precision import on_host
from keras_svdtune.runtime.together import Together

T = TypeVar("T")

_ONE_BLAS_THREAD = Together(lambda: threadpoolctl.threadpool_limits(1, "blas"))
_BAR = threading.Lock()


def run_all(
    what: str, jobs: Mapping[str, Callable[[], T]], bar: bool = True
) -> dict[str, T]:
    """Runs one job for each layer; returns the results by path, in order.

    The host decomposes several matrices at a time, each with one BLAS thread.
    That is as fast as one matrix with all threads on an idle machine, and many
    times faster on a busy one: BLAS threads wait for each other. A GPU takes
    one matrix at a time.

    The bar shows the number done, the time left and the last layer;
    `keras.config.disable_interactive_logging()` turns it off. A terminal has
    room for one bar: of two threads that run jobs the second shows none. No
    jobs, no bar.

    Args:
        what: str, the label of the bar.
        jobs: the function to run for each layer, by its path.
        bar: bool. Whether to show the bar.

    Raises:
        Whatever a job raises, or an interrupt. Those not begun are dropped.
    """
    if not jobs:
        return {}
    workers = (os.cpu_count() or 1) if on_host() else 1
    with _bar(bar) as shown, _ONE_BLAS_THREAD:
        task = shown.add_task(what, total=len(jobs), layer="")
        pool = ThreadPoolExecutor(workers)
        try:
            futures = {pool.submit(job): path for path, job in jobs.items()}
            for future in as_completed(futures):
                future.result()
                shown.update(task, advance=1, layer=futures[future])
        finally:
            pool.shutdown(cancel_futures=True)
        shown.update(task, layer="")
    return {path: future.result() for future, path in futures.items()}


def in_turn(what: str, items: Sequence[T]) -> Iterator[T]:
    """Yields items one by one, behind a bar like that of `run_all`."""
    with _bar(True) as shown:
        task = shown.add_task(what, total=len(items), layer="")
        for item in items:
            yield item
            shown.update(task, advance=1)


@contextlib.contextmanager
def _bar(wanted: bool) -> Iterator[progress.Progress]:
    """Shows a bar, if it is wanted and there is room for it."""
    index, _ = processes.processes()
    wanted = (
        wanted and index == 0 and keras.config.is_interactive_logging_enabled()
    )
    ours = wanted and _BAR.acquire(blocking=False)
    shown = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        progress.TextColumn("[dim]{task.fields[layer]}"),
        disable=not ours,
    )
    try:
        try:
            shown.start()
        except errors.LiveError:  # the user shows something; old releases
            shown.disable = True
        yield shown
    finally:
        shown.stop()
        if ours:
            _BAR.release()
