"""The figure of the layers: what its bars say, and that it draws without a display."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.lines import Line2D

from lightning_prune.figures import layer_figure, speedup_figure, to_array
from lightning_prune.metrics import Count
from lightning_prune.speedups import SpeedupCurve
from lightning_prune.summary import LayerRow


def rows(number: int, macs: bool = True) -> list[LayerRow]:
    counts = [Count((10, index + 1), 10 * (index + 1), 4 * (index + 1)) for index in range(number)]
    return [
        LayerRow(f"block.{index}.conv.weight", each, 100 * each.total, 100.0 * each.kept)
        if macs
        else LayerRow(f"block.{index}.conv.weight", each)
        for index, each in enumerate(counts)
    ]


def test_bars_are_the_counts() -> None:
    figure = layer_figure(rows(5), "End")
    parameters, macs, sparsity = figure.axes
    removed, kept = parameters.containers
    assert [bar.get_width() for bar in removed] == [10, 20, 30, 40, 50]
    assert [bar.get_width() for bar in kept] == [4, 8, 12, 16, 20]
    assert [bar.get_width() for bar in macs.containers[1]] == [400, 800, 1200, 1600, 2000]
    assert [bar.get_width() for bar in sparsity.containers[1]] == [0.6] * 5
    assert [label.get_text() for label in parameters.get_yticklabels()] == [row.name for row in rows(5)]
    assert parameters.yaxis_inverted()
    assert figure.get_suptitle() == "End"


def test_the_macs_panel_goes_when_nobody_knows_them() -> None:
    assert [axis.get_title(loc="left").split(":")[0] for axis in layer_figure(rows(3, macs=False)).axes] == [
        "parameters",
        "sparsity",
    ]


@pytest.mark.parametrize("number", [1, 5, 54])
def test_every_layer_has_room(number: int) -> None:
    figure = layer_figure(rows(number))
    pixels = to_array(figure)
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert (pixels < 250).any()
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(low.y1 <= high.y0 + 1 for high, low in itertools.pairwise(labels)), "labels overlap"
    assert all(label.x0 >= 0 for label in labels), "a name is cut off"
    for axis in figure.axes:
        right = axis.get_window_extent().x1
        assert all(text.get_window_extent().x1 <= right + 1 for text in axis.texts), "a number runs into the next panel"


def test_no_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one row, got none"):
        layer_figure([])


def curve(number: int, pays_from: float = 0.5, layer: str = "") -> SpeedupCurve:
    sparsities = tuple(step / 10 for step in range(10))
    speedups = tuple(max(1.0, 0.5 / (1 - sparsity)) for sparsity in sparsities)
    return SpeedupCurve(layer or f"block.{number}.conv.weight", (number + 1) / 1e3, sparsities, speedups, pays_from)


def points(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = line.get_data()
    return np.asarray(x).tolist(), np.asarray(y).tolist()


def test_speedup_and_break_even_are_drawn() -> None:
    never = curve(1, math.inf)
    figure = speedup_figure([curve(0), never], {"block.0.conv.weight": 0.81}, "On a CPU")
    first, second = figure.axes
    one, line, mark, dot = first.lines
    assert points(one)[1] == [1.0, 1.0]
    assert points(line) == (list(curve(0).sparsities), list(curve(0).speedups))
    assert points(mark)[0] == [0.5, 0.5]
    assert points(dot) == ([0.81], [curve(0).at(0.8)])
    assert [text.get_text() for text in first.texts] == ["pays from 0.50"]
    assert first.get_title(loc="left") == "block.0.conv.weight\n1 ms dense"
    assert len(second.lines) == 2
    assert [text.get_text() for text in second.texts] == ["never pays"]
    assert figure.get_suptitle() == "On a CPU"


@pytest.mark.parametrize(("number", "panels"), [(1, 1), (5, 5), (54, 12)])
def test_of_many_layers_the_most_expensive_are_shown(number: int, panels: int) -> None:
    curves = [
        curve(index, layer="features." * 6 + str(index) if index == number - 1 else "") for index in range(number)
    ]
    figure = speedup_figure(curves, title="Title")
    pixels = to_array(figure)
    assert (pixels < 250).any()
    shown = [axis for axis in figure.axes if axis.get_visible()]
    titles = [axis.get_title(loc="left") for axis in shown]
    assert len(titles) == panels
    assert [title.split("\n")[1] for title in titles] == [
        f"{n} ms dense" for n in range(number - panels + 1, number + 1)
    ]
    assert ("the 12 most expensive of 54 layers" in figure.get_suptitle()) == (number == 54)
    boxes = [axis.get_tightbbox() for axis in shown]
    assert all(box is not None and box.x0 >= 0 and box.x1 <= pixels.shape[1] + 1 for box in boxes), "a title is cut off"


def test_no_curves_are_an_error() -> None:
    with pytest.raises(ValueError, match="got 0 layers and most=12"):
        speedup_figure([])
    with pytest.raises(ValueError, match="got 1 layers and most=0"):
        speedup_figure([curve(0)], most=0)


def test_pyplot_and_its_windows_stay_out() -> None:
    code = "import sys, lightning_prune.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
