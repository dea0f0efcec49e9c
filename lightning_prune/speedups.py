"""How much faster each layer becomes with sparsity, by the estimate, and from which sparsity that pays."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.latency.estimator import LatencyEstimator

_GRID = (*(step / 100 for step in range(100)), 0.995)


@dataclass(frozen=True)
class SpeedupCurve:
    """The estimate of one layer.

    Args:
        layer: name of its weight.
        dense_s: without zeros.
        sparsities: fractions removed, ascending.
        speedups: dense time over the time of the fastest kernel, at each of them.
        pays_from: sparsity from which the layer is faster than dense; infinite if it never is.
    """

    layer: str
    dense_s: float
    sparsities: tuple[float, ...]
    speedups: tuple[float, ...]
    pays_from: float

    def at(self, sparsity: float) -> float:
        """The speedup at the nearest of `sparsities`."""
        nearest = min(range(len(self.sparsities)), key=lambda i: abs(self.sparsities[i] - sparsity))
        return self.speedups[nearest]


def speedup_curves(
    estimator: LatencyEstimator,
    granularity: Granularity = Unstructured(),  # noqa: B008  frozen
) -> tuple[SpeedupCurve, ...]:
    """One curve per layer that kernels run, in the memory layout that suits the dense network.

    Args:
        estimator: of the network.
        granularity: the pattern of the zeros.

    >>> from lightning_prune import DeviceProfile, layer_table
    >>> from lightning_prune.latency.machine import Machine
    >>> from lightning_prune.latency.roofline import RooflineCost
    >>> skipping = RooflineCost("skipping", macs_per_s=1e9, bandwidth_bytes_per_s=1e12, skips="unstructured")
    >>> profile = DeviceProfile(Machine("analytic", "example", 1, "float32"), {"skipping": skipping})
    >>> table = layer_table(torch.nn.Linear(1000, 1000), torch.ones(1, 1000))
    >>> [curve] = speedup_curves(LatencyEstimator(table, profile))
    >>> round(curve.at(0.5), 2), round(curve.pays_from, 2)
    (2.0, 0.02)
    """
    least, dense = estimator.pruned_alone_s(torch.tensor(_GRID, dtype=torch.float64), granularity)
    pays_from = estimator.break_even(granularity).tolist()
    return tuple(
        SpeedupCurve(spec.name, float(dense[row]), _GRID, tuple((dense[row] / least[:, row]).tolist()), pays_from[row])
        for row, spec in enumerate(estimator.table)
        if dense[row] > 0  # otherwise its time is part of the fixed part
    )
