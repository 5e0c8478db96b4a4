"""How far a model is from its float kernels after QPiSSA, and after plain
quantization."""

import dataclasses
import math
from collections.abc import Iterable

import keras
import rich.console
import rich.table

from keras_svdtune.methods.base import Method
from keras_svdtune.model.enable import (
    adapted_part,
    enabled_method,
    require_adapted,
)


@dataclasses.dataclass(frozen=True)
class LayerQuantization:
    """The quantization error of one layer, in the Frobenius norm.

    Attributes:
        path: str, the layer.
        matrix: (in, out), its kernel as a matrix.
        norm: float, ‖W‖ of the float kernel.
        plain: float, ‖W - quant(W)‖, what plain quantization leaves.
        error: float, ‖W - (Q + k·A₀·B₀)‖, what was left after enabling.
    """

    path: str
    matrix: tuple[int, int]
    norm: float
    plain: float
    error: float

    @property
    def reduction(self) -> float:
        """1 - error / plain."""
        return _reduction([self])


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """The quantization error of a model. `print()` shows it as a table.

    Attributes:
        method: `Method`, with the settings that it was enabled with.
        layers: one `LayerQuantization` for each adapted layer.
    """

    method: Method
    layers: tuple[LayerQuantization, ...]

    @property
    def reduction(self) -> float:
        """1 - error / plain, of all layers as one."""
        return _reduction(self.layers)

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table, layers of equal name and shape in one row."""
        (console or rich.console.Console()).print(self.table())

    def table(self) -> rich.table.Table:
        """The table, for `rich`."""
        table = rich.table.Table(
            title=f"{self.method}: quantization error",
            caption=(
                "‖W - W̃‖ / ‖W‖ in the Frobenius norm, W the float kernel: W̃ "
                "quantized as it is (plain), and as the model had it after "
                "enabling (error)."
            ),
            title_style="bold",
            show_footer=True,
        )
        table.add_column("layer", "total", style="cyan", overflow="fold")
        table.add_column("matrix", "", justify="right")
        footers = (f"{len(self.layers):,}", *_row(self.layers))
        for name, footer in zip(
            ("layers", "plain", "error", "reduction"), footers, strict=True
        ):
            style = "bold green" if name == "reduction" else None
            table.add_column(name, footer, justify="right", style=style)
        groups: dict[tuple[str, tuple[int, int]], list[LayerQuantization]] = {}
        for layer in self.layers:
            name = layer.path.rsplit("/", 1)[-1]
            groups.setdefault((name, layer.matrix), []).append(layer)
        for (name, shape), group in groups.items():
            table.add_row(
                name,
                f"{shape[0]} x {shape[1]}",
                f"{len(group):,}",
                *_row(group),
            )
        return table


def _row(layers: Iterable[LayerQuantization]) -> tuple[str, str, str]:
    layers = list(layers)
    norm = math.hypot(*(x.norm for x in layers)) or 1.0
    plain = math.hypot(*(x.plain for x in layers))
    error = math.hypot(*(x.error for x in layers))
    return (
        f"{plain / norm:.3%}",
        f"{error / norm:.3%}",
        f"{_reduction(layers):.1%}",
    )


def _reduction(layers: Iterable[LayerQuantization]) -> float:
    layers = list(layers)
    plain = math.hypot(*(x.plain for x in layers))
    return (
        1.0 - math.hypot(*(x.error for x in layers)) / plain if plain else 0.0
    )


def quantization_error(model: keras.Model) -> QuantizationError:
    """How much less error QPiSSA left than plain quantization would have.

    Both were measured when the adapter was enabled, while there was a float
    kernel W (in, out); training changes neither. W̃ = Q + k·A₀·B₀, with Q the
    quantized residual, A₀ (in, r) and B₀ (r, out):

        reduction = 1 - ‖W - W̃‖ / ‖W - quant(W)‖

    in the Frobenius norm. The paper's table has the nuclear norm, which takes
    a decomposition for each layer: `tests/benchmarks/qpissa_error.py` has
    both.

    Args:
        model: a model on which `PiSSA(rank, quantize=...)` is enabled.

    Returns:
        `QuantizationError`.

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
    layers = require_adapted(root)
    found = []
    for path, layer in layers.items():
        base = layer.adapter.replaced
        if base is None or layer.adapter.method.base_mode is None:
            raise ValueError(
                f"Layer '{path}' was not quantized for its adapter "
                f"({layer.adapter.method}), so it has no quantization error of "
                'its own. Enable `PiSSA(rank, quantize="int4")`.'
            )
        found.append(
            LayerQuantization(
                path,
                layer.adapter.shape,
                base.norm,
                base.plain_error,
                base.error,
            )
        )
    return QuantizationError(enabled_method(root), tuple(found))
