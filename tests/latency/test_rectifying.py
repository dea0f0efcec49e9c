"""ReLUs that kernels do by themselves: how long they take, and that estimates leave them out."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import DeviceProfile, LatencyEstimator
from lightning_prune.kernel_choice import Choice
from lightning_prune.kernels import Dense, Occupancy, Workload, measured_occupancy
from lightning_prune.latency.fitted import FamilyFit, FittedCost
from lightning_prune.latency.profile import digest
from lightning_prune.latency.rectifying import rectifier_seconds
from lightning_prune.preparation import Prepared
from tests.latency.profiles import FAMILIES, MACHINE, Counted, hand_made, mlp, record


class Slow(nn.Module):
    """Moves a clock that stands still otherwise."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds
        return x


@pytest.mark.parametrize("inplace", [False, True])
def test_only_the_relu_behind_a_named_layer_counts(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    takes = iter((9.0, 5.0, 7.0) * 3)
    relu_forward = nn.ReLU.forward

    def forward(self: nn.ReLU, x: Tensor) -> Tensor:
        clock[0] += next(takes)
        return relu_forward(self, x)

    monkeypatch.setattr(nn.ReLU, "forward", forward)
    relu = nn.ReLU(inplace)  # one module for all three
    model = nn.Sequential(
        nn.Linear(2, 2), relu, nn.Linear(2, 2), relu, Slow(clock, 100.0), relu, nn.Linear(2, 2), Slow(clock, 50.0)
    )
    found = rectifier_seconds(model, ["0", "2", "6"], lambda: model(torch.zeros(1, 2)), rounds=2)
    assert found == {"0": 9.0, "2": 5.0}  # 4 is no layer and 6 meets no ReLU
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_least_of_the_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    takes = iter((3.0, 2.0, 4.0, 8.0))

    def forward(self: nn.ReLU, x: Tensor) -> Tensor:
        clock[0] += next(takes)
        return x

    monkeypatch.setattr(nn.ReLU, "forward", forward)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert rectifier_seconds(model, ["0"], lambda: model(torch.zeros(1, 2)), rounds=3) == {"0": 2.0}


def test_hooks_go_whatever_happens() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rectifier_seconds(model, ["0"], interrupted, rounds=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Rectifying(Counted):
    rectifies = True


def test_estimates_leave_out_what_a_kernel_does_by_itself() -> None:
    table, networks = record(*mlp())
    source = digest(table)
    first, second, third = table.names
    kernels = (Rectifying("rectifying"), Counted("plain"))
    fits = {name: FamilyFit({"calls": 1e-5}, None) for name in FAMILIES}
    dense = hand_made(kernels=(Dense(), Dense("nhwc"))).costs
    costs = {**dense, **{kernel.name: FittedCost(kernel, fits, []) for kernel in kernels}}
    saved = replace(networks[source], rectifiers_s={"nchw": {first: 4e-6, second: 1.0}, "nhwc": {third: 4e-6}})
    before, after = (
        LatencyEstimator(table, DeviceProfile(MACHINE, costs, (), {source: each})) for each in (networks[source], saved)
    )
    half = torch.full((3,), 0.5, dtype=torch.float64)
    old, new = before.kernel_latency_s(half), after.kernel_latency_s(half)
    row = after.kernels.index("rectifying")
    others = [k for k in range(len(after.kernels)) if k != row]
    assert torch.equal(old[:, others], new[:, others])
    assert old[:, row].tolist() == pytest.approx([1e-5] * 3)
    # The second is not below a fifth, however long its ReLU was. Linear layers run alike in both layouts.
    assert new[:, row].tolist() == pytest.approx([6e-6, 2e-6, 6e-6])
    cost = after.profile.costs["rectifying"]
    assert float(after.rectified(torch.tensor(1e-5), third, cost, "nchw")) == pytest.approx(1e-5)
    assert float(before.rectified(torch.tensor(1e-5), first, cost, "nchw")) == pytest.approx(1e-5)


def test_networks_that_were_not_calibrated_save_nothing() -> None:
    table, _ = record(*mlp())
    cost = FittedCost(Rectifying(), {"linear": FamilyFit({"calls": 1e-5}, None)}, [])
    profile = DeviceProfile(MACHINE, {"rectifying": cost})
    estimator = LatencyEstimator(table, profile)
    assert estimator.network is None
    seconds = cost.seconds(Workload("linear", 1, 8, 8), _left())
    assert torch.equal(estimator.rectified(seconds, table.names[0], cost, "nchw"), seconds)


def _left() -> Occupancy:
    return measured_occupancy(torch.ones(8, 8))


def test_layers_of_accelerated_networks_too() -> None:
    model, example = mlp()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data[::2] = 0.0
    table, networks = record(model, example)
    source, kernel = digest(table), Rectifying("rectifying")
    costs = {
        **hand_made(kernels=(Dense(), Dense("nhwc"))).costs,
        "rectifying": FittedCost(kernel, {"linear": FamilyFit({"calls": 1e-5}, None)}, []),
    }
    networks[source] = replace(networks[source], rectifiers_s={"nchw": dict.fromkeys(table.names, 4e-6)})
    choice = Choice(Prepared.of(model, example), (kernel,), DeviceProfile(MACHINE, costs, (), networks), 1)
    found = {name: choice._estimate(name, kernel, "nchw") for name in ("0", "2", "4")}
    assert found == pytest.approx({"0": 6e-6, "2": 6e-6, "4": 1e-5})  # behind the last one there is none
    assert choice._estimate("0", Dense(), "nchw") == pytest.approx(2e-6 + 5e-11 * 4 * 64 * 96)
