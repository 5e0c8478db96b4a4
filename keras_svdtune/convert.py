"""From any adapter to a LoRA, and how far that is from it.

Every method changes W into some W'. What it adds, dW = W' - W, is a matrix
like any other, and a product of two thin matrices A·B comes as near to it as
its singular values allow:

- the low-rank methods add a thin product already, and hand it over
  (`Method.low_rank_factors`): PiSSA and MiLoRA at twice their rank,
  A·B - A₀·B₀ = [A A₀]·[B; -B₀]; LoRA-XS and AdaLoRA at their own;
- of any other dW, the truncated singular value decomposition is the best
  approximation at a given rank (Eckart and Young).
"""

import dataclasses
import functools
import math
from typing import Any

import keras
import numpy as np
import rich.console
import rich.table
from keras import ops

from keras_svdtune import svd
from keras_svdtune.adapter import Plan
from keras_svdtune.attach import matrix_of
from keras_svdtune.enable import (
    adapted_part,
    check_fit,
    enabled_method,
    replace_adapters,
    require_adapted,
)
from keras_svdtune.fingerprint import fingerprint
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.progress import run_all


@dataclasses.dataclass(frozen=True)
class LayerConversion:
    """How near the thin product A·B of one layer comes to its dW = W' - W.

    Attributes:
        path: str, the layer.
        matrix: (in, out), its kernel as a matrix.
        rank: int, of A·B.
        change: float, ‖dW‖, the Frobenius norm.
        error: float, ‖dW - A·B‖ / ‖dW‖, measured; 0 where dW is 0.
    """

    path: str
    matrix: tuple[int, int]
    rank: int
    change: float
    error: float


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How near a conversion came. `print()` shows it as a table.

    Attributes:
        method: `Method`, what was converted.
        layers: one `LayerConversion` for each adapted layer.
    """

    method: Method
    layers: tuple[LayerConversion, ...]

    @property
    def error(self) -> float:
        """‖dW - A·B‖ / ‖dW‖ over all layers."""
        return _error_of(self.layers)

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table, layers of equal name and shape in one row."""
        (console or rich.console.Console()).print(self.table())

    def table(self) -> rich.table.Table:
        """The table, for `rich`."""
        table = rich.table.Table(
            title=f"{self.method}, as LoRA",
            caption=(
                "The error is ‖dW - A·B‖ / ‖dW‖, dW what the adapter adds to "
                "the kernel. Rounding to float32 leaves about 1e-7·‖W‖ / ‖dW‖."
            ),
            title_style="bold",
            show_footer=True,
        )
        table.add_column("layer", "total", style="cyan", overflow="fold")
        worst = max((x.error for x in self.layers), default=0.0)
        for name, footer in (
            ("matrix", ""),
            ("layers", f"{len(self.layers):,}"),
            ("rank", ""),
            ("error", f"{self.error:.1e}"),
            ("largest error", f"{worst:.1e}"),
        ):
            style = "bold green" if name == "error" else None
            table.add_column(name, footer, justify="right", style=style)
        groups: dict[tuple[str, tuple[int, int]], list[LayerConversion]] = {}
        for layer in self.layers:
            name = layer.path.rsplit("/", 1)[-1]
            groups.setdefault((name, layer.matrix), []).append(layer)
        for (name, shape), group in groups.items():
            low, high = min(x.rank for x in group), max(x.rank for x in group)
            table.add_row(
                name,
                f"{shape[0]} x {shape[1]}",
                f"{len(group):,}",
                f"{low}" if low == high else f"{low}-{high}",
                f"{_error_of(group):.1e}",
                f"{max(x.error for x in group):.1e}",
            )
        return table


def _error_of(layers: Any) -> float:
    change = math.hypot(*(x.change for x in layers))
    missed = math.hypot(*(x.error * x.change for x in layers))
    return missed / change if change else 0.0


@dataclasses.dataclass(frozen=True)
class ThinProduct:
    """dW of one layer as A·B: a (in, k), b (k, out), float32 arrays."""

    a: np.ndarray
    b: np.ndarray
    measured: LayerConversion


