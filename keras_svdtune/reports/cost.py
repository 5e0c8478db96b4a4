"""What an adapter costs: a table, and a dry run before there is one."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import rich.console
import rich.table

from keras_svdtune.hosts import attach
from keras_svdtune.hosts.host import host_matrix_of
from keras_svdtune.matrix import decompose, factors
from keras_svdtune.methods.base import Method
from keras_svdtune.model.enable import (
    adapted_part,
    checked_method,
    enabled_method,
    require_adapted,
    targets_for,
)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What a method adds to one layer.

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
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a method adds to a model. `print()` shows it as a table.

    Attributes:
        method: `Method`.
        layers: one `LayerCost` for each adapted layer.
        model_parameters: int, parameters of the model without the adapter.
        decomposition_seconds: float or None, about how long enabling will
            take on this machine; None once it is enabled.
    """

    method: Method
    layers: tuple[LayerCost, ...]
    model_parameters: int
    decomposition_seconds: float | None = None

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
        """Bytes of both."""
        return sum(x.bytes for x in self.layers)

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table, layers of equal name and shape in one row."""
        (console or rich.console.Console()).print(self.table())

    def table(self) -> rich.table.Table:
        """The table, for `rich`."""
        seconds = self.decomposition_seconds
        table = rich.table.Table(
            title=f"{self.method}",
            caption=(
                f"{self.trainable / max(self.model_parameters, 1):.4%} of "
                f"{self.model_parameters:,} parameters are trained. Suggested "
                f"learning rate: {self.method.suggested_learning_rate:g}"
                + (f". Enabling takes about {seconds:.1f} s" if seconds else "")
            ),
            title_style="bold",
            show_footer=True,
        )
        table.add_column("layer", "total", style="cyan", overflow="fold")
        for name, footer in (
            ("matrix", ""),
            ("layers", f"{len(self.layers):,}"),
            ("rank", ""),
            ("trainable", f"{self.trainable:,}"),
            ("extra frozen", f"{self.frozen:,}"),
            ("MiB", f"{self.bytes / 2**20:.2f}"),
        ):
            style = "bold green" if name == "trainable" else None
            table.add_column(name, footer, justify="right", style=style)
        for (name, shape), group in self._groups().items():
            table.add_row(
                name,
                f"{shape[0]} x {shape[1]}",
                f"{len(group):,}",
                _range([x.rank for x in group]),
                f"{sum(x.trainable for x in group):,}",
                f"{sum(x.frozen for x in group):,}",
                f"{sum(x.bytes for x in group) / 2**20:.2f}",
            )
        return table

    def _groups(self) -> dict[tuple[str, tuple[int, int]], list[LayerCost]]:
        groups: dict[tuple[str, tuple[int, int]], list[LayerCost]] = {}
        for layer in self.layers:
            name = layer.path.rsplit("/", 1)[-1]
            groups.setdefault((name, layer.matrix), []).append(layer)
        return groups


def _range(ranks: list[int | None]) -> str:
    known = [rank for rank in ranks if rank is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low}" if low == high else f"{low}-{high}"


def adapter_summary(model: keras.Model) -> Cost:
    """Prints what the enabled adapter adds to `model`, and returns it.

    Args:
        model: a model with an adapter.

    Returns:
        `Cost`.

    Raises:
        ValueError: the model has no adapter.
    """
    cost = cost_of(model)
    cost.print()
    return cost


def cost_of(model: keras.Model) -> Cost:
    """What `adapter_summary` prints."""
    root = adapted_part(model)
    layers = require_adapted(root)
    costs = tuple(
        _cost(path, layer.adapter.method, layer)
        for path, layer in layers.items()
    )
    extra = sum(x.trainable + x.frozen for x in costs)
    return Cost(enabled_method(root), costs, root.count_params() - extra)


def estimate(
    model: keras.Model,
    method: Method,
    target_layer_names: Iterable[str] | None = None,
) -> Cost:
    """A dry run of `enable_adapter`: what it would cost. Touches nothing.

    Parameters and bytes are exact. The seconds are the operations of the
    decompositions at the speed of one that is timed on the first call.

    Args:
        model, method, target_layer_names: as for `enable_adapter`.

    Returns:
        `Cost`.

    Raises:
        ValueError: as `enable_adapter`, save for NaN and infinity in a kernel.

    Example:

    ```python
    estimate(gemma, SVF()).print()
    ```
    """
    root = adapted_part(model)
    method = checked_method(method)
    layers = targets_for(root, method, target_layer_names)
    costs = tuple(
        _cost(path, _with_rank(method, x, path), x)
        for path, x in layers.items()
    )
    work = sum(
        _operations(method, x.shape) * math.prod(x.batch)
        for x in map(attach.view_of, layers.values())
    )
    seconds = work * _seconds_per_operation() if work else None
    return Cost(method, costs, root.count_params(), seconds)


def _cost(path: str, method: Method, layer: Any) -> LayerCost:
    view = attach.view_of(layer)
    shape = view.shape
    weights = [
        (
            math.prod(view.batch + w.shape),
            w.trainable,
            w.dtype or layer.variable_dtype,
        )
        for w in method.weights(shape)
    ]
    return LayerCost(
        path,
        shape,
        sum(n for n, trainable, _ in weights if trainable),
        sum(n for n, trainable, _ in weights if not trainable),
        sum(n * _bytes_of(dtype) for n, _, dtype in weights),
        rank=method.current_rank(getattr(layer, "adapter", None)),
    )


def _bytes_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _with_rank(method: Method, layer: Any, path: str) -> Method:
    """`method` with an integer rank for this layer, if its rank is energy."""
    energy = getattr(method, "rank", None)
    if not isinstance(energy, float):
        return method
    matrix = host_matrix_of(layer)
    needs = method.needs(tuple(matrix.shape[-2:]))
    assert needs is not None
    each = matrix if len(matrix.shape) == 3 else matrix[None]
    rank = max(
        factors.rank_of_energy(
            decompose.decompose(one, factors.Needs("small_side"), path).s,
            energy,
            needs.part,
        )
        for one in each
    )
    return dataclasses.replace(method, rank=rank)  # type: ignore[call-arg]


def _operations(method: Method, shape: tuple[int, int]) -> float:
    """About how many floating-point operations one decomposition takes."""
    n, needs = min(shape), method.needs(shape)
    if needs is None:
        return 0.0
    times = getattr(method, "iterations", 1) if method.base_mode else 1
    # Of a few components the eigenvectors are not computed for all.
    cubes = 5.0 if needs.few_of(n) else 12.0
    return times * (2.0 * n * n * max(shape) + cubes * n**3)


@functools.cache
def _seconds_per_operation(n: int = 512) -> float:
    """Times one small decomposition on this machine, once."""
    needs = factors.Needs("small_side")
    matrix = np.random.default_rng(0).standard_normal((n, n), "float32")
    # Not `decompose`, which would read the second from disk.
    decompose.computed(matrix, needs)  # warm up: threads, compilation on a GPU
    start = time.perf_counter()
    decompose.computed(matrix, needs)
    return (time.perf_counter() - start) / (14.0 * n**3)
