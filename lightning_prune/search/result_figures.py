"""Figures of what a search tried and found, for TensorBoard and the report; see `lightning_prune.figures`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_prune.search.history import History, TrialRecord
from lightning_prune.search.result import SearchResult
from lightning_prune.search.winner import WinnerLayer

_DPI = 100
_GOOD = "#1f5a96"
_BAD = "#d9772b"
_PALE = "#c9d8e8"


def scatter_figure(history: History, winner: float | None = None) -> Figure:
    """Accuracy against cost of all trials, with the threshold, the front and the dense network.

    Trials that were never evaluated have a cost alone: they are ticks at the bottom. Where accuracies spread far
    beyond the threshold, a second panel shows what lies near it.

    Args:
        history: of the search.
        winner: cost of the trial that won, which is ringed.
    """
    seen = [t for t in history.evaluated if t.accuracy is not None and t.cost is not None]
    values = [float(t.accuracy or 0.0) for t in seen]
    zoom = _near(history, values)
    figure, axes = _panels(1 if zoom is None else 2, width=5.4, height=4.0)
    for axis in axes:
        _scatter(axis, history, seen, winner)
    axes[0].set_ylabel(plain(history.metric), fontsize=9.5)
    axes[0].set_title("all evaluations", fontsize=9.5, loc="left")
    if zoom is not None:
        axes[1].set_ylim(*zoom)
        axes[1].set_title("near the threshold", fontsize=9.5, loc="left")
    figure.supxlabel(cost_label(history.objective, history.unit), fontsize=9.5)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=8.5)
    return figure


def progress_figure(history: History) -> Figure:
    """Cost and accuracy of every evaluation, the dense network's first, and the best cost so far."""
    figure, (above, below) = _panels(2, width=6.4, height=2.6, stacked=True)
    scale, _ = scaled(history.unit)
    best = [scale * cost if math.isfinite(cost) else math.nan for cost in history.best_so_far()]
    above.step(range(1, len(best) + 1), best, where="post", color=_GOOD, linewidth=1.6, label="best so far")
    for good, colour, label in ((True, _GOOD, "accurate enough"), (False, _BAD, "not accurate enough")):
        chosen = [(place, t) for place, t in enumerate(history.evaluated, start=2) if history.feasible(t) is good]
        costs = [(place, scale * t.cost) for place, t in chosen if t.cost is not None]
        accuracies = [(place, t.accuracy) for place, t in chosen if t.accuracy is not None]
        if costs:
            above.plot(*zip(*costs, strict=True), "o", color=colour, markersize=4, label=label)
        if accuracies:
            below.plot(*zip(*accuracies, strict=True), "o", color=colour, markersize=4)
    if history.dense_accuracy is not None:
        below.plot([1], [history.dense_accuracy], "*", color="0.25", markersize=10)
    _threshold(below, history)
    above.set_ylabel(cost_label(history.objective, history.unit), fontsize=9)
    below.set_ylabel(plain(history.metric), fontsize=9)
    below.set_xlabel("evaluation, the dense network's first", fontsize=9.5)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, fontsize=8.5)
    return figure


def winner_figure(layers: Sequence[WinnerLayer]) -> Figure:
    """Sparsity of each layer, coloured by the kernel that runs it, the first on top.

    Raises:
        ValueError: there are no layers.
    """
    if not layers:
        raise ValueError("winner_figure needs at least one layer, got none; a plan without layers has no figure")
    row_in, text = (0.34, 9.0) if len(layers) <= 24 else (0.21, 7.5)
    figure, (axis,) = _panels(1, width=7.6, height=1.3 + row_in * len(layers))
    kernels = list(dict.fromkeys(layer.kernel or "kernel not known" for layer in layers))
    colours = dict(zip(kernels, (colormaps["tab10"](place % 10) for place in range(len(kernels))), strict=True))
    axis.barh(range(len(layers)), [1.0] * len(layers), height=0.78, color="0.95")
    for kernel in kernels:
        rows = [i for i, layer in enumerate(layers) if (layer.kernel or "kernel not known") == kernel]
        axis.barh(rows, [layers[i].sparsity for i in rows], height=0.78, color=colours[kernel], label=plain(kernel))
    for place, layer in enumerate(layers):
        left = "" if layer.nonzeros is None else f"  {layer.nonzeros:,} left"
        axis.text(1.02, place, f"{layer.sparsity:.3f}{left}", va="center", fontsize=text - 0.8, color="0.25")
    axis.set_yticks(range(len(layers)), [plain(layer.name) for layer in layers], fontsize=text)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_xlim(0, 1.3)
    axis.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axis.tick_params(axis="y", length=0)
    axis.set_title("sparsity: fraction removed", fontsize=9.5, loc="left")
    figure.legend(loc="outside lower left", ncols=min(4, len(kernels)), frameon=False, fontsize=8.5)
    return figure


