"""The quantization error of QPiSSA beside that of plain quantization."""

import dataclasses
import math
from collections.abc import Sequence

import rich.table

from keras_svdtune.methods.base import Method
from keras_svdtune.model.state import (
    adapted_part,
    enabled_method,
    require_adapted,
)
from keras_svdtune.reports.table import PrintsTable, grouped_table
from keras_svdtune.runtime.types import Model


@dataclasses.dataclass(frozen=True)
class LayerQuantization:
    """The quantization error of one layer, in the Frobenius norm.

    Attributes:
        path: str, the layer.
        matrix: (in, out), its kernel as a matrix.
        norm: float, ‖W‖ of the float kernel.
        plain: float, ‖W - quant(W)‖, by plain quantization.
        error: float, ‖W - (Q + k·A₀·B₀)‖, just after enabling.
    """

    path: str
    matrix: tuple[int, int]
    norm: float
    plain: float
    error: float

    @property
    def reduction(self) -> float:
        """The share of the plain error that is gone, 1 - error / plain."""
        return _reduction([self])


@dataclasses.dataclass(frozen=True)
class QuantizationError(PrintsTable):
    """The quantization error of a model. `print()` shows it as a table.

    Attributes:
        method: `Method`, with the settings that it was enabled with.
        layers: one `LayerQuantization` for each adapted layer.
    """

    method: Method
    layers: tuple[LayerQuantization, ...]

    @property
    def reduction(self) -> float:
        """The share 1 - error / plain, over all layers."""
        return _reduction(self.layers)

    def table(self) -> rich.table.Table:
        """Returns the table, for `rich`."""
        return grouped_table(
            title=f"{self.method}: quantization error",
            caption=(
                "‖W - W̃‖ / ‖W‖ in the Frobenius norm, W the float kernel: W̃ "
                "quantized as it is (plain), and as the model had it after "
                "enabling (error)."
            ),
            layers=self.layers,
            columns=("plain", "error", "reduction"),
            cells=_cells,
            footer=_cells(self.layers),
            highlight="reduction",
        )


def _cells(layers: Sequence[LayerQuantization]) -> tuple[str, str, str]:
    norm = math.hypot(*(x.norm for x in layers)) or 1.0
    plain = math.hypot(*(x.plain for x in layers))
    error = math.hypot(*(x.error for x in layers))
    return (
        f"{plain / norm:.3%}",
        f"{error / norm:.3%}",
        f"{_reduction(layers):.1%}",
    )


def _reduction(layers: Sequence[LayerQuantization]) -> float:
    plain = math.hypot(*(x.plain for x in layers))
    error = math.hypot(*(x.error for x in layers))
    return 1.0 - error / plain if plain else 0.0


def quantization_error(model: Model) -> QuantizationError:
    """Compares the quantization error of QPiSSA with plain quantization's.

    Both were measured when the adapter was enabled, while there was a float
    kernel W (in, out); training changes neither. W̃ = Q + k·A₀·B₀, with Q the
    quantized residual, A₀ (in, r) and B₀ (r, out):

        reduction = 1 - ‖W - W̃‖ / ‖W - quant(W)‖

    in the Frobenius norm. `tests/benchmarks/qpissa_error.py` also has the
    paper's nuclear norm, which takes a decomposition for each layer.

    Args:
        model: a model on which `PiSSA(rank, quantize=...)` is enabled.

    Raises:
        ValueError: the model has no adapter, or one that quantized nothing.

    Example:

    ```python
    gemma.backbone.enable_pissa(rank=128, quantize="int4")
    keras_svdtune.quantization_error(gemma.backbone).print()
    ```

    Reference: Meng, Wang, Zhang 2024, https://arxiv.org/abs/2404.02948.
    """
    root = adapted_part(model)
    found = []
    for path, target in require_adapted(root).items():
        adapter, base = target.adapted, target.adapted.replaced
        if base is None or not base.norm:
            raise ValueError(
                f"Layer '{path}' was not quantized for its adapter "
                f"({adapter.method}), so it has no quantization error of "
                'its own. Enable `PiSSA(rank, quantize="int4")`.'
            )
        found.append(
            LayerQuantization(
                path,
                adapter.shape,
                base.norm,
                base.plain_error,
                base.error,
            )
        )
    return QuantizationError(enabled_method(root), tuple(found))
