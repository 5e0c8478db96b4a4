"""Plots singular values, and which of them a method trains."""

import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from keras_svdtune.matrix.factors import rank_of_energy
from keras_svdtune.methods.base import Method
from keras_svdtune.model.checks import checked_method
from keras_svdtune.reports.spectrum import LayerSpectrum, Spectrum, spectrum
from keras_svdtune.runtime.types import Model

# More kinds than this share one panel.
_PANELS = 12
# The colour map without its ends, hard to see on white or on black.
_DEPTHS = (0.22, 0.88)
# Colours by Okabe and Ito, distinct to every kind of colour vision.
_METHODS = ("#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#009E73")


def plot_spectrum(
    model: Model | Spectrum,
    methods: Iterable[Method] = (),
    target_layer_names: Iterable[str] | None = None,
) -> "Figure":
    """Plots the singular values of a model, a panel for each kind of layer.

    Each line has the values of one matrix in descending order, on a
    logarithmic axis; its colour is the depth of the layer. The shaded band is
    0.1 to 1.1. Below the lines a bar for each of `methods` covers the
    components that it trains: for PiSSA(r) the first r, for MiLoRA(r) the
    last, for SVF all, for OPLoRA all but those that it keeps. If the model has
    an adapter, dashed lines are the values with it.

    Args:
        model: what `spectrum` takes; or what it returned, to plot it again at
            no cost.
        methods: methods with their settings, such as
            `[PiSSA(rank=8), MiLoRA(rank=8), SVF()]`.
        target_layer_names: as for `spectrum`, if `model` is a model.

    Returns:
        A `matplotlib.figure.Figure`. It is not shown: a notebook shows it as
        the last line of a cell, `figure.savefig("spectrum.png")` writes it.

    Raises:
        ValueError: a method trains no components of W, as LoRA does not.
        ImportError: matplotlib is not installed; it is an extra of this
            package, `pip install "keras_svdtune[plot]"`.

    Example:

    ```python
    plot_spectrum(gemma, [PiSSA(rank=16), MiLoRA(rank=16), SVF()])
    ```
    """
    chosen = [checked_method(x) for x in methods]
    for method in chosen:
        if _part(method, (8, 8)) is None:
            raise ValueError(
                f"{method.title} trains no singular components of W, so there "
                f"is nothing to draw. Received: {method!r}"
            )
    plt = matplotlib_module("pyplot")
    found = (
        model
        if isinstance(model, Spectrum)
        else spectrum(model, target_layer_names)
    )
    panels: dict[str, Sequence[LayerSpectrum]] = {**found.by_kind()}
    if len(panels) > _PANELS:
        panels = {"all matrices": found.layers}
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(max(3.1 * columns, 5.5) + 0.9, 2.7 * rows + 0.7),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    one_panel = len(found.by_kind()) > _PANELS
    last = max(
        len(found.layers) - 1 if one_panel else x.depth for x in found.layers
    )
    colour = _depth_colours(last)
    axes = list(grid.flat)
    for axis, (kind, layers) in zip(axes, panels.items(), strict=False):
        for i, layer in enumerate(layers):
            shade = colour.to_rgba(i if one_panel else layer.depth)
            _lines(axis, layer, shade)
        axis.axhspan(0.1, 1.1, color="grey", alpha=0.15, linewidth=0)
        shapes = {x.matrix for x in layers}
        shape = " x ".join(map(str, next(iter(shapes))))
        axis.set_title(
            f"{kind}\n{shape}" if len(shapes) == 1 else kind, fontsize=10
        )
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[max(len(panels) - columns, 0) : len(panels)]:
        axis.set_xlabel("component, from the largest")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _set_limits(axes[0], found.layers, len(chosen))
    for axis, layers in zip(axes, panels.values(), strict=False):
        for row, method in enumerate(chosen):
            _bar(axis, layers, method, row)
    figure.supylabel("singular value", fontsize=10)
    figure.suptitle(f"Singular values of {found.model}", fontsize=12)
    if last > 0:
        bar = figure.colorbar(colour, ax=axes, fraction=0.03, pad=0.02)
        bar.set_label("matrix" if one_panel else "depth (layer of its kind)")
    _legend(figure, axes[0], chosen)
    plt.close(figure)  # or a notebook would show it twice
    return figure


