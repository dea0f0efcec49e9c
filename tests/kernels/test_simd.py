"""The SIMD kernel under all ways of cutting up a call, not only the one it would choose."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.kernels import CHWN, NCHW, SIMD, Workload, measured_occupancy, native, simd, simd_plan
from lightning_prune.kernels.batch_last import arranged, batch_last, refused
from lightning_prune.kernels.simd import SparseLayer
from lightning_prune.kernels.simd_plan import Settings, candidates, choose, estimate, least
from tests.latency.profiles import workload_of

if reason := native.unavailable():
    pytest.skip(reason, allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def close(y: Tensor, layer: nn.Module, x: Tensor, relu: bool = False) -> bool:
    """Whether a result is within a hundred-thousandth of what float64 gives, relative to what was added up."""
    precise, absolute = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    for parameter in absolute.parameters():
        parameter.abs_()
    expected, magnitude = precise(x.double()), absolute(x.double().abs()) + 1e-30
    expected = expected.relu() if relu else expected
    return y.shape == expected.shape and bool(((y.double() - expected).abs() <= 1e-5 * magnitude).all())


@st.composite
def layers(draw: Any) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
    """Any layer with any share of zeros, and an input however it lies in memory."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    inputs, outputs = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    batch = draw(st.sampled_from([1, 2, 3, 8, 9, 16, 17, 24, 32]))
    layer: nn.Linear | nn.Conv2d
    if draw(st.integers(0, 3)) == 0:
        layer = nn.Linear(inputs, outputs, draw(st.booleans()))
        x = torch.randn(batch * draw(st.integers(1, 9)), 2 * inputs, generator=generator)[:, ::2]
    else:
        groups = draw(st.sampled_from([1, 1, 1, 2, inputs]))
        inputs, outputs = -(-inputs // groups) * groups, -(-outputs // groups) * groups
        pairs = st.tuples(st.integers(1, 5), st.integers(1, 5)) if draw(st.booleans()) else st.just((1, 1))
        window, stride = draw(pairs), draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        dilation, padding = draw(st.tuples(*[st.integers(1, 2)] * 2)), draw(st.tuples(*[st.integers(0, 3)] * 2))
        if window == (1, 1) and draw(st.booleans()):
            stride, padding = (1, 1), (0, 0)
        layer = nn.Conv2d(inputs, outputs, window, stride, padding, dilation, groups, draw(st.booleans()))
        size = [
            max(1, d * (w - 1) + 1 - 2 * p) + draw(st.integers(0, 20))
            for w, d, p in zip(window, dilation, padding, strict=True)
        ]
        x = torch.randn(batch, inputs, size[0], 2 * size[1], generator=generator)[..., ::2]
    ways_to_lie = [x, x.contiguous(), batch_last(x)]
    x = draw(st.sampled_from([*ways_to_lie, *([x.to(memory_format=torch.channels_last)] if x.ndim == 4 else [])]))
    kept = torch.rand(layer.weight.shape, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    kept[torch.rand(len(kept), generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = False
    with torch.no_grad():
        layer.weight.mul_(kept)
    return layer.requires_grad_(False), x


@st.composite
def ways(draw: Any, work: Workload, layout: str) -> Settings:
    """Any settings that the library takes for a call."""
    last = 0
    if layout == CHWN and not refused(work):
        work, last = arranged(work, native.library().lanes)
    woven = last > 0 or (work.kind != "linear" and (not work.pointwise or draw(st.booleans())))
    lanes = [lanes for lanes in (1, 4, 8, 16) if lanes <= native.library().lanes and (lanes > 1 or not woven)]
    if last:
        lanes = [lanes for lanes in lanes if work.batch % lanes == 0]
    rows = draw(st.integers(1, 2)) if woven else 1
    return Settings(
        draw(st.sampled_from(lanes)),
        int(woven),
        rows,
        draw(st.integers(1, 14 // rows)),
        draw(st.integers(1, 20)) if woven and not last else 1,
        draw(st.integers(1, 30)),
        draw(st.integers(1, 20)),
    )


@settings(max_examples=250)
@given(data=st.data())
def test_all_ways_give_the_same(data: st.DataObject) -> None:
    (layer, x), layout = data.draw(layers()), data.draw(st.sampled_from([NCHW, CHWN]))
    way, relu = data.draw(ways(workload_of(layer, x), layout)), data.draw(st.booleans())
    built = SparseLayer(layer, layout)
    built.relu = relu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simd, "choose", lambda *_: way)
        y = built(x)
    assert close(y, layer, x, relu), way
    assert y.stride() == (batch_last(y) if layout == CHWN else y.contiguous()).stride()
    assert bool(getattr(y, "rectified", False)) == relu


def test_rows_that_lie_otherwise_are_brought_into_woven_panels() -> None:
    """Rows of a linear layer whose batch lies last are pixels of an image, which other settings weave."""
    layer, x = nn.Linear(5, 3).requires_grad_(False), torch.randn(16, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simd, "choose", lambda *_: Settings(4, 1, 1, 2, 1, 2, 1))
        built = SparseLayer(layer, CHWN)
        assert close(built(x), layer, x)
        assert torch.equal(built(batch_last(x)), built(x))


@settings(max_examples=60)
@given(case=layers(), count=st.integers(2, 4), layout=st.sampled_from([NCHW, CHWN]))
def test_threads_change_nothing(case: tuple[nn.Linear | nn.Conv2d, Tensor], count: int, layout: str) -> None:
    layer, x = case
    built, before = SparseLayer(layer, layout), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = built(x)
        torch.set_num_threads(count)
        assert torch.equal(built(x), alone)
    finally:
        torch.set_num_threads(before)


def test_threads_share_the_filters_of_one_small_image(threads: None) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(32, 48, 3, padding=1).requires_grad_(False), torch.randn(1, 32, 7, 7)
    layer.weight.mul_(torch.rand_like(layer.weight) < 0.2)
    built = SparseLayer(layer)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert close(built(x), layer, x)


def test_infinities_stay_where_they_are_seen() -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(2.0)
    x = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]).view(1, 1, 2, 2)
    assert torch.equal(SparseLayer(layer)(x).nan_to_num(7, 8, 9), (2 * x).nan_to_num(7, 8, 9))


WORKS = [
    Workload("linear", 1, 1024, 1024),
    Workload("linear", 64, 1024, 1024),
    Workload("linear", 16, 784, 512),
    Workload("conv2d", 16, 64, 64, (32, 32), (32, 32), (3, 3), padding=(1, 1)),
    Workload("conv2d", 1, 512, 512, (7, 7), (7, 7), (3, 3), padding=(1, 1)),
    Workload("conv2d", 1, 256, 64, (56, 56), (56, 56)),
    Workload("conv2d", 2, 960, 160, (7, 7), (7, 7)),
    Workload("conv2d", 1, 3, 64, (224, 224), (112, 112), (7, 7), (2, 2), (3, 3)),
    Workload("conv2d", 5, 32, 32, (9, 9), (4, 4), (3, 3), (2, 2), groups=32),
    Workload("conv2d", 1, 8, 8, (1, 1), (1, 1)),
]


LYING = [(work, NCHW) for work in WORKS] + [(work, CHWN) for work in WORKS if not refused(work)]
LYING.append((Workload("conv2d", 16, 3, 40, (15, 21), (8, 11), (3, 3), (2, 2), (1, 1)), CHWN))
LYING.append((Workload("conv2d", 8, 24, 40, (9, 9), (9, 9), (3, 3), padding=(1, 1)), CHWN))


@pytest.mark.parametrize(("meant", "layout"), LYING, ids=str)
def test_what_is_chosen_fits_and_is_the_least(meant: Workload, layout: str) -> None:
    work, beside = arranged(meant, simd_plan.widest()) if layout == CHWN else (meant, 0)
    last = beside > 0
    assert (work.macs, work.input_elements) == (meant.macs, meant.input_elements)
    density, living = np.array([1.0, 0.5, 0.1, 0.01, 0.0]), np.array([1.0, 1.0, 0.8, 0.1, 0.0])
    done, channels, band = estimate(work, density, living, last)
    count = len(candidates(work, last)[0])
    assert done.cycles.shape == channels.shape == band.shape == (count, len(density))
    assert np.isfinite(done.cycles).all()
    assert min(part.min() for part in (done.compute, done.visits, done.copied, done.written)) >= 0
    assert least(work, density, living, last).cycles == pytest.approx(done.cycles.min(0))
    assert (np.diff(least(work, density, np.ones(5), last).compute) <= 0).all()
    layer = meant.layer().requires_grad_(False)
    for share, alive in zip(density, living, strict=True):
        way = choose(work, share, alive, last)
        assert way.rows * way.columns <= 14
        layer.weight.normal_().mul_(torch.rand_like(layer.weight) < share)
        built, x = SparseLayer(layer, layout), torch.randn(meant.input_shape())
        assert close(built(x), layer, x)


def test_images_too_wide_for_its_offsets_are_refused() -> None:
    wide = Workload("conv2d", 1, 1, 1, (9, 9000), (9, 9000), (5, 5), padding=(2, 2))
    reason = SIMD().refuses(wide, torch.float32, CPU)
    assert reason == f"the SIMD kernels are for narrower images than those of {wide}"
    with pytest.raises(ValueError, match="narrower images"):
        choose(wide, 0.1, 1.0)
    with pytest.raises(ValueError, match="narrower images"):
        SparseLayer(nn.Conv2d(1, 1, 5, padding=2).requires_grad_(False))(torch.zeros(1, 1, 9, 9000))
    nearly = Workload("conv2d", 1, 1, 1, (5, 6000), (5, 6000), (5, 5), padding=(2, 2))
    layer, x = nearly.layer().requires_grad_(False), torch.randn(nearly.input_shape())
    assert close(SparseLayer(layer)(x), layer, x)


def test_the_library_refuses_what_does_not_fit() -> None:
    good = Settings(4, 1, 1, 4, 1, 2, 1)
    layer = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
    for wrong in ({"lanes": 1}, {"lanes": 5}, {"woven": 0}, {"rows": 3}, {"columns": 15}, {"channels": 0}, {"band": 0}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simd, "choose", lambda *_, wrong=wrong: Settings(**{**vars(good), **wrong}))
            with pytest.raises(ValueError, match="settings do not fit"):
                SparseLayer(layer)(torch.zeros(1, 2, 4, 4))


def test_remembers_some_shapes() -> None:
    layer = nn.Linear(8, 4).requires_grad_(False)
    built = SparseLayer(layer)
    for rows in range(1, 21):
        x = torch.randn(rows, 8)
        assert close(built(x), layer, x)
    assert [shape[0] for shape in built._plans] == list(range(5, 21))
    assert len(built._plans) == simd._MOST_PLANS


def test_planning_uses_the_lanes_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert simd_plan.widest() == native.library().lanes
    for capability, lanes in (("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4), ("NO AVX", 4)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=capability: value)
        assert simd_plan.widest() == lanes


def test_rectifies_like_pytorch() -> None:
    layer, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(7, 6)
    x[0, 0] = torch.nan
    built = SparseLayer(layer)
    built.relu = True
    expected = functional.relu(layer(x))
    assert torch.equal(built(x).isnan(), expected.isnan())
    assert torch.allclose(built(x), expected, equal_nan=True)


class TestVisits:
    """What visiting filters costs, by how zeros lie."""

    @staticmethod
    def visits(mask: Tensor) -> float:
        features = SIMD().features(Workload("linear", 64, mask.shape[1], mask.shape[0]), measured_occupancy(mask))
        return float(features["visits"])

    @staticmethod
    def guessed(mask: Tensor) -> float:
        left = measured_occupancy(mask)
        work = Workload("linear", 64, mask.shape[1], mask.shape[0])
        return float(least(work, left.density.numpy().reshape(1), left.columns.numpy().reshape(1)).visits[0])

    @pytest.mark.parametrize("density", [0.6, 0.3, 0.1, 0.05])
    def test_zeros_anywhere_pay_in_full(self, density: float) -> None:
        mask = (torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < density).float()
        assert self.visits(mask) == pytest.approx(self.guessed(mask), rel=0.02)

    @pytest.mark.parametrize("density", [0.5, 0.2, 0.1])
    def test_blocks_pay_a_third(self, density: float) -> None:
        blocks = (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < density).float()
        mask = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert self.visits(mask) == pytest.approx(0.35 * self.guessed(mask), rel=0.05)

    def test_dead_filters_are_hardly_visited(self) -> None:
        mask = torch.zeros(512, 512)
        mask[:128] = 1.0
        assert self.visits(mask) == pytest.approx(0.35 * (0.15 + 0.85 / 4) * self.guessed(mask), rel=1e-6)
        mask[:, 256:] = 0.0  # inputs that are gone as a whole scatter nothing
        assert self.visits(mask) == pytest.approx(0.35 * (0.15 + 0.85 / 4) * self.guessed(mask), rel=1e-6)

    @given(density=st.floats(0.0, 1.0), rows=st.floats(0.0, 1.0), columns=st.floats(0.0, 1.0), seed=st.integers(0, 99))
    @settings(max_examples=50)
    def test_never_more_than_guessed_nor_nothing(self, density: float, rows: float, columns: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(32, 24, generator=generator) < density
        mask &= torch.rand(32, 1, generator=generator) < rows
        mask &= torch.rand(1, 24, generator=generator) < columns
        guessed = self.guessed(mask.float())
        assert 0.05 * guessed <= self.visits(mask.float()) <= guessed * (1 + 1e-9)


def test_a_depthwise_layer_reads_the_channels_of_the_filters_that_are_left() -> None:
    work = Workload("conv2d", 1, 8, 16, (6, 6), (6, 6), window=(3, 3), padding=(1, 1), groups=8)
    weight = torch.ones(16, 1, 3, 3)
    whole = SIMD().features(work, measured_occupancy(weight))
    weight[4:] = 0.0
    left = SIMD().features(work, measured_occupancy(weight))
    assert float(whole["read"]) == work.input_elements
    # Of two filters to a channel, either keeps it; a quarter of all are left.
    assert float(left["read"]) == pytest.approx((1 - 0.75**2) * work.input_elements)
    assert (float(left["copied"]), float(left["compute"])) < (float(whole["copied"]), float(whole["compute"]))
