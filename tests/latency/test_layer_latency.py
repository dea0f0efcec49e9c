"""What a pass is made of: layers and the rest add up to `latency_s`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_prune.granularities import NM, Block, Filter, Granularity, Unstructured
from lightning_prune.kernels import CSR, Dense
from lightning_prune.latency import DeviceProfile, LatencyEstimator
from lightning_prune.layers import layer_table
from tests.latency.profiles import hand_made, mlp, record, residual


def estimators(make: Any) -> list[tuple[LatencyEstimator, int]]:
    """Of a network that was calibrated and of one that was not, in two layouts and in one; and how many there are."""
    model, example = make()
    table, networks = record(model, example)
    one = DeviceProfile(hand_made().machine, hand_made(networks, [Dense(), CSR()]).costs, (), networks)
    return [
        (LatencyEstimator(table, hand_made(networks)), 2),
        (LatencyEstimator(table, hand_made()), 2),
        (LatencyEstimator(table, one), 1),
    ]


@pytest.mark.parametrize("make", [mlp, residual])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_layers_and_the_rest_add_up_to_the_pass(make: Any, pattern: Granularity) -> None:
    for estimator, count in estimators(make):
        levels = torch.tensor([0.0, 0.5] if isinstance(pattern, NM) else [0.0, 0.3, 0.5, 0.8, 0.95, 0.99]).double()
        picked = torch.randint(len(levels), (3, 50, len(estimator.table)), generator=torch.Generator().manual_seed(0))
        shares = levels[picked]
        found = estimator.layer_latency_s(shares, pattern)
        assert len(found) == count
        sums = torch.stack([seconds.sum(dim=-1) + rest_s for seconds, rest_s in found])
        assert [seconds.shape for seconds, _ in found] == [shares.shape] * count
        torch.testing.assert_close(sums.amin(dim=0), estimator.latency_s(shares, pattern), rtol=1e-12, atol=0.0)
        # A layer's time does not depend on what the others lack.
        alone = shares.clone()
        alone[..., 1:] = 0.0
        for (seconds, _), (others, _) in zip(found, estimator.layer_latency_s(alone, pattern), strict=True):
            torch.testing.assert_close(seconds[..., 0], others[..., 0], rtol=0.0, atol=0.0)


def test_layouts_differ_and_neither_is_always_the_faster() -> None:
    estimator = estimators(residual)[0][0]
    dense = torch.zeros(len(estimator.table), dtype=torch.float64)
    (one, _), (other, _) = estimator.layer_latency_s(dense)
    assert not torch.equal(one, other)


def test_blocks_that_silence_no_filter_add_up_and_filters_that_do_leave_less() -> None:
    model, example = residual()
    estimator = estimators(residual)[0][0]
    patterns = [Unstructured() if spec.groups > 1 else Block(4, 4) for spec in estimator.table]
    shares = torch.full((len(estimator.table),), 0.5, dtype=torch.float64)
    sums = min(float(seconds.sum()) + rest_s for seconds, rest_s in estimator.layer_latency_s(shares, patterns))
    assert sums >= float(estimator.latency_s(shares, patterns)) * (1 - 1e-12)
    filters = min(float(seconds.sum()) + rest_s for seconds, rest_s in estimator.layer_latency_s(shares, Filter()))
    assert filters > float(estimator.latency_s(shares, Filter())) * 1.01
    assert layer_table(model, example).names == estimator.table.names


def test_layers_in_the_rest_take_no_time_of_their_own() -> None:
    model, example = mlp()
    table, networks = record(model, example)
    [(key, known)] = networks.items()
    fewer = type(known)(known.name, known.layers[1:], *(getattr(known, f) for f in list(vars(known))[2:]))
    estimator = LatencyEstimator(table, hand_made({key: fewer}))
    for seconds, rest_s in estimator.layer_latency_s(torch.zeros(2, len(table), dtype=torch.float64)):
        assert seconds[:, 0].tolist() == [0.0, 0.0]
        assert (seconds[:, 1:] > 0).all()
        assert rest_s > 0


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.full((3,), 1.5), torch.full((3,), float("nan"))])
def test_bad_sparsities(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        estimators(mlp)[0][0].layer_latency_s(wrong)
