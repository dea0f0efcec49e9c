"""Figures from values; no global state, no display: what they return can be saved or logged anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lightning_prune.speedups import SpeedupCurve
from lightning_prune.summary import LayerRow, short

_KEPT = "#1f5a96"
_REMOVED = "#c9d8e8"
_SPARSITY = "#d9772b"
_DPI = 100


def layer_figure(rows: Sequence[LayerRow], title: str = "") -> Figure:
    """Parameters, MACs and sparsity of each layer, side by side; what is kept in front of what is removed.

    Args:
        rows: one per weight, the first on top. The MACs panel is left out where no row knows them.
        title: above the panels.

    Returns:
        A figure that grows with the number of rows.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("layer_figure needs at least one row, got none; the model has no weights to show")
    macs = any(row.macs is not None for row in rows)
    panels = 3 if macs else 2
    row_in, text = (0.34, 9.5) if len(rows) <= 24 else (0.21, 7.5)
    figure = Figure(figsize=(3.6 * panels + 1.2, 1.5 + row_in * len(rows)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, panels, sharey=True)))

    counts = [row.count for row in rows]
    _amounts(axes[0], "parameters", [c.total for c in counts], [c.kept for c in counts], text)
    if macs:
        _amounts(axes[1], "MACs", [row.macs or 0 for row in rows], [row.kept_macs or 0 for row in rows], text)
    _shares(axes[-1], [c.sparsity for c in counts], text)

    axes[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=text)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)  # the first layer on top
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", color="0.88", linewidth=0.7)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    removed, kept = axes[0].containers[:2]
    figure.legend([kept, removed], ["kept", "removed"], loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def speedup_figure(
    curves: Sequence[SpeedupCurve], present: Mapping[str, float] | None = None, title: str = "", most: int = 12
) -> Figure:
    """Estimated speedup against sparsity, a panel per layer, with the sparsity from which it pays.

    Args:
        curves: one per layer.
        present: layer name -> its sparsity now, marked by a dot; layers that it leaves out have none.
        title: above the panels.
        most: of more layers than this, the panels show those with the longest dense times, which the title then says.

    Raises:
        ValueError: if there are no curves, or no panels are asked for.
    """
    if not curves or most < 1:
        raise ValueError(
            f"speedup_figure needs at least one layer and one panel, got {len(curves)} layers and most={most}; "
            "kernels run nn.Linear and nn.Conv2d"
        )
    longest = sorted(curves, key=lambda curve: -curve.dense_s)[:most]
    shown = [curve for curve in curves if curve in longest]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.9, 2.5 * rows + 1.0), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, curve in zip(axes, shown, strict=False):
        _speedup_panel(axis, curve, (present or {}).get(curve.layer))
    highest = max(max(curve.speedups) for curve in shown)
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylim(0.8, max(2.0, highest) * 1.15)
    axes[0].yaxis.set_major_locator(LogLocator(base=2))
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes[0].set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    for place, axis in enumerate(axes):
        axis.set_visible(place < len(shown))
        axis.tick_params(labelsize=8, labelbottom=place + columns >= len(shown))
    left_out = f"the {len(shown)} most expensive of {len(curves)} layers" if len(shown) < len(curves) else ""
    figure.suptitle("\n".join(filter(None, (title, left_out))), fontsize=10.5, x=0.01, ha="left")
    figure.supxlabel("sparsity: fraction removed", fontsize=9.5)
    figure.supylabel("estimated speedup over dense", fontsize=9.5)
    return figure


def to_array(figure: Figure) -> npt.NDArray[np.uint8]:
    """The pixels of a figure, `[height, width, 3]`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3])


def _amounts(axis: Axes, what: str, total: Sequence[float], kept: Sequence[float], text: float) -> None:
    """Two bars on the same spot: pale for the whole, solid for what is left."""
    places = range(len(total))
    axis.barh(places, total, height=0.78, color=_REMOVED)
    axis.barh(places, kept, height=0.78, color=_KEPT)
    longest = max(*total, 1)
    for place, whole, left in zip(places, total, kept, strict=True):
        label = short(whole) if left == whole else f"{short(left)} of {short(whole)}"
        axis.text(whole + 0.015 * longest, place, label, va="center", fontsize=text - 0.8, color="0.25")
    axis.set_xlim(0, 1.5 * longest)  # room for the labels
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_title(f"{what}: {short(sum(kept))} of {short(sum(total))} kept", fontsize=9.5, loc="left")


def _shares(axis: Axes, sparsities: Sequence[float], text: float) -> None:
    places = range(len(sparsities))
    axis.barh(places, [1.0] * len(sparsities), height=0.78, color="0.95")
    axis.barh(places, sparsities, height=0.78, color=_SPARSITY)
    for place, share in zip(places, sparsities, strict=True):
        axis.text(1.02, place, f"{share:.3f}", va="center", fontsize=text - 0.8, color="0.25")
    axis.set_xlim(0, 1.18)
    axis.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axis.set_title("sparsity: fraction removed", fontsize=9.5, loc="left")


def _speedup_panel(axis: Axes, curve: SpeedupCurve, present: float | None) -> None:
    axis.axhline(1.0, color="0.6", linewidth=0.8)
    axis.plot(curve.sparsities, curve.speedups, color=_KEPT, linewidth=1.6)
    if math.isfinite(curve.pays_from):
        axis.axvline(curve.pays_from, color=_SPARSITY, linewidth=1.2, linestyle="--")
        words = f"pays from {curve.pays_from:.2f}"
    else:
        words = "never pays"
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axis.text(0.04, 0.92, words, transform=axis.transAxes, va="top", fontsize=8.5, color=_SPARSITY, bbox=behind)
    if present is not None:
        axis.plot([present], [curve.at(present)], "o", color=_KEPT, markersize=5)
    name = curve.layer if len(curve.layer) <= 34 else f"…{curve.layer[-33:]}"
    axis.set_title(f"{name}\n{curve.dense_s * 1e3:.3g} ms dense", fontsize=8.5, loc="left")
    axis.set_xlim(0.0, 1.0)
    axis.grid(color="0.9", linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