def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Shares of what decided cost and drop, a panel each.

    Raises:
        ValueError: there are none.
    """
    if not importances:
        raise ValueError("importance_figure needs the importances of at least one outcome, got none")
    most = max(map(len, importances.values()))
    figure, axes = _panels(len(importances), width=4.2, height=1.0 + 0.28 * most)
    for axis, (what, shares) in zip(axes, importances.items(), strict=True):
        axis.barh(range(len(shares)), list(shares.values()), height=0.7, color=_GOOD)
        axis.set_yticks(range(len(shares)), list(map(plain, shares)), fontsize=8.5)
        axis.set_ylim(len(shares) - 0.4, -0.6)
        axis.set_xlim(0, 1)
        axis.set_title(f"of the {plain(what)}", fontsize=9.5, loc="left")
    figure.supxlabel("share of the variance explained", fontsize=9.5)
    return figure


def estimate_figure(result: SearchResult, layers: Sequence[WinnerLayer] = ()) -> Figure:
    """Estimated beside measured latency: of whole passes, and layer by layer where both are known.

    Raises:
        ValueError: nothing was measured.
    """
    passes = [(result.dense_latency_s, result.dense_measured_latency_s), (result.latency_s, result.measured_latency_s)]
    if not all(math.isfinite(measured) for _, measured in passes):
        raise ValueError("estimate_figure compares with measured latencies, and there are none")
    pairs = [(x.estimated_s, x.measured_s) for x in layers if x.estimated_s is not None and x.measured_s is not None]
    pairs = [(1e3 * e, 1e3 * m) for e, m in pairs if e > 0 and m > 0]
    figure, axes = _panels(2 if pairs else 1, width=4.4, height=3.4)
    for shift, name, colour, column in ((-0.2, "estimated", _PALE, 0), (0.2, "measured", _GOOD, 1)):
        heights = [1e3 * row[column] for row in passes]
        axes[0].bar([place + shift for place in (0, 1)], heights, 0.4, color=colour, label=name)
        for place, height in enumerate(heights):
            if math.isfinite(height):
                axes[0].text(place + shift, height, f"{height:.4g}", ha="center", va="bottom", fontsize=8)
    axes[0].set_xticks([0, 1], ["dense", "pruned"])
    axes[0].set_ylabel("ms per pass", fontsize=9.5)
    axes[0].margins(y=0.12)
    axes[0].set_title("whole passes", fontsize=9.5, loc="left")
    if pairs:
        ends = [min(map(min, pairs)), max(map(max, pairs))]
        axes[1].plot(ends, ends, color="0.6", linewidth=0.9)
        axes[1].plot(*zip(*pairs, strict=True), "o", color=_GOOD, markersize=4)
        axes[1].set_xscale("log")
        axes[1].set_yscale("log")
        axes[1].set_xlabel("estimated ms", fontsize=9)
        axes[1].set_ylabel("measured ms", fontsize=9)
        axes[1].set_title("layers", fontsize=9.5, loc="left")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
    return figure


def plain(text: object) -> str:
    r"""Text that Matplotlib draws as it is, though it may have dollar signs; what nobody can draw is a box.

    >>> print(plain("layer$1$"))
    layer\$1\$
    """
    whole = str(text).encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", whole).replace("$", r"\$")


def scaled(unit: str) -> tuple[float, str]:
    """Factor and unit in which a cost reads well: milliseconds for seconds."""
    return (1e3, "m" + unit) if unit == "s" or unit.startswith("s ") else (1.0, unit)


def cost_label(objective: str, unit: str) -> str:
    """Axis label of a cost."""
    name = scaled(unit)[1]
    return plain(f"estimated {objective}, {name}" if name else f"estimated {objective}")


def _near(history: History, values: Sequence[float]) -> tuple[float, float] | None:
    """Accuracies around the threshold, where all of them spread ten times as far."""
    limit, dense, allowed = history.threshold, history.dense_accuracy, history.max_drop
    if limit is None or dense is None or not values or not allowed:
        return None
    low, high = limit - 3 * allowed, limit + 3 * allowed
    spread = max(*values, dense) - min(*values, dense)
    return (low, high) if spread > 10 * allowed and any(low <= value <= high for value in values) else None


def _scatter(axis: Axes, history: History, seen: Sequence[TrialRecord], winner: float | None) -> None:
    scale, _ = scaled(history.unit)
    skipped = [scale * t.cost for t in history.trials if not t.measured and t.cost is not None]
    if skipped:
        at_bottom: Any = axis.get_xaxis_transform()
        axis.plot(
            skipped, [0.015] * len(skipped), "|", color="0.6", markersize=7, transform=at_bottom, label="not evaluated"
        )
    for good, colour, label in ((True, _GOOD, "accurate enough"), (False, _BAD, "not accurate enough")):
        points = [(scale * (t.cost or 0.0), t.accuracy) for t in seen if history.feasible(t) is good]
        if points:
            axis.plot(*zip(*points, strict=True), "o", color=colour, markersize=4.5, label=label)
    front = [(scale * (t.cost or 0.0), t.accuracy) for t in history.front]
    if len(front) > 1:
        axis.step(*zip(*front, strict=True), where="post", color="0.45", linewidth=1.0, label="front")
    if history.dense_cost is not None and history.dense_accuracy is not None:
        at = ([scale * history.dense_cost], [history.dense_accuracy])
        axis.plot(*at, "*", color="0.25", markersize=11, linestyle="none", label="dense")
    ringed = [t for t in seen if winner is not None and math.isclose(t.cost or 0.0, winner, rel_tol=1e-9)]
    if ringed:
        at = ([scale * (ringed[0].cost or 0.0)], [ringed[0].accuracy or 0.0])
        axis.plot(*at, "o", color=_GOOD, markersize=12, fillstyle="none", linestyle="none", label="winner")
    _threshold(axis, history)


def _threshold(axis: Axes, history: History) -> None:
    if history.threshold is not None:
        axis.axhline(history.threshold, color=_BAD, linewidth=1.1, linestyle="--", label="threshold")


def _panels(number: int, width: float, height: float, stacked: bool = False) -> tuple[Figure, list[Axes]]:
    size = (width, number * height) if stacked else (number * width, height)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    shape = (number, 1) if stacked else (1, number)
    axes = list(figure.subplots(*shape, sharex=stacked, squeeze=False).flatten())
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes
