"""The device profiles of configs/devices: what their sources say is what they estimate."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import NM, Block, DeviceProfile, Filter, LatencyEstimator, Unstructured, layer_table
from lightning_prune.latency.roofline import RooflineCost
from lightning_prune.zoo import CIFARResNet

DEVICES = Path(__file__).parents[1] / "configs" / "devices"
ANALYTIC = [
    "compressed_weights_npu",
    "microcontroller",
    "nvidia_a100",
    "phone_cpu",
    "zero_skipping_accelerator",
]


def device(name: str) -> DeviceProfile:
    return DeviceProfile.load(DEVICES / f"{name}.json")


def estimator(name: str, model: nn.Module, example: Tensor) -> LatencyEstimator:
    return LatencyEstimator(layer_table(model, example), device(name))


def seconds(estimator: LatencyEstimator, sparsity: float, pattern: object = Unstructured()) -> float:
    at = torch.full((len(estimator.table),), sparsity, dtype=torch.float64)
    return float(estimator.latency_s(at, pattern))  # type: ignore[arg-type]


def convolution() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(128, 128, 3, padding=1), torch.zeros(1, 128, 28, 28)


def test_every_file_is_named_and_loads() -> None:
    explained = (DEVICES / "README.md").read_text()
    for path in DEVICES.glob("*.json"):
        profile = DeviceProfile.load(path)
        if profile.machine.kind == "analytic":
            assert path.stem in ANALYTIC
            assert profile.costs
    assert set(re.findall(r"^\| `(\w+)` \|", explained, re.MULTILINE)) >= set(ANALYTIC)


@pytest.mark.parametrize("name", ANALYTIC)
def test_a_file_is_what_saving_it_gives(name: str, tmp_path: Path) -> None:
    profile = device(name)
    profile.save(tmp_path / "saved.json")
    assert DeviceProfile.load(tmp_path / "saved.json") == profile
    assert profile.machine.kind == "analytic"
    bits = {cost.bits for cost in profile.costs.values() if isinstance(cost, RooflineCost)}
    assert bits == {torch.empty((), dtype=profile.machine.torch_dtype).element_size() * 8}


@pytest.mark.parametrize("name", ANALYTIC)
@pytest.mark.parametrize("pattern", [Unstructured(), Filter(), Block(4, 4), NM(2, 4)], ids=str)
def test_more_zeros_never_take_longer(name: str, pattern: object) -> None:
    network = estimator(name, CIFARResNet(), torch.zeros(1, 3, 32, 32))
    times = [seconds(network, sparsity, pattern) for sparsity in (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)]
    assert all(math.isfinite(time) and time > 0 for time in times)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(times))


def test_the_accelerator_skips_every_zero() -> None:
    network = estimator("zero_skipping_accelerator", *convolution())
    dense = seconds(network, 0.0)
    assert dense == pytest.approx(network.table.total_macs / (0.79 * 1.024e12))
    for sparsity in (0.5, 0.8):  # compute-bound up to there: half the nonzeros take half the time
        assert seconds(network, sparsity) == pytest.approx((1 - sparsity) * dense)
        for pattern in (Filter(), Block(4, 4), NM(2, 4)):
            if sparsity == 0.5 or not isinstance(pattern, NM):
                assert seconds(network, sparsity, pattern) == pytest.approx((1 - sparsity) * dense, rel=0.01)
    # A linear layer at batch 1 waits for its compressed weights: 20 bits each.
    linear = estimator("zero_skipping_accelerator", nn.Linear(1024, 1024), torch.zeros(1, 1024))
    assert seconds(linear, 0.5) == pytest.approx((2**19 * 20 / 8 + 2 * 1024 * 2) / 50e9)


def test_the_npu_gains_only_where_it_waits_for_weights() -> None:
    linear = estimator("compressed_weights_npu", nn.Linear(1024, 1024), torch.zeros(1, 1024))
    assert seconds(linear, 0.0) == pytest.approx((2**20 + 2048) / 3.75e9)
    assert seconds(linear, 0.2) == pytest.approx(seconds(linear, 0.0))  # 12 bits for each of 80 %: stored plainly
    assert seconds(linear, 0.5) == pytest.approx((2**19 * 1.5 + 2048) / 3.75e9)
    busy = estimator("compressed_weights_npu", *convolution())
    assert seconds(busy, 0.9) == seconds(busy, 0.0) == pytest.approx(busy.table.total_macs / (0.75 * 512e9))
    assert seconds(busy, 0.5, Filter()) == pytest.approx(0.5 * seconds(busy, 0.0), rel=0.01)


def test_two_of_four_help_the_gpu_and_nothing_else_does() -> None:
    gpu = estimator("nvidia_a100", nn.Linear(8192, 8192), torch.zeros(8192, 8192))
    dense = seconds(gpu, 0.0)
    assert dense == pytest.approx(8192**3 / (0.8 * 156e12) + 5e-6)
    assert (seconds(gpu, 0.5, NM(2, 4)) - 5e-6) * 1.625 == pytest.approx(dense - 5e-6)
    assert gpu.kernels[int(gpu.best_kernels(torch.tensor([0.5]), NM(2, 4)))] == "2:4"
    for pattern in (Unstructured(), Block(4, 4), NM(1, 4)):
        assert seconds(gpu, 0.5, pattern) == pytest.approx(dense)
    assert seconds(gpu, 0.25, NM(2, 4)) == pytest.approx(dense)  # a group with three left is none of the pattern
    assert seconds(gpu, 0.5, Filter()) == pytest.approx((dense - 5e-6) / 2 + 5e-6)
    # Weights that nobody shares: half of them and 2 bits beside each are moved, however few are not zero.
    small = estimator("nvidia_a100", nn.Linear(4096, 4096), torch.zeros(1, 4096))
    expected = (4096**2 / 2 * 18 / 8 + 2 * 4096 * 2) / 1.555e12 + 5e-6
    assert seconds(small, 0.5, NM(2, 4)) == seconds(small, 0.8, NM(2, 4)) == pytest.approx(expected)


def test_launches_limit_what_small_layers_gain() -> None:
    gpu = estimator("nvidia_a100", CIFARResNet(), torch.zeros(1, 3, 32, 32))
    assert seconds(gpu, 0.0) < 1.3 * len(gpu.table) * 5e-6
    assert bool(gpu.break_even(NM(2, 4)).isinf().all())


def test_the_phone_gains_what_sparse_kernels_were_reported_to() -> None:
    phone = estimator("phone_cpu", nn.Conv2d(256, 256, 1), torch.zeros(1, 256, 14, 14))
    assert seconds(phone, 0.0) / seconds(phone, 0.8) == pytest.approx(0.35 / 0.8 / 0.2)
    assert float(phone.break_even()) == pytest.approx(0.57, abs=0.02)


def test_the_microcontroller_takes_as_long_as_was_published() -> None:
    class Published(nn.Module):  # the CIFAR-10 network of the CMSIS-NN paper: 24.7 M operations in 99.1 ms
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(i, o, 5, padding=2) for i, o in ((3, 32), (32, 32), (32, 64)))
            self.classifier = nn.Linear(1024, 10)

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.convs:
                x = nn.functional.max_pool2d(conv(x).relu(), 2)
            return self.classifier(x.flatten(1))  # type: ignore[no-any-return]

    small = estimator("microcontroller", Published(), torch.zeros(1, 3, 32, 32))
    assert 2 * small.table.total_macs == pytest.approx(24.7e6, rel=0.01)
    assert seconds(small, 0.0) == pytest.approx(99.1e-3, rel=0.03)
    assert seconds(small, 0.9) == pytest.approx(seconds(small, 0.0) * 0.29, rel=0.02)


@pytest.mark.parametrize("skips", ["filter", "block4", "unstructured", "nothing"])
def test_compressed_weights_are_what_is_computed(skips: str) -> None:
    cost = RooflineCost("slow memory", 1e15, 1e6, skips=skips, stores="compressed", bits=8)
    profile = device("microcontroller")
    network = LatencyEstimator(
        layer_table(nn.Linear(64, 64), torch.zeros(1, 64)), DeviceProfile(profile.machine, {"slow memory": cost})
    )
    stored = {"filter": 1.0, "block4": 1 - 0.5**16, "unstructured": 0.5, "nothing": 0.5}[skips]
    assert seconds(network, 0.5) == pytest.approx((stored * 4096 + 128) / 1e6, rel=1e-3)


@pytest.mark.parametrize("name", ["amd_epyc_avx512_1_thread", "amd_epyc_avx2_1_thread"])
def test_a_measured_file_answers_for_networks_that_it_never_saw(name: str) -> None:
    profile = DeviceProfile.load(DEVICES / f"{name}.json")
    assert profile.machine.kind == "cpu"
    assert profile.machine.threads == 1
    assert profile.held_out["csr"].shapes >= 300
    assert ("simd" in profile.costs) == (name == "amd_epyc_avx2_1_thread")
    network = nn.Sequential(nn.Linear(784, 700), nn.ReLU(), nn.Linear(700, 10))
    latency = LatencyEstimator(layer_table(network, torch.zeros(32, 784)), profile)
    assert not latency.fixed_is_measured
    assert 0 < seconds(latency, 0.95) < seconds(latency, 0.0) < 0.1
