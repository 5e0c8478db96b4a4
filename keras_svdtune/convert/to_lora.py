"""From any adapter to a LoRA, in place, and how far that is from it."""

import dataclasses
import math
from collections.abc import Sequence

import keras
import rich.console
import rich.table
from keras import ops

from keras_svdtune.adapter.fingerprint import fingerprint
from keras_svdtune.adapter.plan import Plan
from keras_svdtune.convert.low_rank_change import LayerConversion, thin_products
from keras_svdtune.hosts.host import matrix_of
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.model.enable import (
    adapted_part,
    enabled_method,
    replace_adapters,
    require_adapted,
)


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


def _error_of(layers: Sequence[LayerConversion]) -> float:
    change = math.hypot(*(x.change for x in layers))
    missed = math.hypot(*(x.error * x.change for x in layers))
    return missed / change if change else 0.0


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

    SVF and SVFT change all components of W, so a small rank holds little of
    what they learned: look at the error before you rely on it.

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
