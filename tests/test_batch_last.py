"""Networks whose activations lie with the batch last, and models that do not run in every memory layout."""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import LatencyEstimator, accelerate, calibrate, layer_table, pooling
from lightning_prune.kernels import CHWN, KERNELS, NCHW, NHWC, SIMD, Dense, LayerKernel, Shrunk, Workload, native
from lightning_prune.kernels.batch_last import BatchLast, arranged, batch_last, lies_last, refused
from lightning_prune.pooling import SeparablePool
from lightning_prune.preparation import Prepared
from lightning_prune.runtime import AcceleratedModel, assembled

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


class Residual(nn.Module):
    """What networks do between layers: normalise, rectify, pool, add, put side by side, average, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.small = nn.Conv2d(32, 24, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.first(x))))
        x = self.relu(self.inner(x) + x)
        x = self.relu(self.small(torch.cat([x, self.deep(x)], 1)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Viewing(nn.Module):
    """The layer behind the images sees them through `view`, as many forwards do."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.images(x)).view(len(x), -1))  # type: ignore[no-any-return]


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.mul_(torch.rand_like(module.weight) >= sparsity)
    return model.eval()


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(torch.allclose(found, expected, atol=1e-5, rtol=1e-4))


class TestTensors:
    @given(batch=st.integers(0, 40), size=st.lists(st.integers(1, 5), min_size=3, max_size=3), images=st.booleans())
    def test_numbers_stay_what_they_are(self, batch: int, size: list[int], images: bool) -> None:
        x = torch.randn(batch, *size) if images else torch.randn(batch, size[0])
        y = batch_last(x)
        assert torch.equal(x, y)
        assert lies_last(batch, images=images) == (batch in (8, 16) or (not images and batch in (24, 32, 40)))
        assert (y.movedim(0, -1) if lies_last(batch, images=images) else y).is_contiguous()
        if y.numel() and lies_last(batch, images=images):
            assert batch_last(y).data_ptr() == y.data_ptr()

    @pytest.mark.parametrize(
        ("work", "reason"),
        [
            (Workload("linear", 40, 3, 5), None),
            (Workload("linear", 9, 3, 5), "batches of a multiple of 8 can lie last, not of 9"),
            (Workload("conv2d", 32, 3, 5), "batches of a multiple of 8, up to 16, can lie last, not of 32"),
        ],
        ids=str,
    )
    def test_what_cannot_lie_so_is_named(self, work: Workload, reason: str | None) -> None:
        assert refused(work) == reason
        if reason is not None:
            assert reason in str(SIMD(CHWN).refuses(work, torch.float32, torch.device("cpu")))

    @pytest.mark.parametrize("widest", [4, 8, 16])
    @pytest.mark.parametrize("batch", [8, 16])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_calls_are_arranged_for_every_width_of_vectors(self, widest: int, batch: int, stride: int) -> None:
        work = Workload("conv2d", batch, 3, 5, (9, 9), (9, 9), (3, 3), (stride, stride), (1, 1))
        call, beside = arranged(work, widest)
        lanes = min(widest, batch)
        assert beside == (batch // lanes if stride == 1 else 1)
        assert call.batch * beside == batch
        assert (call.macs, call.weights, call.input_elements) == (work.macs, work.weights, work.input_elements)

    def test_dense_layers_give_their_results_so(self) -> None:
        layer = nn.Conv2d(3, 5, 3).requires_grad_(False)
        built = Dense(CHWN).build(layer)
        assert isinstance(built, BatchLast)
        for x in (torch.randn(8, 3, 6, 7), torch.randn(9, 3, 6, 7), torch.randn(3, 6, 7)):
            y = built(batch_last(x) if x.ndim == 4 else x)
            assert torch.equal(y, layer(x))
            assert y.stride() == (batch_last(y) if x.ndim == 4 else y).stride()

    def test_no_other_kernel_knows_the_layout(self) -> None:
        with pytest.raises(ValueError, match=r"a layout is one of \('nchw', 'nhwc'\), got 'chwn'"):
            Shrunk(CHWN)
        with pytest.raises(ValueError, match=r"runs in layouts \('nchw', 'chwn'\), got 'nhwc'"):
            SIMD(NHWC)


@settings(max_examples=80)
@given(data=st.data())
def test_pooling(data: st.DataObject) -> None:
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.integers(least, most)), data.draw(st.integers(least, most))

    window, size = pair(1, 4), pair(1, 12)
    padding = (data.draw(st.integers(0, window[0] // 2)), data.draw(st.integers(0, window[1] // 2)))
    assume(all(n + 2 * p >= w for n, p, w in zip(size, padding, window, strict=True)))
    pool = nn.MaxPool2d(window, pair(1, 3), padding, ceil_mode=data.draw(st.booleans()))
    separable, x = SeparablePool(pool), torch.randn(8, 2, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "_FEWEST_NUMBERS", 0)
        y = separable(batch_last(x))
    assert torch.equal(y, pool(x))
    if all(map(pooling._Step.fits, separable.steps, size)):
        assert y.stride() == batch_last(y).stride()


@needs_library
@pytest.mark.parametrize("make", [Residual, mlp], ids=["images", "rows"])
@pytest.mark.parametrize("sparse", [SIMD(CHWN), SIMD(NCHW), Dense(NCHW)], ids=lambda kernel: kernel.name)
def test_networks(make: type[nn.Module], sparse: LayerKernel) -> None:
    """Whatever runs the layers, for batches that can lie last and for others, results are those of the model."""
    torch.manual_seed(0)
    model = pruned(make())
    shape = (64,) if make is mlp else (3, 13, 13)
    kernels = {n: sparse for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    network = assembled(model, torch.randn(16, *shape), kernels, CHWN)
    for batch in (16, 1, 8, 5, 24):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            expected = model(x)
        assert close(network(x), expected)
        assert network(x).is_contiguous()


@needs_library
def test_outputs_of_any_form_are_handed_on_contiguous() -> None:
    @dataclass(frozen=True)
    class Answer:
        rows: Tensor
        more: tuple[Tensor, dict[str, Any]]

    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Answer:
            y = self.layer(x)
            return Answer(y, (y + 1, {"half": y / 2, "name": "y"}))

    model, x = pruned(Answering(), 0.5), torch.randn(16, 6)
    found, expected = assembled(model, x, {"layer": SIMD(CHWN)}, CHWN)(x), model(x)
    for mine, theirs in (
        (found.rows, expected.rows),
        (found.more[0], expected.more[0]),
        (found.more[1]["half"], expected.more[1]["half"]),
    ):
        assert mine.is_contiguous()
        assert close(mine, theirs)
    assert found.more[1]["name"] == "y"


@needs_library
def test_layers_that_were_pickled_before_there_were_layouts() -> None:
    layer, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(16, 6)
    built = SIMD(NCHW).build(layer)
    del built.layout
    assert close(pickle.loads(pickle.dumps(built))(x), layer(x))


@needs_library
def test_nothing_is_copied_between_layers() -> None:
    torch.manual_seed(0)
    model = pruned(Residual())
    kernels: dict[str, LayerKernel] = {n: SIMD(CHWN) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    network, seen = assembled(model, torch.randn(16, 3, 13, 13), kernels, CHWN), []
    for name in ("pool", "inner", "deep"):
        network.get_submodule(f"network.{name}").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(torch.randn(16, 3, 13, 13))
    assert all(x.movedim(0, -1).is_contiguous() for x in seen)
    assert len(seen) == 3


@needs_library
def test_is_chosen_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = pruned(mlp(1024), 0.97), torch.randn(64, 1024)
    fast = accelerate(model, x, kernels=(SIMD(CHWN),), rounds=3)
    report = fast.kernel_report()
    assert report.layout == CHWN
    assert "simd-chwn" in {row.kernel for row in report.layers}
    fast.save(tmp_path / "fast.pt")
    loaded = AcceleratedModel.load(tmp_path / "fast.pt", mlp(1024))
    assert loaded.layout == CHWN
    assert torch.equal(loaded(x), fast(x))
    assert close(loaded(x), model(x))


@needs_library
class TestCalibration:
    KERNELS = (SIMD(NCHW), SIMD(CHWN))

    @pytest.mark.parametrize("make", [Residual, mlp], ids=["images", "rows"])
    def test_a_layout_more(self, make: type[nn.Module], tmp_path: Path) -> None:
        torch.manual_seed(0)
        model, images = make().eval(), make is not mlp
        x = torch.randn(8, 3, 13, 13) if images else torch.randn(8, 64)
        path, table = tmp_path / "profile.json", layer_table(model, x)
        options = {"rounds": 1, "spread": 0, "progress": False, "profile": path}
        former = calibrate(model, x, kernels=self.KERNELS[:1], **options)  # type: ignore[arg-type]
        known = former.network(table)
        assert known is not None
        assert set(known.dense_s) == ({NCHW, NHWC} if images else {NCHW})
        profile = calibrate(model, x, kernels=self.KERNELS, **options)  # type: ignore[arg-type]
        record = profile.network(table)
        assert record is not None
        assert set(record.dense_s) == set(record.layers_s) == {*known.dense_s, CHWN}
        assert {name: record.dense_s[name] for name in known.dense_s} == known.dense_s
        assert {"simd", "simd-chwn"} <= set(profile.costs)
        assert ("dense-chwn" in profile.costs) == images
        estimator = LatencyEstimator(table, profile)
        sparsity = torch.full((len(table),), 0.9, dtype=torch.float64)
        totals = [sum(layers_s.tolist()) + rest_s for layers_s, rest_s in estimator.layer_latency_s(sparsity)]
        assert len(totals) == len(record.dense_s)
        assert float(estimator.latency_s(sparsity)) == pytest.approx(min(totals))
        kernels = {estimator.kernels[i] for i in estimator.best_kernels(sparsity).tolist()}
        assert (estimator.best_layout(sparsity) == CHWN) == any(name.endswith("chwn") for name in kernels)
        without = replace(profile, networks={key: replace(known) for key in profile.networks})
        assert LatencyEstimator(table, without).best_layout(sparsity) != CHWN

    @pytest.mark.parametrize("make", [Residual, mlp], ids=["images", "rows"])
    def test_profiles_without_the_layout_do_without(self, make: type[nn.Module]) -> None:
        torch.manual_seed(0)
        model = pruned(make(), 0.95)
        x = torch.randn(8, 64) if make is mlp else torch.randn(8, 3, 13, 13)
        former = calibrate(model, x, kernels=self.KERNELS[:1], rounds=1, spread=0, progress=False)
        for kernels in (self.KERNELS, self.KERNELS[1:], KERNELS):
            fast = accelerate(model, x, former, kernels=kernels, rounds=1)
            assert fast.kernel_report().layout != CHWN
            assert close(fast(x), model(x))

    def test_what_is_added_later_is_brought_to_the_first_speed(self) -> None:
        """As if the machine had been a hundred times slower when the network was calibrated first."""
        torch.manual_seed(0)
        model, x, slower = mlp(512).eval(), torch.randn(64, 512), 100.0
        options = {"rounds": 3, "spread": 0, "progress": False}
        former = calibrate(model, x, kernels=self.KERNELS[:1], **options)  # type: ignore[arg-type]
        ((key, known),) = former.networks.items()
        times: dict[str, Any] = {
            name: {layout: seconds * slower for layout, seconds in getattr(known, name).items()}
            for name in ("fixed_s", "dense_s", "layers_s")
        }
        times["dense_s"][NHWC] = times["layers_s"][NHWC] = times["fixed_s"][NHWC] = 1.0  # as profiles once had it
        scaled = replace(
            former,
            measurements=tuple(replace(m, seconds=m.seconds * slower) for m in former.measurements),
            networks={key: replace(known, **times, passes={})},
        )
        profile = calibrate(model, x, kernels=self.KERNELS, profile=scaled, **options)  # type: ignore[arg-type]
        record = profile.networks[key]
        assert set(record.dense_s) == {NCHW, CHWN}
        assert record.dense_s[CHWN] == pytest.approx(record.dense_s[NCHW], rel=0.8)
        found = {name: [m.seconds for m in profile.measurements if m.kernel == name] for name in ("simd", "simd-chwn")}
        assert sum(found["simd-chwn"]) == pytest.approx(sum(found["simd"]), rel=0.8)

    def test_shapes_beside_the_network_are_left_to_layouts_with_kernels(self) -> None:
        model, x = mlp().double().eval(), torch.randn(8, 64, dtype=torch.float64)
        profile = calibrate(model, x, kernels=(SIMD(NCHW), SIMD(CHWN), Shrunk()), rounds=1, spread=6, progress=False)
        assert not [m for m in profile.measurements if m.kernel.endswith("chwn")]
        assert CHWN not in profile.layouts

    def test_other_batches_do_without(self) -> None:
        model, x = mlp().eval(), torch.randn(9, 64)
        profile = calibrate(model, x, kernels=self.KERNELS, rounds=1, spread=0, progress=False)
        record = profile.network(layer_table(model, x))
        assert record is not None
        assert set(record.dense_s) == {NCHW}
        assert "simd-chwn" not in profile.costs

    def test_networks_that_were_not_calibrated(self) -> None:
        torch.manual_seed(0)
        model, x = mlp().eval(), torch.randn(8, 64)
        profile = calibrate(model, x, kernels=self.KERNELS, rounds=1, spread=0, progress=False)
        record = next(iter(profile.networks.values()))
        other = layer_table(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), x)
        alone = replace(profile, networks={"x": replace(record, fixed_s={NCHW: 1e-3})})
        assert LatencyEstimator(other, alone).fixed_s(CHWN) == LatencyEstimator(other, alone).fixed_s(NCHW) > 0


@needs_library
class TestForwardsWithViews:
    def test_behind_rows(self) -> None:
        """Linear layers that run densely give rows as they are read, which a check of dense networks would see."""

        class Merging(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.each, self.all = nn.Linear(512, 512), nn.Linear(8 * 512, 10)

            def forward(self, x: Tensor) -> Tensor:
                return self.all(self.each(x).view(len(x), -1))  # type: ignore[no-any-return]

        torch.manual_seed(0)
        model, x = pruned(Merging(), 0.97), torch.randn(8, 8, 512)
        assert Prepared.of(model, x).layouts(KERNELS) == (NCHW,)
        assert close(accelerate(model, x, rounds=1)(x), model(x))
        calibrate(model, x, kernels=(SIMD(NCHW), SIMD(CHWN)), rounds=1, spread=0, progress=False)

    def test_of_images_that_other_batches_let_lie_last(self) -> None:
        class Cutting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.images, self.rows = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.rows(self.images(x).view(-1, 8, 8))  # type: ignore[no-any-return]

        model = pruned(Cutting())
        assert Prepared.of(model, torch.randn(4, 3, 4, 4)).layouts(KERNELS)[1:] in ((), (NHWC,))
        fast = accelerate(model, torch.randn(4, 3, 4, 4), kernels=(SIMD(CHWN), SIMD(NCHW)), rounds=1)
        for batch in (4, 8, 3):
            x = torch.randn(batch, 3, 4, 4)
            assert close(fast(x), model(x))

    def test_run_in_the_layouts_that_they_can(self, caplog: pytest.LogCaptureFixture) -> None:
        torch.manual_seed(0)
        model, x = pruned(Viewing(), 0.9), torch.randn(8, 3, 6, 6)
        with caplog.at_level(logging.INFO, "lightning_prune.preparation"):
            assert Prepared.of(model, x).layouts(KERNELS) == (NCHW, CHWN)
        assert "does not run with activations in nhwc, which is left out" in caplog.text
        fast = accelerate(model, x, rounds=1)
        assert fast.kernel_report().layout != NHWC
        assert close(fast(x), model(x))

    def test_are_calibrated_in_those(self) -> None:
        torch.manual_seed(0)
        model, x = Viewing().eval(), torch.randn(8, 3, 6, 6)
        table = layer_table(model, x)
        profile = calibrate(model, x, rounds=1, spread=4, progress=False)
        record = profile.network(table)
        assert record is not None
        assert set(record.dense_s) == {NCHW, CHWN}
        assert NHWC in profile.layouts  # of the shapes beside the model's
        estimator = LatencyEstimator(table, profile)
        assert estimator.best_layout(torch.full((2,), 0.9, dtype=torch.float64)) != NHWC
        assert close(accelerate(model, x, profile, rounds=1)(x), model(x))
