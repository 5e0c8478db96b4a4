"""Converts any adapter to a LoRA, in place, and measures the error."""

import dataclasses
import math
from collections.abc import Sequence

import rich.table
from keras import ops

from keras_svdtune.adapter.fingerprint import fingerprint
from keras_svdtune.adapter.plan import AdapterPlan
from keras_svdtune.convert.low_rank_change import (
    LayerConversion,
    low_rank_products,
)
from keras_svdtune.methods.base import Method
from keras_svdtune.methods.dropout import dropout_of
from keras_svdtune.methods.lora import LoRA
from keras_svdtune.model.enable import replace_adapters
from keras_svdtune.model.state import (
    adapted_part,
    check_no_block,
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
class Conversion(PrintsTable):
    """The error of a conversion. `print()` shows it as a table.

    Attributes:
        method: `Method`, the method that was converted.
        layers: one `LayerConversion` for each adapted layer.
    """

    method: Method
    layers: tuple[LayerConversion, ...]

    @property
    def error(self) -> float:
        """The relative error ‖dW - A·B‖ / ‖dW‖ over all layers."""
        return _error_of(self.layers)

    def table(self) -> rich.table.Table:
        """Returns the table, for `rich`."""
        return grouped_table(
            title=f"{self.method}, as LoRA",
            caption=(
                "The error is ‖dW - A·B‖ / ‖dW‖, dW what the adapter adds to "
                "the kernel. Rounding to float32 leaves about 1e-7·‖W‖ / ‖dW‖."
            ),
            layers=self.layers,
            columns=("rank", "error", "largest error"),
            cells=_cells,
            footer=("", *_cells(self.layers)[1:]),
            highlight="error",
        )


def _cells(layers: Sequence[LayerConversion]) -> tuple[str, str, str]:
    worst = max((x.error for x in layers), default=0.0)
    return (
        number_range(x.rank for x in layers),
        f"{_error_of(layers):.1e}",
        f"{worst:.1e}",
    )


def _error_of(layers: Sequence[LayerConversion]) -> float:
    change = math.hypot(*(x.change for x in layers))
    missed = math.hypot(*(x.error * x.change for x in layers))
    return missed / change if change else 0.0


def to_lora(model: Model, rank: int | None = None) -> Conversion:
    """Turns the enabled adapter into a LoRA, in place.

        y = x·W' = x·(W + dW)   becomes   y = x·W + x·A·B

    Afterwards the model is one on which `LoRA` was enabled: `fit` trains A
    (in, r) and B (r, out), and `save_adapter`, `merge_adapter` and the others
    work as ever. Everything is computed before anything is touched, so an
    error or an interrupt leaves the model as it was.

    | from | without `rank` |
    |---|---|
    | PiSSA, MiLoRA, CorDA, LoRA-GA of rank r | exact, of rank 2r |
    | EVA, LoRA-XS, AdaLoRA, MiCA, PSOFT, OPLoRA | exact, of their own rank |
    | LoRA | nothing is done |
    | SVF, SVFT, DoRA | an error: they need `rank` |

    SVF and SVFT change all components of W, so a small rank holds little of
    what they learned: look at the error before you rely on it.

    Args:
        model: a model with an adapter.
        rank: int, the rank of every layer's A·B, or min(in, out) where that
            is less: the best approximation of dW = U diag(s) Vᵀ at that rank,
            A = U_r and B = diag(s_r)·V_rᵀ, decomposed by LAPACK in float64.
            None for the exact form.

    Returns:
        `Conversion`: the relative error of each layer and in all.

    Raises:
        ValueError: the model has no adapter; `rank` is no integer above 0, or
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
    check_no_block(root)
    method = enabled_method(root)
    targets = require_adapted(root)
    products = low_rank_products(targets, rank)
    report = Conversion(method, tuple(x.measured for x in products.values()))
    ranks = {path: x.measured.rank for path, x in products.items()}
    if all(
        isinstance(x.adapted.method, LoRA)
        and x.adapted.method.rank == ranks[path]
        for path, x in targets.items()
    ):
        return report
    plans = {
        path: AdapterPlan(
            LoRA(rank=ranks[path], dropout=dropout_of(method)),
            {"a": product.a, "b": product.b},
            fingerprint(ops.convert_to_numpy(targets[path].matrix())),
        )
        for path, product in products.items()
    }
    method = LoRA(rank=max(ranks.values()), dropout=dropout_of(method))
    replace_adapters(root, method, plans)
    return report
