"""The cost of an adapter: a summary, and an estimate before it is enabled."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import rich.table

from keras_svdtune.hosts.target import Target
from keras_svdtune.matrix.decompose import computed, decompose
from keras_svdtune.matrix.factors import Needs, rank_of_energy
from keras_svdtune.matrix.rounding import rounded
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.low_rank import RankedMethod
from keras_svdtune.methods.replaced_base import ReplacesBase
from keras_svdtune.methods.top_svf import TopSVF
from keras_svdtune.model.beside import trained_beside
from keras_svdtune.model.checks import checked_method, targets_for
from keras_svdtune.model.names import adapter_weights
from keras_svdtune.model.patterns import methods_by_path
from keras_svdtune.model.state import (
    DEFAULT,
    adapted_part,
    enabled_method,
    require_adapted,
)
from keras_svdtune.reports.table import (
    PrintsTable,
    grouped_table,
    number_range,
)
from keras_svdtune.runtime.types import Model


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of a method on one layer.

    Attributes:
        path: str, the layer.
        matrix: (in, out), its kernel as a matrix.
        trainable: int, trainable parameters.
        frozen: int, frozen parameters beside the kernel.
        bytes: int, of both.
        rank: int or None, the rank of the method there, where it has one.
    """

    path: str
    matrix: tuple[int, int]
    trainable: int
    frozen: int
    bytes: int
    rank: int | float | None = None


