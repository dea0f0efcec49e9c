"""What plans cost, against counting by hand and against the estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.granularities import NM, Block, Filter, Granularity, Unstructured
from lightning_prune.latency import DeviceProfile, LatencyEstimator
from lightning_prune.layers import LayerTable, layer_table
from lightning_prune.plan import PlanEntry
from lightning_prune.search.layer_space import layer_rows, layer_space
from lightning_prune.search.objectives import (
    OBJECTIVES,
    Bytes,
    Energy,
    Latency,
    MACs,
    Memory,
    Objective,
    Parameters,
    Throughput,
    objective_of,
)
from tests.latency.profiles import hand_made, mlp, record, residual

LEVELS = (0.0, 0.5, 0.75, 0.9)


def two_layers() -> LayerTable:
    return layer_table(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4)), torch.zeros(3, 10))


def rows(
    table: LayerTable, pattern: Granularity | None = None, levels: Sequence[float] = LEVELS
) -> list[list[PlanEntry]]:
    return [[PlanEntry(level, pattern if level else None) for level in levels] for _ in table]


def total(objective: Objective, table: LayerTable, *choices: int) -> float:
    return float(objective.costs(table, rows(table), None).total(np.array([choices]))[0])


def test_sums_are_what_counting_by_hand_gives() -> None:
    table = two_layers()
    # 200 and 80 weights, of which 50 and 8 are left; three examples.
    assert total(MACs(), table, 0, 0) == 3 * 280
    assert total(MACs(), table, 2, 3) == 3 * (50 + 8)
    assert total(Parameters(), table, 2, 3) == 58
    # Four bytes a nonzero and a bit a weight: 4 * 50 + 25, 4 * 8 + 10. Dense weights need no bits.
    assert total(Bytes(), table, 2, 3) == 225 + 42
    assert total(Bytes(), table, 0, 0) == 4 * 280
    # The second layer holds 3 x 20 inputs and 3 x 4 outputs at once, the first 3 x 10 and 3 x 20.
    assert total(Memory(), table, 2, 3) == 225 + 42 + 4 * 90
    moved = 225 + 42 + 4 * 3 * (10 + 20 + 20 + 4)
    assert total(Energy(joules_per_mac=2.0, joules_per_byte=3.0), table, 2, 3) == 2.0 * 3 * 58 + 3.0 * moved


@given(st.lists(st.integers(0, len(LEVELS) - 1), min_size=2, max_size=2), st.sampled_from(sorted(OBJECTIVES)))
def test_the_total_is_the_least_sum_and_falls_with_sparsity(choices: list[int], name: str) -> None:
    table = two_layers()
    estimator = LatencyEstimator(table, hand_made())
    costs = objective_of(name, 3).costs(table, rows(table), estimator)
    found = costs.total(np.array([choices, [0, 0]]))
    sums = [t.costs[[0, 1], choices].sum() + t.fixed for t in costs.tables]
    assert found[0] == pytest.approx(min(sums), rel=1e-9)
    assert 0 < found[0] <= found[1] * (1 + 1e-12)


@pytest.mark.parametrize("pattern", [None, Block(4, 4), Filter(), NM(2, 4)])
def test_latency_is_what_the_estimator_says(pattern: Granularity | None) -> None:
    model, example = residual()
    table, networks = record(model, example)
    estimator = LatencyEstimator(table, hand_made(networks))
    levels = (0.0, 0.5) if isinstance(pattern, NM) else LEVELS
    choices = np.random.default_rng(0).integers(0, len(levels), (20, len(table)))
    found = Latency().costs(table, rows(table, pattern, levels), estimator).total(choices)
    shares = torch.tensor(levels, dtype=torch.float64)[torch.from_numpy(choices)]
    np.testing.assert_allclose(found, estimator.latency_s(shares, pattern or Unstructured()).numpy(), rtol=1e-12)


def test_mixed_patterns_take_each_layers_own_and_the_faster_layout() -> None:
    model, example = mlp()
    table, networks = record(model, example)
    estimator = LatencyEstimator(table, hand_made(networks))
    mixed = [PlanEntry(0.0), PlanEntry(0.9), PlanEntry(0.9, Block(4, 4))]
    costs = Latency().costs(table, [mixed] * len(table), estimator)
    patterns = [Unstructured(), Block(4, 4), Unstructured()]
    expected = estimator.latency_s(torch.tensor([0.9, 0.9, 0.0], dtype=torch.float64), patterns)
    assert costs.total(np.array([[1, 2, 0]]))[0] == pytest.approx(float(expected), rel=1e-12)


def test_throughput_is_latency_per_example() -> None:
    model, example = mlp()
    table, networks = record(model, example)
    estimator = LatencyEstimator(table, hand_made(networks))
    choices = np.array([[1, 2, 3]])
    one = Latency().costs(table, rows(table), estimator)
    each = Throughput(4).costs(table, rows(table), estimator)
    np.testing.assert_allclose(each.total(choices) * 4, one.total(choices))
    np.testing.assert_allclose(each.tables[0].costs * 4, one.tables[0].costs)
    assert each.tables[0].fixed * 4 == pytest.approx(one.tables[0].fixed)


def test_layers_that_are_not_searched_stay_dense_and_are_counted() -> None:
    table = two_layers()
    chosen = {"2.weight": (PlanEntry(0.0), PlanEntry(0.5), PlanEntry(0.0))}
    costs = MACs().costs(table, layer_rows(table, chosen), None)
    space = layer_space(table, chosen, ["2.weight"], np.array([[0.0, 0.1, 0.0]]), costs)
    assert space.items == (("2.weight",),)
    assert space.dense_cost == 3 * 280
    assert space.cost(np.array([[1]])).tolist() == [3 * (200 + 40)]
    assert space.least_cost == 3 * (200 + 40)
    assert space.errors.tolist() == [[0.0, 0.1, math.inf]]  # a level that the layer cannot have is never chosen


def test_objectives_by_name() -> None:
    assert {name: objective_of(name, 2).name for name in OBJECTIVES} == {name: name for name in OBJECTIVES}
    own = MACs()
    assert objective_of(own, 1) is own
    with pytest.raises(ValueError, match=r"objective is one of \['bytes', 'energy', 'latency', .*'speed'"):
        objective_of("speed", 1)
    with pytest.raises(ValueError, match="got 3"):
        objective_of(3, 1)  # type: ignore[arg-type]


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="'latency' needs a device profile; give one that `calibrate` wrote"):
        Latency().costs(two_layers(), rows(two_layers()), None)
    with pytest.raises(ValueError, match="batch_size=0"):
        Throughput(0)
    with pytest.raises(ValueError, match="joules_per_mac=-1"):
        Energy(joules_per_mac=-1)
    with pytest.raises(ValueError, match="joules_per_byte=inf"):
        Energy(joules_per_byte=math.inf)


def test_energies_are_those_of_the_device_profile_unless_others_are_given(tmp_path: Path) -> None:
    table = two_layers()
    silent = hand_made()
    silent.save(tmp_path / "silent.json")
    assert DeviceProfile.load(tmp_path / "silent.json").joules_per_mac is None
    replace(silent, joules_per_mac=2.0, joules_per_byte=3.0).save(tmp_path / "known.json")
    known = DeviceProfile.load(tmp_path / "known.json")

    def joules(objective: Energy, profile: DeviceProfile) -> float:
        costs = objective.costs(table, rows(table), LatencyEstimator(table, profile))
        assert costs.total(np.array([[2, 3]])) == costs.tables[0].costs[[0, 1], [2, 3]].sum() + costs.tables[0].fixed
        return float(costs.total(np.array([[2, 3]]))[0])

    moved = 225 + 42 + 4 * 3 * (10 + 20 + 20 + 4)
    assert joules(Energy(), known) == 2.0 * 3 * 58 + 3.0 * moved
    assert joules(Energy(joules_per_mac=5.0), known) == 5.0 * 3 * 58 + 3.0 * moved
    assert joules(Energy(joules_per_byte=0.0), known) == 2.0 * 3 * 58
    default = 4.6e-12 * 3 * 58 + 1.6e-10 * moved
    assert joules(Energy(), silent) == total(Energy(), table, 2, 3) == pytest.approx(default)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"joules_per_byte={wrong}"):
            replace(silent, joules_per_byte=wrong)
