"""Networks and profiles made by hand, for tests that need no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.kernels import BSR, CSR, LAYOUTS, Dense, LayerKernel, Occupancy, Shrunk, Workload
from lightning_prune.kernels.workload import runnable, workloads
from lightning_prune.latency.fitted import FamilyFit, FittedCost
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement
from lightning_prune.latency.producers import producers
from lightning_prune.latency.profile import DeviceProfile, NetworkRecord, digest
from lightning_prune.layers import LayerTable, layer_table

MACHINE = Machine("cpu", "a processor", 1, "float32", {"torch": "2.9.0", "lightning-prune": "0.1"})
FAMILIES = ("linear", "convolution", "pointwise", "grouped")
HAND_MADE: tuple[LayerKernel, ...] = (Dense(), Dense("nhwc"), CSR(), BSR(4), Shrunk(), Shrunk("nhwc"))


class Residual(nn.Module):
    """A stem, two blocks that add up, a depthwise one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.point = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        x = torch.relu(self.point(torch.relu(self.depthwise(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def residual() -> tuple[Residual, Tensor]:
    torch.manual_seed(0)
    return Residual().eval(), torch.randn(2, 3, 8, 8)


def mlp() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 8)), torch.ones(
        4, 64
    )


def hand_made(
    networks: Mapping[str, NetworkRecord] | None = None, kernels: Iterable[LayerKernel] = HAND_MADE
) -> DeviceProfile:
    """Fitted costs whose coefficients are not from a fit."""
    speeds: dict[str, dict[str, float]] = {
        "dense": {"calls": 2e-6, "macs": 5e-11, "native_macs": 5e-11, "onednn_macs": 4e-11},
        "dense-nhwc": {"calls": 2e-6, "macs": 6e-11, "native_macs": 5e-11, "onednn_macs": 4.4e-11},
        "csr": {"calls": 4e-6, "macs": 2e-10, "patches": 1e-11},
        "bsr-4": {"calls": 5e-6, "macs": 7e-11, "patches": 1e-11},
        "shrunk": {"calls": 3e-6, "macs": 5e-11, "native_macs": 5e-11, "onednn_macs": 4e-11, "filled": 1e-11},
        "shrunk-nhwc": {"calls": 3e-6, "macs": 6e-11, "native_macs": 5e-11, "onednn_macs": 4e-11, "gathered": 1e-11},
    }
    costs = {
        kernel.name: FittedCost(kernel, {name: FamilyFit(speeds[kernel.name], None) for name in FAMILIES}, [])
        for kernel in kernels
    }
    return DeviceProfile(MACHINE, costs, (), networks or {})


def record(model: nn.Module, example: Any, fixed_s: float = 1e-4) -> tuple[LayerTable, dict[str, NetworkRecord]]:
    """The table of a network, and what calibration would learn of it beside its layers' times."""
    table = layer_table(model, example)
    works = runnable(table)
    layers: dict[str, Any] = {name: model.get_submodule(name.rpartition(".")[0]) for name in works}
    return table, {
        digest(table): NetworkRecord(
            "by hand",
            tuple(works),
            sum(work.output_elements for calls in works.values() for work in calls),
            dict.fromkeys(LAYOUTS, fixed_s),
            dict.fromkeys(LAYOUTS, 10 * fixed_s),
            dict.fromkeys(LAYOUTS, 10 * fixed_s - fixed_s),
            {},
            producers(model, example, layers),
        )
    }


class Counted(LayerKernel):
    """A user's own kernel: the layer itself, with a time that is known."""

    def __init__(self, name: str = "counted", factor: float = 1.0) -> None:
        self._name, self.factor = name, factor

    @property
    def name(self) -> str:
        return self._name

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        return Dense().build(layer)

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        return {"calls": 1.0, "macs": left.density * work.macs, "written": float(work.output_elements)}

    def coordinates(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        return {**super().coordinates(work, left), "density": left.density}

    def true_s(self, work: Workload, sparsity: float) -> float:
        return self.factor * (3e-6 + 2e-10 * (1.0 - sparsity) * work.macs + 1e-10 * work.output_elements)

    def measured(self, works: Iterable[Workload], sparsities: Iterable[float], source: str = "x") -> list[Measurement]:
        return [
            Measurement(self.name, work, sparsity, 1.0, self.true_s(work, sparsity), 0.0, source)
            for work in works
            for sparsity in sparsities
        ]


def workload_of(layer: nn.Module, x: torch.Tensor) -> Workload:
    """The call that a Linear or Conv2d makes on an input."""
    (spec,) = layer_table(layer, x)
    return workloads(spec)[0]


def with_machine(profile: DeviceProfile, **changes: Any) -> DeviceProfile:
    """The same for a machine that differs in some fields."""
    return replace(profile, machine=replace(profile.machine, **changes))