def to_lora(model: keras.Model, rank: int | None = None) -> Conversion:
    """Turns the enabled adapter into a LoRA, in place.

        y = x·W' = x·(W + dW)   becomes   y = x·W + x·A·B

    Afterwards the model is one on which `LoRA` was enabled: `fit` trains A
    (in, r) and B (r, out), and `save_adapter`, `merge_adapter` and the others
    work as ever. Everything is computed before anything is touched, so an
    error or an interrupt leaves the model as it was.

    | from | without `rank` |
    |---|---|
    | PiSSA, MiLoRA of rank r | exact, of rank 2r |
    | LoRA-XS, AdaLoRA | exact, of the rank that they have |
    | LoRA | nothing is done |
    | SVF, SVFT, DoRA | an error: they need `rank` |

    Args:
        model: a model with an adapter.
        rank: int, the rank of every layer's A·B, the best approximation
            of dW there is at that rank: the r largest components of
            dW = U diag(s) Vᵀ, A = U_r and B = diag(s_r)·V_rᵀ, decomposed by
            LAPACK in float64. None for the exact form.

    Returns:
        `Conversion`: the relative error of each layer and in all.

    Raises:
        ValueError: the model has no adapter; `rank` does not fit a layer, or
            is None and the method has no exact form.

    Example:

    ```python
    gemma.backbone.enable_svf()
    gemma.fit(data)
    gemma.backbone.to_lora(rank=16).print()
    gemma.backbone.save_adapter("pirate_as_lora.safetensors")
    ```
    """
    root = adapted_part(model)
    method = enabled_method(root)
    layers = require_adapted(root)
    products = thin_products(layers, rank)
    report = Conversion(method, tuple(x.measured for x in products.values()))
    if all(
        isinstance(x.adapter.method, LoRA)
        and x.adapter.method.rank == products[path].measured.rank
        for path, x in layers.items()
    ):
        return report
    plans = {
        path: Plan(
            LoRA(rank=product.measured.rank),
            {"a": product.a, "b": product.b},
            fingerprint(ops.convert_to_numpy(matrix_of(layers[path]))),
        )
        for path, product in products.items()
    }
    largest = max(x.rank for x in report.layers)
    replace_adapters(root, LoRA(rank=largest), plans)
    return report


def thin_products(
    layers: dict[str, Any], rank: int | None
) -> dict[str, ThinProduct]:
    """dW of every adapted layer as A·B; changes nothing.

    Args:
        layers: adapted layers, by path.
        rank: as for `to_lora`.
    """
    if rank is not None:
        wanted = LoRA(rank=rank)
        for path, layer in layers.items():
            check_fit(path, layer, wanted)
    jobs = {
        path: functools.partial(thin_product, path, layer, rank)
        for path, layer in layers.items()
    }
    return run_all("LoRA: converting", jobs)


def thin_product(path: str, layer: Any, rank: int | None) -> ThinProduct:
    """dW of one adapted layer as A·B, by `to_lora`'s rules."""
    method = layer.adapter.method
    matrix, change = change_of(path, layer)
    if rank is None or (isinstance(method, LoRA) and method.rank == rank):
        factors = method.low_rank_factors(layer.adapter, matrix)
        if factors is None:
            raise ValueError(
                f"{method.title} adds no matrix of low rank to a kernel, so "
                "the rank of its approximation must be given, such as "
                "`rank=16`. Received: rank=None"
            )
        a, b = (ops.convert_to_numpy(x) for x in factors)
        if 1 <= a.shape[1] <= min(change.shape):
            return _thin(path, change, a, b)
        # PiSSA's 2r may exceed what a matrix can have; AdaLoRA may have 0.
        rank = min(max(a.shape[1], 1), *change.shape)
    assert rank is not None
    top = svd.top_on_host(change, rank)
    assert top.u is not None and top.v is not None
    # All of s in B, as LoRA starts: A of full size, so that B trains even
    # where dW is zero.
    return _thin(path, change, top.u, top.s[:, None] * top.v.T)


def _thin(
    path: str, change: np.ndarray, a: np.ndarray, b: np.ndarray
) -> ThinProduct:
    found = a.astype("float64") @ b.astype("float64")
    return ThinProduct(a, b, measure(path, change, found, a.shape[1]))


def change_of(path: str, layer: Any) -> tuple[Any, np.ndarray]:
    """W of an adapted layer, and its dW = W' - W in float64."""
    matrix = matrix_of(layer)
    merged = ops.convert_to_numpy(layer.adapter.merged(matrix))
    change = merged.astype("float64") - ops.convert_to_numpy(matrix)
    if not np.isfinite(change).all():
        raise ValueError(
            f"The adapter of layer '{path}' holds NaN or infinity. Load or "
            "train it again."
        )
    return matrix, change


def measure(
    path: str, change: np.ndarray, found: np.ndarray, rank: int
) -> LayerConversion:
    """How near `found` comes to `change`, both (in, out) in float64."""
    norm = float(np.linalg.norm(change))
    error = float(np.linalg.norm(change - found)) / norm if norm else 0.0
    return LayerConversion(path, change.shape, rank, norm, error)