@dataclasses.dataclass(frozen=True)
class Cost(PrintsTable):
    """The cost of a method on a model. `print()` shows it as a table.

    Attributes:
        method: `Method`.
        layers: one `LayerCost` for each adapted layer.
        model_parameters: int, parameters of the model without the adapter.
        decomposition_seconds: float or None, about how long enabling will
            take on this machine; None once it is enabled.
        beside: what else trains in the model, by `<layer path>/<variable>`:
            its shape. The head of a Task, for example.
        adapters: the model's adapters by name: the weight with which each is
            set, 0 if it is not (`set_adapter`).
    """

    method: Method
    layers: tuple[LayerCost, ...]
    model_parameters: int
    decomposition_seconds: float | None = None
    beside: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    adapters: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        return sum(x.trainable for x in self.layers)

    @property
    def frozen(self) -> int:
        """Frozen parameters beside the kernels."""
        return sum(x.frozen for x in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of the trainable and frozen parameters."""
        return sum(x.bytes for x in self.layers)

    def table(self) -> rich.table.Table:
        """Returns the table, for `rich`."""
        seconds = self.decomposition_seconds
        return grouped_table(
            title=f"{self.method}",
            caption=(
                f"{self.trainable / max(self.model_parameters, 1):.4%} of "
                f"{self.model_parameters:,} parameters are trained. Suggested "
                f"learning rate: {self.method.suggested_learning_rate:g}"
                + (f". Enabling takes about {seconds:.1f} s" if seconds else "")
                + self._also()
                + self._names()
            ),
            layers=self.layers,
            columns=("rank", "trainable", "extra frozen", "MiB"),
            cells=_cells,
            footer=("", *_cells(self.layers)[1:]),
            highlight="trainable",
        )

    def _also(self) -> str:
        if not self.beside:
            return ""
        each = (f"{key} {shape}" for key, shape in self.beside.items())
        count = sum(math.prod(shape) for shape in self.beside.values())
        return f". Besides, {count:,} parameters train: {', '.join(each)}"

    def _names(self) -> str:
        if set(self.adapters) <= {DEFAULT}:
            return ""
        each = (
            name + (" (set)" if weight == 1.0 else f" (set, {weight:g})")
            if weight
            else name
            for name, weight in self.adapters.items()
        )
        return f". Adapters: {', '.join(each)}"


def _cells(layers: Sequence[LayerCost]) -> tuple[str, str, str, str]:
    return (
        number_range(x.rank for x in layers),
        f"{sum(x.trainable for x in layers):,}",
        f"{sum(x.frozen for x in layers):,}",
        f"{sum(x.bytes for x in layers) / 2**20:.2f}",
    )


def adapter_summary(model: Model) -> Cost:
    """Prints the cost of the enabled adapter as a table, and returns it.

    Of several adapters, all of which cost the same, it tells the names and
    which is set. It names what else trains in `model`, such as the head of a
    Task.

    Args:
        model: a model with an adapter.

    Raises:
        ValueError: the model has no adapter.
    """
    cost = cost_of(model)
    cost.print()
    return cost


def cost_of(model: Model) -> Cost:
    """Returns the cost of the enabled adapter."""
    root = adapted_part(model)
    costs = tuple(
        _cost(path, target.adapted.method, target)
        for path, target in require_adapted(root).items()
    )
    extra = sum(x.trainable + x.frozen for x in costs)
    beside = {k: tuple(x.shape) for k, x in trained_beside(model).items()}
    return Cost(
        enabled_method(root),
        costs,
        root.count_params() - extra,
        beside=beside,
        adapters=adapter_weights(model),
    )


def estimate(
    model: Model,
    method: Method,
    target_layer_names: Iterable[str] | None = None,
    *,
    exclude: Iterable[str] = (),
    rank_pattern: Mapping[str, float] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Cost:
    """Estimates the cost of `enable_adapter`. Touches nothing.

    Parameters and bytes are exact. The seconds are computed from the number of
    operations, and the speed of one decomposition timed on the first call.

    Args:
        model, method, target_layer_names, exclude, rank_pattern,
            alpha_pattern: as for `enable_adapter`.

    Raises:
        ValueError: as `enable_adapter`, save for NaN and infinity in a kernel.

    Example:

    ```python
    estimate(gemma, SVF()).print()
    ```
    """
    root = adapted_part(model)
    method = checked_method(method)
    targets = targets_for(root, method, target_layer_names, exclude=exclude)
    methods = methods_by_path(
        method, targets, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    costs = tuple(
        _cost(path, _resolved(methods[path], x, path), x)
        for path, x in targets.items()
    )
    work = sum(
        _operations(methods[path], x.view.shape) * math.prod(x.view.batch)
        for path, x in targets.items()
    )
    seconds = work * _seconds_per_operation() if work else None
    return Cost(method, costs, root.count_params(), seconds)


def _cost(path: str, method: Method, target: Target) -> LayerCost:
    view = target.view
    weights = [
        (
            math.prod(view.batch + w.shape),
            w.trainable,
            w.dtype or target.owner.variable_dtype,
        )
        for w in method.weights(view.shape)
    ]
    return LayerCost(
        path,
        view.shape,
        sum(n for n, trainable, _ in weights if trainable),
        sum(n for n, trainable, _ in weights if not trainable),
        sum(n * _bytes_of(dtype) for n, _, dtype in weights),
        rank=method.current_rank(target.adapter),
    )


def _bytes_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _resolved(method: Method, target: Target, path: str) -> Method:
    """Returns `method` for one matrix, with an integer rank if it has one."""
    method = method.for_shape(target.view.shape)
    if not isinstance(method, (RankedMethod, TopSVF)):
        return method
    share = method.rank
    if not isinstance(share, float):
        return method
    matrix = target.host_matrix()
    if target.rounds(method):  # as `adapter/plan.py` does
        matrix = rounded(matrix)
    needs = method.needs(target.view.shape)
    assert needs is not None
    each = matrix if len(matrix.shape) == 3 else matrix[None]
    rank = max(
        rank_of_energy(
            decompose(one, Needs("small_side"), path).s,
            share,
            needs.part,
        )
        for one in each
    )
    return method.with_rank(rank)


def _operations(method: Method, shape: tuple[int, int]) -> float:
    """Estimates the floating-point operations of one decomposition."""
    n, needs = min(shape), method.for_shape(shape).needs(shape)
    if needs is None:
        return 0.0
    fitted = isinstance(method, ReplacesBase) and method.quantization
    times = getattr(method, "iterations", 1) if fitted else 1
    # For a few components only their eigenvectors are computed.
    cubes = 5.0 if needs.few_of(n) else 12.0
    return times * (2.0 * n * n * max(shape) + cubes * n**3)


@functools.cache
def _seconds_per_operation(n: int = 512) -> float:
    """Times one small decomposition on this machine, once."""
    needs = Needs("small_side")
    matrix = np.random.default_rng(0).standard_normal((n, n), "float32")
    # Not `decompose`, which would read the second result from disk.
    computed(matrix, needs)  # warm up: threads, compilation on a GPU
    start = time.perf_counter()
    computed(matrix, needs)
    return (time.perf_counter() - start) / (14.0 * n**3)
