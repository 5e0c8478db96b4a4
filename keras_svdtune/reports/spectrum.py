"""The singular values of a model: a table, and numbers derived from them."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

import numpy as np
import rich.table
from keras import ops

from keras_svdtune.hosts.target import Target
from keras_svdtune.matrix.decompose import singular_values
from keras_svdtune.methods.settings import check_whole_number
from keras_svdtune.model.state import adapted_part
from keras_svdtune.model.targets import find_targets
from keras_svdtune.reports.matrices import (
    base_matrix,
    each_matrix,
    for_each,
    merged_matrix,
)
from keras_svdtune.reports.table import PrintsTable
from keras_svdtune.runtime.types import Model


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The singular values of one matrix W (in, out), n = min(in, out).

    Attributes:
        path: str, the layer; `"...#3"` for one matrix of a bank of experts.
        kind: str, the layer's name: `"query"`.
        depth: int, how many matrices of this kind come before it.
        matrix: (in, out), its kernel as a matrix.
        s: (n,) float64 array, the singular values, descending.
        adapted: (n,) float64 array, those of W', the matrix with its adapter;
            None where there is no adapter.
    """

    path: str
    kind: str
    depth: int
    matrix: tuple[int, int]
    s: np.ndarray
    adapted: np.ndarray | None = None

    def share_within(self, low: float = 0.1, high: float = 1.1) -> float:
        """Returns the share of the singular values from `low` to `high`."""
        return _share_within(self.s, low, high)

    def energy(self, rank: int) -> float:
        """Returns the share of Σs² that the `rank` largest values hold."""
        rank = check_whole_number("rank", rank, 1)
        squares = self.s**2
        return float(squares[:rank].sum() / (squares.sum() or 1.0))

    @property
    def effective_rank(self) -> float:
        """The effective rank exp(-Σ p·log p), p = s / Σs; 0 for W = 0."""
        return effective_rank(self.s)

    @property
    def condition(self) -> float:
        """Largest singular value over the smallest; infinite if that is 0."""
        return float(self.s[0] / self.s[-1]) if self.s[-1] > 0 else math.inf

    @property
    def drift(self) -> float:
        """The drift ‖s' - s‖ / ‖s‖, s' with the adapter; 0 without one."""
        if self.adapted is None:
            return 0.0
        change = float(np.linalg.norm(self.adapted - self.s))
        return change / (float(np.linalg.norm(self.s)) or 1.0)


