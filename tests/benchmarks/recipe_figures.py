"""Figures of a recipe: where parameters are and which stay, their values before and after, what each layer bears."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from lightning_prune.figures import layer_figure
from lightning_prune.metrics import Count
from lightning_prune.search.curves import Sensitivity
from lightning_prune.search.figures import sensitivity_figure
from lightning_prune.summary import LayerRow
from lightning_prune.targets import parameters


def weight_histograms(dense: nn.Module, sparse: nn.Module, names: tuple[str, ...], columns: int) -> Figure:
    """Values of each layer's weights before pruning, and of those that are left after it and after recovery."""
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 0.5 + 1.7 * rows), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    before, after = parameters(dense), parameters(sparse)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        old, new = before[name].detach().flatten(), after[name].detach().flatten()
        new = new[new != 0]
        edge = float(torch.cat([old.abs(), new.abs()]).quantile(0.999))
        bins = torch.linspace(-edge, edge, 61).tolist()
        axis.hist(old.tolist(), bins=bins, color="0.75", label="dense")
        axis.hist(new.tolist(), bins=bins, color="#2b6cb0", alpha=0.85, label="searched, nonzero")
        axis.set_yscale("log")
        axis.set_title(f"{name.removeprefix('network.').removesuffix('.weight')}: {len(new):,} left", fontsize=8)
        axis.tick_params(labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def parameter_bars(table: Any, sparse: nn.Module) -> Figure:
    """Parameters and multiply-accumulates of each layer, what is left in front of what was there."""
    own = parameters(sparse)
    rows = []
    for spec in table:
        count = Count(tuple(spec.weight_shape), spec.params, int((own[spec.name] != 0).sum()))
        rows.append(
            LayerRow(spec.name.removeprefix("network."), count, spec.macs, spec.macs * count.kept / count.total)
        )
    return layer_figure(rows)


def write_figures(
    folder: Path, dense: nn.Module, sparse: nn.Module, table: Any, curves: Sensitivity, scatter: Figure
) -> Mapping[str, int]:
    """All of them as PNG; name of the file -> bytes."""
    columns = 5 if len(table) <= 5 else 4
    figures = {
        "parameters": parameter_bars(table, sparse),
        "histograms": weight_histograms(dense, sparse, tuple(table.names), columns),
        "sensitivity": sensitivity_figure(curves, ["accuracy"]),
        "search": scatter,
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=80)
        with Image.open(folder / f"{name}.png") as image:
            small = image.convert("RGB").quantize(64)
        small.save(folder / f"{name}.png", optimize=True)
    return {name: (folder / f"{name}.png").stat().st_size for name in figures}
