"""Adapters for many layers, prepared on all cores and all processes.

One process decomposes several layers at a time. Where a program has several
processes (hosts of a TPU slice), each decomposes other layers: some kernels at
a time come to the hosts, as many as the cores of all of them can work on; each
kernel is decomposed by one process, and what it found is sent to the others.
So all have the same factors, to the bit: two that decompose the same matrix may
find vectors of another sign, or turned.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

from keras_svdtune.adapter.plan import Plan, known_plan, started
from keras_svdtune.hosts import attach
from keras_svdtune.hosts.host import host_matrix_of
from keras_svdtune.hosts.replace_base import kernel_maker
from keras_svdtune.methods.base import Method
from keras_svdtune.runtime import processes
from keras_svdtune.runtime.parallel import run_all
from keras_svdtune.runtime.precision import on_host

Values = dict[str, Any]
T = TypeVar("T")


def plan_layers(
    what: str,
    layers: dict[str, Any],
    methods: dict[str, Method],
    known: dict[str, Values] | None = None,
) -> dict[str, Plan]:
    """An adapter for each layer, ready to attach; touches nothing.

    Args:
        what: str, what is done, before the progress bar.
        layers: by path.
        methods: the method of each.
        known: first values that are known, such as those of a file, by path
            and name. A layer of which all are known is not decomposed.

    Raises:
        Whatever a decomposition raises; with several processes, in all.
    """
    known = known or {path: {} for path in layers}
    _, count = processes.processes()
    if count > 1:
        return _on_all_processes(what, layers, methods, known)
    jobs = {
        path: functools.partial(
            _plan, path, layer, methods[path], known[path], None
        )
        for path, layer in layers.items()
    }
    return run_all(what, jobs)


def _plan(
    path: str, layer: Any, method: Method, known: Values, found: Any
) -> Plan:
    """The plan of one layer, from what was found of it, if anything was."""
    if found is None:
        matrix = host_matrix_of(layer)
        found = _start(path, layer, method, known, matrix)
    else:
        *found, matrix = found
    method, values = found
    maker = kernel_maker(layer, method.base_mode)
    place = functools.partial(attach.place_values, layer)
    if set(known) >= set(values):
        return known_plan(method, matrix, dict(known), maker, place)
    ready = known_plan(method, matrix, values, maker, place)
    ready.values.update(known)
    return ready


def _start(
    path: str, layer: Any, method: Method, known: Values, matrix: Any
) -> tuple[Method, Values]:
    computed = {
        w.name
        for w in method.weights(tuple(matrix.shape[-2:]))
        if not w.overwritten
    }
    if known and computed <= set(known):
        return method, {}  # nothing to decompose
    return started(method, matrix, path, kernel_maker(layer, method.base_mode))


def _on_all_processes(
    what: str,
    layers: dict[str, Any],
    methods: dict[str, Method],
    known: dict[str, Values],
) -> dict[str, Plan]:
    index, count = processes.processes()
    workers = (os.cpu_count() or 1) if on_host() else 1
    # Hosts may differ, and must not in how they go through the layers.
    width = count * processes.shared(0, lambda: workers)
    paths = list(layers)
    plans: dict[str, Plan] = {}
    for start in range(0, len(paths), width):
        group = paths[start : start + width]
        owner = {path: i % count for i, path in enumerate(group)}
        # Each kernel in turn: all processes bring it to the hosts together.
        matrices = {path: host_matrix_of(layers[path]) for path in group}
        jobs = {
            path: functools.partial(
                _attempt,
                functools.partial(
                    _start,
                    *(path, layers[path], methods[path], known[path]),
                    matrices[path],
                ),
            )
            for path in group
            if owner[path] == index
        }
        outcomes = run_all(f"{what} {start + 1} to {start + len(group)}", jobs)
        for path in group:
            found = processes.shared(owner[path], outcomes.get(path, dict))
            plans[path] = _plan(
                path,
                layers[path],
                methods[path],
                known[path],
                (*found, matrices.pop(path)),
            )
    return plans


def _attempt(job: Callable[[], T]) -> Callable[[], T]:
    """A function that returns what `job` did, or raises what it raised."""
    try:
        outcome = job()
    except Exception as error:
        return functools.partial(_raise, error)
    return lambda: outcome


def _raise(error: Exception) -> Any:
    raise error
