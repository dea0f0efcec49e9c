"""Figures of a search; see `lightning_prune.figures`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_prune.search.curves import Sensitivity

_DPI = 100
_MARKERS = "osD^v"


def sensitivity_figure(result: Sensitivity, metrics: Sequence[str], title: str = "") -> Figure:
    """A metric against the sparsity of one layer, a curve per layer, a panel per metric.

    Colours run from the first layer to the last.

    Args:
        result: that is shown.
        metrics: one per panel.
        title: above the panels.

    Raises:
        KeyError: there is no such metric.
    """
    curves = [result.curves(metric).numpy() for metric in metrics]
    legend_columns = -(-len(result.names) // 28)
    height = max(3.6, 1.0 + 0.17 * min(len(result.names), 28))
    figure = Figure(figsize=(4.4 * len(metrics) + 2.2 * legend_columns, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    colours = colormaps["viridis"](np.linspace(0.0, 0.92, len(result.names)))
    for axis, metric, rows in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, curves, strict=True):
        axis.axhline(result.dense[metric], color="0.45", linewidth=1.0, linestyle="--", label="dense")
        for place, (name, row) in enumerate(zip(result.names, rows, strict=True)):
            shown = np.where(np.isfinite(row), row, np.nan)
            marker = _MARKERS[place % len(_MARKERS)]
            axis.plot(
                result.levels, shown, color=colours[place], linewidth=1.3, marker=marker, markersize=3, label=name
            )
        axis.set_title(metric, fontsize=9.5, loc="left")
        axis.set_xlim(-0.02, 1.02)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    short = [label if len(label) <= 34 else f"…{label[-33:]}" for label in labels]
    figure.legend(handles, short, loc="outside right upper", fontsize=7, frameon=False, ncols=legend_columns)
    figure.supxlabel("sparsity of one layer, the others dense", fontsize=9.5)
    if title:
        figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    return figure
