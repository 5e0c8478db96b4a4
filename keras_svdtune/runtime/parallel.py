"""Runs one job for each layer, on all cores, behind a progress bar."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import keras
import threadpoolctl
from rich import progress

from keras_svdtune.runtime import processes
from keras_svdtune.runtime.precision import on_host

T = TypeVar("T")


def run_all(
    what: str, jobs: Mapping[str, Callable[[], T]], bar: bool = True
) -> dict[str, T]:
    """Runs one job for each layer; returns the results by path, in order.

    The host decomposes several matrices at a time, each with one BLAS thread.
    That is as fast as one matrix with all threads on an idle machine, and many
    times faster on a busy one: BLAS threads wait for each other. A GPU takes
    one matrix at a time.

    The bar shows the number done, the time left and the last layer;
    `keras.config.disable_interactive_logging()` turns it off.

    Args:
        what: str, the label of the bar.
        jobs: the function to run for each layer, by its path.
        bar: bool. Whether to show the bar.

    Raises:
        Whatever a job raises, or an interrupt. Those not begun are dropped.
    """
    index, _ = processes.processes()
    workers = (os.cpu_count() or 1) if on_host() else 1
    shown = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        progress.TextColumn("[dim]{task.fields[layer]}"),
        disable=index > 0
        or not (bar and keras.config.is_interactive_logging_enabled()),
    )
    with shown, threadpoolctl.threadpool_limits(1, "blas"):
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
