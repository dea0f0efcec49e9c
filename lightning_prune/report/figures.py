"""Curves over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_prune.report.events import Curve
from lightning_prune.search.result_figures import plain

_COLOURS = ("#1f5a96", "#d9772b", "#3a8f5c", "#8a4fa3", "#a8323e", "#6b6b6b")
_FEW = 40
"""Points up to which each has a dot."""

_BINS = 400
"""Of a longer curve, each bin shows its lowest and its highest point; more cannot be told apart."""


def curves_figure(panels: Mapping[str, Mapping[str, Curve]], columns: int = 2) -> Figure:
    """Values against steps, a panel per group.

    Args:
        panels: title -> label -> curve. Of more than 6 curves in a panel, colours run from the first to the last,
            and a legend is left out beyond 20.
        columns: of panels.

    Raises:
        ValueError: there are no panels.
    """
    if not panels:
        raise ValueError("curves_figure needs at least one panel, got none; nothing was logged")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns + 0.4, 2.8 * rows + 0.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, axis in enumerate(axes):
        axis.set_visible(place < len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for colour, (label, curve) in zip(_colours(len(curves)), curves.items(), strict=True):
            steps, values = zip(*thinned(curve), strict=True)
            shown = np.where(np.isfinite(values), values, np.nan)
            marker = "o" if len(curve) <= _FEW else None
            # A label with an underscore in front would be hidden.
            axis.plot(
                steps, shown, color=colour, linewidth=1.4, marker=marker, markersize=2.5, label=f" {plain(label)}"
            )
        axis.set_title(plain(title), fontsize=9.5, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if 1 < len(curves) <= 20:
            axis.legend(fontsize=7.5, frameon=False, ncols=1 if len(curves) <= 8 else 2)
    figure.supxlabel("training step", fontsize=9.5)
    return figure


def thinned(curve: Curve) -> Curve:
    """A curve that looks the same with at most `2 * _BINS + 2` points, its ends among them."""
    size = -(-len(curve) // _BINS)
    if size <= 2:
        return curve
    kept = {0, len(curve) - 1}
    for start in range(0, len(curve), size):
        places = range(start, min(start + size, len(curve)))
        finite = [place for place in places if math.isfinite(curve[place][1])] or [start]
        kept |= {min(finite, key=lambda i: curve[i][1]), max(finite, key=lambda i: curve[i][1])}
    return tuple(curve[place] for place in sorted(kept))


def _colours(number: int) -> Sequence[object]:
    if number <= len(_COLOURS):
        return _COLOURS[:number]
    return [tuple(each) for each in colormaps["viridis"](np.linspace(0.0, 0.92, number))]
