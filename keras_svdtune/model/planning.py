"""Plans the adapters of many layers, on all cores and in all processes.

One process decomposes several layers at a time. If a program has several
processes (hosts of a TPU slice), as many kernels come to the hosts at a time as
all their cores can work on; one process decomposes each kernel and sends the
others what it found. So all have the same factors, to the bit: two that
decompose the same matrix may find vectors of another sign, or rotated.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import NoReturn, TypeVar

from keras_svdtune.adapter.plan import (
    AdapterPlan,
    Values,
    first_values,
    plan_from,
)
from keras_svdtune.hosts.attach import place_values
from keras_svdtune.hosts.replace_base import kernel_maker
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.runtime.parallel import run_all
from keras_svdtune.runtime.precision import on_host
from keras_svdtune.runtime.processes import processes, shared
from keras_svdtune.runtime.types import Array

T = TypeVar("T")


def plan_adapters(
    what: str,
    targets: dict[str, Target],
    methods: dict[str, Method],
    known: dict[str, Values] | None = None,
    rounds: dict[str, bool] | None = None,
) -> dict[str, AdapterPlan]:
    """Plans an adapter for each target, ready to attach; touches no layer.

    Args:
        what: str, the label of the progress bar.
        targets, methods: each target and its method, by path.
        known: first values that are known, such as those of a file, by path and
            name. A matrix of which all are known is not decomposed.
        rounds: whether the basis is that of the rounded kernel, by path; as
            `Target.rounds` says if None.

    Raises:
        Whatever a decomposition raises; with several processes, in all.
    """
    known = known or {}
    jobs = {
        path: _Job(
            path,
            target,
            methods[path],
            known.get(path, {}),
            target.rounds(methods[path]) if rounds is None else rounds[path],
        )
        for path, target in targets.items()
    }
    _, count = processes()
    if count > 1:
        return _on_all_processes(what, jobs)
    return run_all(what, {path: job.plan for path, job in jobs.items()})


@dataclasses.dataclass(frozen=True)
class _Job:
    """The adapter to plan for one target; as for `plan_adapters`."""

    path: str
    target: Target
    method: Method
    known: Values
    rounds: bool

    def plan(self) -> AdapterPlan:
        matrix = self.target.host_matrix()
        return self.finished(*self.found(matrix), matrix)

    def found(self, matrix: Array) -> tuple[Method, Values]:
        """Returns the resolved method and first values: the costly part."""
        if self.known:
            weights = self.method.weights(self.target.view.shape)
            wanted = {w.name for w in weights if not w.overwritten}
            if wanted <= set(self.known):
                return self.method, {}  # nothing to decompose
        return first_values(
            self.method,
            matrix,
            self.path,
            self.rounds,
            kernel_maker(self.target, self.method),
        )

    def finished(
        self, method: Method, values: Values, matrix: Array
    ) -> AdapterPlan:
        """Returns the plan for what `found` returned."""
        return plan_from(
            method,
            matrix,
            {**values, **self.known},
            self.rounds,
            kernel_maker(self.target, method),
            functools.partial(place_values, self.target),
        )


def _on_all_processes(
    what: str, jobs: dict[str, _Job]
) -> dict[str, AdapterPlan]:
    index, count = processes()
    workers = (os.cpu_count() or 1) if on_host() else 1
    # Hosts may differ in cores, but must go through the layers alike.
    width = count * shared(0, lambda: workers)
    paths = list(jobs)
    plans: dict[str, AdapterPlan] = {}
    for start in range(0, len(paths), width):
        group = paths[start : start + width]
        owner = {path: i % count for i, path in enumerate(group)}
        # Each kernel in turn: all processes bring it to the hosts together.
        matrices = {path: jobs[path].target.host_matrix() for path in group}
        ours = {
            path: functools.partial(
                _attempt,
                functools.partial(jobs[path].found, matrices[path]),
            )
            for path in group
            if owner[path] == index
        }
        outcomes = run_all(f"{what} {start + 1} to {start + len(group)}", ours)
        for path in group:
            make = outcomes.get(path, _of_another_process)
            method, values = shared(owner[path], make)
            plans[path] = jobs[path].finished(
                method, values, matrices.pop(path)
            )
    return plans


def _of_another_process() -> NoReturn:
    raise AssertionError("`shared` calls this in the owner only")


def _attempt(job: Callable[[], T]) -> Callable[[], T]:
    """Runs `job`; returns a function that returns its result or raises."""
    try:
        outcome = job()
    except Exception as error:
        return functools.partial(_raise, error)
    return lambda: outcome


def _raise(error: Exception) -> NoReturn:
    raise error