def matplotlib_module(module: str, what: str = "plot_spectrum") -> Any:
    """Imports a module of matplotlib; `what` needs it, for the message."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(
            f"`{what}` needs matplotlib, which could not be imported "
            f'({error}). Install it with: pip install "keras_svdtune[plot]"'
        ) from error


def _depth_colours(last: int) -> Any:
    """Maps the matrices, from 0 to `last`, to colours."""
    colormap = matplotlib_module("pyplot").get_cmap("viridis")
    part = colormap(np.linspace(*_DEPTHS, 256))
    return matplotlib_module("cm").ScalarMappable(
        matplotlib_module("colors").Normalize(0, max(last, 1)),
        matplotlib_module("colors").ListedColormap(part),
    )


def _lines(
    axis: "Axes", layer: LayerSpectrum, shade: tuple[float, ...]
) -> None:
    components = np.arange(1, len(layer.s) + 1)
    axis.plot(components, _positive(layer.s), color=shade, linewidth=0.9)
    if layer.adapted is not None:
        axis.plot(
            components, _positive(layer.adapted), "--", color=shade, lw=0.9
        )


def _positive(s: np.ndarray) -> np.ndarray:
    """Returns s with gaps where it is 0, for a logarithmic axis."""
    return np.where(s > 0, s, np.nan)


def _set_limits(
    axis: "Axes", layers: Sequence[LayerSpectrum], bars: int
) -> None:
    """Sets the limits of the shared axis, with room below for the bars."""
    adapted = [x.adapted for x in layers if x.adapted is not None]
    values = np.concatenate([x.s for x in layers] + adapted)
    # Rounding errors shown as values would squeeze the rest together.
    values = np.log10(values[values > 1e-7 * max(values.max(), 1e-300)])
    if not len(values):
        return
    low, high = values.min(), values.max()
    height = max(high - low, 1.0)
    axis.set_ylim(
        10 ** (low - height * (0.06 + 0.07 * bars)), 10 ** (high + 0.05)
    )


def _part(method: Method, shape: tuple[int, int]) -> str | None:
    needs = method.for_shape(shape).needs(shape)
    return None if needs is None else needs.part


def trained_span(layer: LayerSpectrum, method: Method) -> tuple[int, int]:
    """Returns the first and last component that `method` trains, from 1."""
    n = len(layer.s)
    needs = method.for_shape(layer.matrix).needs(layer.matrix)
    assert needs is not None
    if needs.part == "small_side":
        return 1, n
    rank = needs.rank
    if isinstance(rank, float):
        rank = rank_of_energy(layer.s, rank, needs.part)
    assert rank is not None
    if method.trains_other_components:  # all but the first
        return rank + 1, n
    return (1, rank) if needs.part == "top" else (n - rank + 1, n)


def _bar(
    axis: "Axes", layers: Sequence[LayerSpectrum], method: Method, row: int
) -> None:
    for first, last in {trained_span(layer, method) for layer in layers}:
        axis.plot(
            [first - 0.5, last + 0.5],
            [0.03 + 0.06 * row] * 2,
            transform=axis.get_xaxis_transform(),
            color=_METHODS[row % len(_METHODS)],
            linewidth=4,
            solid_capstyle="butt",
        )


def _legend(figure: "Figure", axis: "Axes", methods: Sequence[Method]) -> None:
    if not methods:
        return
    lines = matplotlib_module("lines")
    handles = [
        lines.Line2D(
            [],
            [],
            color=_METHODS[i % len(_METHODS)],
            linewidth=4,
            label=_label(x),
        )
        for i, x in enumerate(methods)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 3),
        frameon=False,
        title="trains these components",
        fontsize=9,
    )


def _label(method: Method) -> str:
    rank = method.current_rank(None)
    return method.title if rank is None else f"{method.title}, rank {rank}"
