"""Ranges against NumPy on all values, and observers against ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.quantization import AveragedMinMax, MeanSquaredError, MinMax, Percentile, Range
from lightning_prune.quantization.observers import BINS, Histogram
from lightning_prune.quantization.schemes import Grid
from tests.quantization import reference

RANGES = [MinMax(), AveragedMinMax(), AveragedMinMax(0.9), Percentile(0.9), MeanSquaredError(20)]


def batches(seed: int, count: int, scale: float = 1.0, n: int = 60) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, n, generator=generator) * scale * (1 + 3 * i) + 0.2 for i in range(count)]


def observed(ranges: Range, seen: list[Tensor], grid: Grid) -> tuple[float, float]:
    observer = ranges.observer()
    for batch in seen:
        observer.update(batch)
    low, high = ranges.observed(observer, grid)
    return low.item(), high.item()


def test_min_max() -> None:
    seen = batches(0, 3)
    low, high = observed(MinMax(), seen, Grid())
    everything = torch.cat(seen)
    assert (low, high) == (everything.min().item(), everything.max().item())


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_averages_weigh_examples_alike_however_they_are_batched(sizes: list[int], seed: int) -> None:
    x = torch.randn(sum(sizes), 3, 5, generator=torch.Generator().manual_seed(seed))
    low, high = observed(AveragedMinMax(), list(x.split(sizes)), Grid())
    rows = x.numpy().reshape(len(x), -1).astype(np.float64)
    assert low == pytest.approx(rows.min(1).mean(), rel=1e-5)
    assert high == pytest.approx(rows.max(1).mean(), rel=1e-5)


def test_momentum_follows() -> None:
    low, high = observed(AveragedMinMax(0.75), [torch.tensor([[0.0, 4.0]]), torch.tensor([[-4.0, 8.0]])], Grid())
    assert (low, high) == (-1.0, 5.0)


@settings(max_examples=50)
@given(share=st.sampled_from([0.5, 0.9, 0.99, 0.999, 1.0]), n=st.integers(1, 3000), seed=st.integers(0, 99))
def test_percentile_clips_so_many(share: float, n: int, seed: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    ordered = np.sort(x.numpy())
    clipped = int(np.floor(n * round((1 - share) / 2, 6) + 1e-9))
    expected = (float(ordered[clipped]), float(ordered[n - 1 - clipped]))
    low, high = Percentile(share).bounds(x.view(1, 1, -1), Grid())
    assert (low.item(), high.item()) == expected
    resolution = 2 * 2.0 ** float(np.ceil(np.log2(np.abs(ordered).max()))) / BINS
    assert observed(Percentile(share), [x.view(1, -1)], Grid()) == pytest.approx(expected, abs=resolution)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_least_squares_is_the_best_of_its_candidates(bits: int, scheme: Any) -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(bits)) ** 3
    low, high = MeanSquaredError(25).bounds(x[:, None], Grid(bits, scheme))
    for row, least, greatest in zip(x.numpy(), low.tolist(), high.tolist(), strict=True):
        shares = [np.float32(k / 25) for k in range(25, 0, -1)]
        tried = [(row.min() * share, row.max() * share) for share in shares]
        errors = [reference.error(row, *bounds, bits, scheme) for bounds in tried]
        assert (least, greatest) == pytest.approx(tried[int(np.argmin(errors))], rel=1e-6)
    assert bits == 8 or (high < x.amax(1)).any()


def test_of_equal_errors_the_widest_range_wins() -> None:
    _, high = MeanSquaredError(4).bounds(torch.tensor([[[0.0, 1e-40]]]), Grid())  # too narrow for any grid
    assert high.item() == torch.tensor(1e-40).item()


def test_least_squares_of_activations_is_that_of_the_values_to_a_candidate() -> None:
    x = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)) ** 3
    exact = MeanSquaredError().bounds(x.view(1, 1, -1), Grid(4))
    low, high = observed(MeanSquaredError(), list(x.split(10)), Grid(4))
    assert low == pytest.approx(exact[0].item(), rel=0.03)
    assert high == pytest.approx(exact[1].item(), rel=0.03)
    assert high < 0.9 * x.max()


@settings(max_examples=40)
@given(scales=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 3.0, 1e4, 1e30]), min_size=1, max_size=6))
def test_a_histogram_that_grew_is_one_that_knew(scales: list[float]) -> None:
    seen = [batch * scale for batch, scale in zip(batches(1, len(scales)), scales, strict=True)]
    grown, whole = Histogram(), Histogram()
    for batch in seen:
        grown.update(batch)
    whole.update(torch.cat(seen))
    assert torch.equal(grown.counts, whole.counts)
    assert grown.limit == whole.limit
    assert grown.counts.sum() == sum(batch.numel() for batch in seen)
    centres, counts = grown.occupied()
    assert counts.sum() == grown.counts.sum()
    assert centres.tolist() == sorted(centres.tolist())
    values = np.concatenate([batch.numpy().ravel() for batch in seen]).astype(np.float64)
    limit = float(whole.limit)
    if limit:
        expected, _ = np.histogram(values, bins=BINS, range=(-limit, limit))
        assert grown.counts.tolist() == expected.tolist()


@pytest.mark.parametrize("ranges", RANGES, ids=repr)
def test_constants_have_a_range(ranges: Range) -> None:
    for value in (0.0, 3.0, -2.5):
        low, high = observed(ranges, [torch.full((2, 5), value)] * 2, Grid())
        grid = Grid()
        scale, zero_point = grid.scale_and_zero_point(torch.tensor(low), torch.tensor(high))
        assert grid.fake_quantized(torch.tensor(value), scale, zero_point).item() == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("ranges", RANGES, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(ranges: Range, bad: float) -> None:
    observer = ranges.observer()
    observer.update(torch.ones(2, 3))
    before = {name: value.clone() for name, value in observer.state_dict().items()}
    with pytest.raises(ValueError, match="have no finite range"):
        observer.update(torch.tensor([[1.0, bad]]))
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())


@pytest.mark.parametrize("ranges", RANGES, ids=repr)
def test_an_observer_goes_on_from_its_state(ranges: Range) -> None:
    seen = batches(2, 4)
    first, second = ranges.observer(), ranges.observer()
    for batch in seen[:2]:
        first.update(batch)
    second.load_state_dict(first.state_dict())
    for batch in seen[2:]:
        first.update(batch)
        second.update(batch)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in second.state_dict().items())
    assert ranges.observed(second, Grid()) == ranges.observed(first, Grid())


@pytest.mark.parametrize("ranges", RANGES, ids=repr)
def test_empty_batches_and_numbers_without_a_dimension(ranges: Range) -> None:
    observer = ranges.observer()
    observer.update(torch.empty(0, 3))
    assert observer.seen == 0
    observer.update(torch.tensor(2.0))
    assert observer.seen == 1


def test_weights_per_tensor_are_averaged_over_rows() -> None:
    rows = torch.tensor([[0.0, 2.0], [-1.0, 4.0]])
    low, high = AveragedMinMax().bounds(rows[None], Grid())
    assert (low.tolist(), high.tolist()) == ([-0.5], [3.0])
    low, high = AveragedMinMax().bounds(rows[:, None], Grid())
    assert (low.tolist(), high.tolist()) == ([0.0, -1.0], [2.0, 4.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AveragedMinMax(1.0), r"momentum in \[0, 1\), got momentum=1.0"),
        (lambda: AveragedMinMax(-0.1), r"got momentum=-0.1"),
        (lambda: Percentile(0.0), r"share of values in \(0, 1\], got share=0.0"),
        (lambda: Percentile(99.9), r"got share=99.9"),
        (lambda: MeanSquaredError(0), r"at least one candidate, got candidates=0"),
        (lambda: MeanSquaredError(1.5), r"got candidates=1.5"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_observer_of_another_range() -> None:
    with pytest.raises(TypeError, match="Percentile reads the observer that it makes, got Extremes"):
        Percentile().observed(MinMax().observer(), Grid())