@dataclasses.dataclass(frozen=True)
class Spectrum(PrintsTable):
    """The singular values of a model. `print()` shows a table.

    Attributes:
        model: str, the name of the model.
        layers: one `LayerSpectrum` for each matrix, in the model's order.
    """

    model: str
    layers: tuple[LayerSpectrum, ...]

    def share_within(self, low: float = 0.1, high: float = 1.1) -> float:
        """Returns the share of all singular values from `low` to `high`."""
        s = np.concatenate([x.s for x in self.layers])
        return _share_within(s, low, high)

    def by_kind(self) -> dict[str, tuple[LayerSpectrum, ...]]:
        """Returns the matrices of each kind, in the order of their depth."""
        kinds: dict[str, list[LayerSpectrum]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return {kind: tuple(layers) for kind, layers in kinds.items()}

    def table(self, rank: int = 8) -> rich.table.Table:
        """Returns the table, for `rich`, with the energy of `rank` values."""
        drift = any(x.adapted is not None for x in self.layers)
        table = rich.table.Table(
            title=f"Singular values of {self.model}",
            caption=(
                "max, min: of all matrices of a row; the rest are medians. "
                f"0.1-1.1: the share of the values. top {rank}: their share of "
                "Σs². rank: the effective rank. cond.: s₁ / sₙ."
                + (" drift: ‖s' - s‖ / ‖s‖, by the adapter." if drift else "")
            ),
            title_style="bold",
            show_footer=True,
            pad_edge=False,
        )
        values = sum(len(x.s) for x in self.layers)
        table.add_column(
            "layer", "total", style="cyan", overflow="fold", min_width=8
        )
        table.add_column("matrix", f"{values:,} s", justify="right")
        for name, footer in (
            ("no.", f"{len(self.layers):,}"),
            ("max", f"{max(x.s[0] for x in self.layers):.2g}"),
            ("min", f"{min(x.s[-1] for x in self.layers):.1g}"),
            ("0.1-1.1", f"{self.share_within():.1%}"),
            (f"top {rank}", ""),
            ("rank", ""),
            ("cond.", ""),
            *([("drift", "")] if drift else []),
        ):
            style = "bold green" if name == "0.1-1.1" else None
            table.add_column(
                name, footer, justify="right", style=style, no_wrap=True
            )
        for layers in self.by_kind().values():
            # One kind may have several shapes: the stages of an encoder.
            for shape, group in _by_shape(layers).items():
                row = (
                    f"{shape[0]} x {shape[1]}",
                    f"{len(group):,}",
                    f"{max(x.s[0] for x in group):.2g}",
                    f"{min(x.s[-1] for x in group):.1g}",
                    f"{_median(x.share_within() for x in group):.0%}",
                    f"{_median(x.energy(rank) for x in group):.0%}",
                    f"{_median(x.effective_rank for x in group):.0f}",
                    _condition(_median(x.condition for x in group)),
                    *(
                        [f"{_median(x.drift for x in group):.2%}"]
                        if drift
                        else []
                    ),
                )
                table.add_row(group[0].kind, *row)
        return table


def _share_within(s: np.ndarray, low: float, high: float) -> float:
    if not low <= high:  # or one of them is NaN
        raise ValueError(
            "`low` must be a number, and `high` no smaller one. Received: "
            f"low={low!r}, high={high!r}"
        )
    return float(np.mean((s >= low) & (s <= high)))


def _by_shape(
    layers: Iterable[LayerSpectrum],
) -> dict[tuple[int, int], list[LayerSpectrum]]:
    shapes: dict[tuple[int, int], list[LayerSpectrum]] = {}
    for layer in layers:
        shapes.setdefault(layer.matrix, []).append(layer)
    return shapes


def _condition(value: float) -> str:
    return f"{value:,.0f}" if value < 1e4 else f"{value:.0e}"


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def effective_rank(s: np.ndarray) -> float:
    """Computes exp of the entropy of s / Σs for singular values s; 0 for s = 0.

    Reference: Roy, Vetterli 2007, "The effective rank: a measure of effective
    dimensionality", EUSIPCO.
    """
    total = float(s.sum())
    if total == 0.0:
        return 0.0
    p = s[s > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def spectrum(
    model: Model, target_layer_names: Iterable[str] | None = None
) -> Spectrum:
    """Computes the singular values of every matrix of a model. Touches nothing.

    W = U diag(s) Vᵀ of shape (in, out) is the kernel of a layer, read as
    `enable_adapter` reads it, with n = min(in, out) singular values s. They
    come from the decomposition that `enable_svf` needs, in float64 on the host,
    and share its cache on disk. (A value below 1e-8 of the largest is rounding;
    on a GPU, and above 1e-2, s is of float32.)

    If the model has an adapter, `s` is that of the base, and `adapted` that of
    the matrix W' that base and adapter make. (If it was enabled with
    `quantize`, the base is the model as it was just after.)

    Args:
        model: a KerasHub Backbone; a Task, which means its backbone; or any
            built `keras.Model`, with or without an adapter.
        target_layer_names: as for `enable_adapter`. Embeddings only where
            named.

    Returns:
        `Spectrum`: print it, plot it with `plot_spectrum`, or read its
        `layers`.

    Raises:
        ValueError: a target matches nothing, or a kernel or an adapter holds
            NaN or infinity.

    Example:

    ```python
    found = keras_svdtune.spectrum(gemma)
    found.print()
    found.share_within(0.1, 1.1)
    found.layers[0].effective_rank
    ```
    """
    root = adapted_part(model)
    targets = find_targets(root, target_layer_names, adapted=True)
    matrices = each_matrix(targets)
    jobs = {
        path: functools.partial(_values_of, target)
        for path, target in matrices.items()
    }
    found = for_each("Singular values", jobs)
    counts: dict[str, itertools.count[int]] = {}
    layers = []
    for path, target in matrices.items():
        kind = target.name
        depth = next(counts.setdefault(kind, itertools.count()))
        shape = target.view.shape
        layers.append(LayerSpectrum(path, kind, depth, shape, *found[path]))
    return Spectrum(root.name, tuple(layers))


def _values_of(target: Target) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns s of W, and s of W' if there is an adapter."""
    base = base_matrix(target)
    s = singular_values(base, target.path).astype("float64")
    if target.adapter is None:
        return s, None
    merged = merged_matrix(target)
    if bool(ops.all(ops.equal(merged, base))):
        return s, s
    # Not kept on disk: W' changes with the next step of training.
    adapted = singular_values(merged, target.path, keep=False)
    return s, adapted.astype("float64")
