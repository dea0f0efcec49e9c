"""Estimated latency of a network while its masks change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.latency.estimator import LatencyEstimator
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.layers import LayerTable
from lightning_prune.metrics import Count

TAGS = ("latency/estimated_ms", "latency/dense_ms", "latency/speedup")


class Latency:
    """The scalars that `SparsityMonitor` logs when it has a device profile, of this or any other device.

    Args:
        profile: of the device.
        table: of the network, at the batch size of its example.

    Raises:
        ValueError: the profile knows no kernel for a layer.
    """

    def __init__(self, profile: DeviceProfile, table: LayerTable) -> None:
        self.estimator = LatencyEstimator(table, profile)
        self.calls = table[0].calls

    def scalars(self, counts: Mapping[str, Count], granularities: Mapping[str, Granularity]) -> dict[str, float]:
        """Tag -> value, from the zeros that are really there.

        Args:
            counts: of every parameter.
            granularities: patterns in which parameters are pruned; zeros elsewhere lie anywhere.
        """
        names = self.estimator.table.names
        patterns = tuple(granularities.get(name, Unstructured()) for name in names)
        sparsity = torch.tensor([counts[name].sparsity for name in names], dtype=torch.float64)
        now_s, dense_s = float(self.estimator.latency_s(sparsity, patterns)), self.estimator.dense_latency_s
        return dict(zip(TAGS, (now_s * 1e3, dense_s * 1e3, dense_s / now_s), strict=True))

    def line(self, scalars: Mapping[str, float]) -> str:
        """What the estimate says, in words."""
        machine = self.estimator.profile.machine
        now_ms, dense_ms, speedup = (scalars[tag] for tag in TAGS)
        shape = "x".join(map(str, self.calls[0].input_shape))
        where = f"{machine.device} ({machine.threads} thread(s), {machine.dtype}, first input {shape})"
        return f"estimated latency on {where}: {now_ms:.4g} ms, dense {dense_ms:.4g} ms, {speedup:.2f}x"


def settings_of(profile: DeviceProfile) -> dict[str, Any]:
    """Hyperparameters that name the device of a profile."""
    machine = profile.machine
    return {"device": machine.device, "kind": machine.kind, "threads": machine.threads, "dtype": machine.dtype}
