"""What the figures of a search show, and the layers of its winner."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import nn

from lightning_prune.figures import to_array
from lightning_prune.granularities import Filter
from lightning_prune.kernel_report import KernelReport, LayerReport
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.search import result_figures as figures
from lightning_prune.search.history import History, TrialRecord
from lightning_prune.search.winner import WinnerLayer, layer_details, winner_layers
from tests.search.histories import DENSE, DENSE_COST, HOSTILE, history, result


def line(axis: Axes, label: str) -> Any:
    (found,) = [each for each in axis.lines if each.get_label() == label]
    return np.asarray(found.get_xydata())


def test_scatter_shows_every_trial() -> None:
    of = history(60)
    best = of.best
    assert best is not None
    (axis,) = figures.scatter_figure(of, best.cost).axes
    for good, label in ((True, "accurate enough"), (False, "not accurate enough")):
        known = [(1e3 * t.cost, t.accuracy) for t in of.evaluated if t.accuracy and t.cost and of.feasible(t) is good]
        assert line(axis, label) == pytest.approx(np.array(known))
    skipped = [1e3 * t.cost for t in of.trials if t.cost and not t.evaluated]
    assert line(axis, "not evaluated")[:, 0] == pytest.approx(skipped)
    assert set(line(axis, "threshold")[:, 1]) == {DENSE - 0.01}
    assert line(axis, "dense").tolist() == [[1e3 * DENSE_COST, DENSE]]
    assert line(axis, "winner") == pytest.approx(np.array([[1e3 * (best.cost or 0), best.accuracy]]))
    assert len(line(axis, "front")) == len(of.front)


def test_a_panel_near_the_threshold_where_accuracies_spread() -> None:
    of = history(60, max_drop=0.003)
    whole, near = figures.scatter_figure(of).axes
    assert near.get_ylim() == pytest.approx((DENSE - 4 * 0.003, DENSE + 2 * 0.003))
    assert whole.get_ylim()[0] < near.get_ylim()[0]
    assert not [each for each in whole.lines if each.get_label() == "winner"]


def test_progress() -> None:
    of = history(30)
    above, below = figures.progress_figure(of).axes
    best = line(above, "best so far")
    assert best[:, 0].tolist() == list(range(1, 2 + len(of.evaluated)))
    assert best[:, 1] == pytest.approx(1e3 * np.array(of.best_so_far()))
    shown = sum(len(np.asarray(each.get_xydata())) for each in above.lines) - len(best)
    assert shown == len(of.evaluated)
    assert (below.get_ylabel(), above.get_ylabel()) == ("val_acc", "estimated latency, ms")


@pytest.mark.parametrize(
    "of",
    [history(0), history(1), History((TrialRecord(0, evaluated=True),), "m", "min"), history(9, max_drop=None)],
    ids=["none", "one", "unknown", "front"],
)
def test_little_can_be_drawn(of: History) -> None:
    assert to_array(figures.scatter_figure(of, None)).size
    assert to_array(figures.progress_figure(of)).size


def test_winner() -> None:
    layers = winner_layers(result())
    (axis,) = figures.winner_figure(layers).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["net.0.weight", "net.2.weight"]
    _, csr, dense = axis.containers
    assert (csr.get_label(), [bar.get_width() for bar in csr]) == ("csr", [0.8])
    assert (dense.get_label(), [bar.get_width() for bar in dense]) == ("dense", [0.0])
    assert [text.get_text() for text in axis.texts] == ["0.800  200 left", "0.000  500 left"]
    many = tuple(WinnerLayer(f"block.{i}.conv.weight", 0.01 * i, kernel=f"kernel {i % 13}") for i in range(60))
    assert to_array(figures.winner_figure(many)).shape[0] > 1000
    with pytest.raises(ValueError, match="winner_figure needs at least one layer, got none"):
        figures.winner_figure([])


def test_estimates() -> None:
    passes, layers = figures.estimate_figure(result(), winner_layers(result())).axes
    assert [bar.get_height() for group in passes.containers for bar in group] == pytest.approx([1.9, 0.9, 2.0, 1.0])
    assert np.asarray(layers.lines[1].get_xydata()) == pytest.approx(np.array([[0.4, 0.5], [0.3, 0.3]]))
    assert len(figures.estimate_figure(result()).axes) == 1
    assert len(figures.estimate_figure(result(latency_s=math.nan)).axes) == 1
    with pytest.raises(ValueError, match="and there are none"):
        figures.estimate_figure(result(measured_latency_s=math.nan))


def test_importances() -> None:
    first, second = figures.importance_figure({"cost": {"budget": 1.0}, "drop": {"a$b$": 0.7, "c": 0.3}}).axes
    assert [bar.get_width() for bar in first.patches] == [1.0]  # type: ignore[attr-defined]
    assert [label.get_text() for label in second.get_yticklabels()] == [r"a\$b\$", "c"]
    with pytest.raises(ValueError, match="at least one outcome"):
        figures.importance_figure({})


@pytest.mark.parametrize("name", [HOSTILE, "$\\frac{$", "\ud800\x00"])
def test_names_are_drawn_as_they_are(name: str) -> None:
    of = history(20, metric=name, objective=name, unit=name)
    assert to_array(figures.scatter_figure(of)).size
    assert to_array(figures.progress_figure(of)).size
    assert to_array(figures.winner_figure([WinnerLayer(name, 0.5, kernel=name)])).size


@pytest.mark.parametrize(
    ("unit", "expected"), [("s", (1e3, "ms")), ("s per example", (1e3, "ms per example")), ("MACs", (1, "MACs"))]
)
def test_seconds_become_milliseconds(unit: str, expected: tuple[float, str]) -> None:
    assert figures.scaled(unit) == expected
    assert figures.cost_label("x", "") == "estimated x"


def test_layers_of_a_network() -> None:
    first_layer = nn.Linear(4, 3)
    network = nn.Sequential(first_layer, nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        first_layer.weight[0] = 0.0
    row = LayerReport("2.weight", 0.0, "dense", 1e-3, 2e-3, math.nan, math.inf)
    found = layer_details(network, KernelReport((row,), "nchw", 0.0, 0.0, 0.0, 0.0))
    assert [(each["name"], each["params"], each["nonzeros"]) for each in found] == [
        ("2.weight", 6, 6),
        ("0.weight", 12, 8),
    ]
    plan = SparsityPlan({"0.weight": PlanEntry(1 / 3, Filter())})
    second, first = winner_layers(replace(result(), plan=plan, kernels={}, details={"layers": found}))
    assert second == WinnerLayer("2.weight", 0.0, "", "dense", 6, 6, 1e-3, 2e-3, None)
    assert first == WinnerLayer("0.weight", 1 / 3, str(Filter()), None, 12, 8)
    assert [layer.name for layer in winner_layers(replace(result(), details={"layers": "odd"}))] == [
        "net.0.weight",
        "net.2.weight",
    ]
