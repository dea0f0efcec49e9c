"""The figure of the layers: what its bars say, and that it draws without a display."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from lightning_prune.figures import layer_figure, to_array
from lightning_prune.metrics import Count
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


def test_pyplot_and_its_windows_stay_out() -> None:
    code = "import sys, lightning_prune.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
