"""The cost of every layer of a network with every kernel, as curves over sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.granularities import NM, Filter, Granularity, Unstructured
from lightning_prune.kernels import NCHW, Workload, expected_occupancy
from lightning_prune.latency.curves import LIVING_KNOTS, SPARSITY_KNOTS, Curves, filter_knots
from lightning_prune.latency.fitted import FittedCost
from lightning_prune.latency.profile import DeviceProfile, NetworkRecord, Producers, digest
from lightning_prune.latency.roofline import RooflineCost
from lightning_prune.layers import LayerTable

MARGIN = 0.98
"""A sparse kernel is taken if it needs at most this share of the dense time; less is within the noise."""

_LEAST_SHARE = 0.2
"""Of a layer's time, which stays however long its ReLU took."""


@dataclass(frozen=True)
class LayoutCurves:
    """What one memory layout costs: of the layers `rows`, with the kernels of these indices."""

    rows: Tensor
    kernels: tuple[int, ...]
    curves: Curves
    unusable: Tensor
    rest_s: float
    rest_share: float

    def times(self, sparsity: Tensor, living: Tensor | None) -> Tensor:
        """`[all layers, n]` -> `[rows, kernels, n]`: seconds, far from the least where a kernel is not usable."""
        return self.curves(sparsity[self.rows], None if living is None else living[self.rows])

    def usable_times(self, sparsity: Tensor, living: Tensor | None) -> Tensor:
        """The same, infinite where a kernel is not usable."""
        times = self.times(sparsity, living)
        return times + self.unusable.to(times.dtype).unsqueeze(2)

    def whole_s(self, least: Tensor) -> Tensor:
        """`[rows, n]` seconds of the layers -> `[n]` of the pass."""
        return least.sum(dim=0).mul_(1.0 + self.rest_share).add_(self.rest_s)


@dataclass(frozen=True)
class Compiled:
    """Curves per layout, rows of layers in the fixed part, and how silent filters thin out inputs."""

    layouts: tuple[LayoutCurves, ...]
    fixed_rows: Tensor
    livings: Callable[[Tensor], Tensor] | None

    def living(self, sparsity: Tensor) -> Tensor | None:
        """Shares of inputs that are not silent, `[layers, n]`; None where nothing falls silent."""
        return None if self.livings is None else self.livings(sparsity)


def rectified(
    seconds: Tensor, network: NetworkRecord | None, name: str, cost: FittedCost | RooflineCost, layout: str
) -> Tensor:
    """Seconds of a layer less those of the ReLU that its kernel does by itself; as `LatencyEstimator.rectified`."""
    if network is None or not isinstance(cost, FittedCost) or not cost.kernel.rectifies:
        return seconds
    saved = network.rectifiers_s.get(layout, {}).get(name, 0.0)
    return (seconds - saved).maximum(_LEAST_SHARE * seconds)


class Compiler:
    """Turns the patterns of a plan into curves.

    Args:
        table: of the network.
        profile: of the machine.
        network: what calibration learned of the network, if it did.
        kernels: names of those that count.
        works: calls of the layers that are not part of the rest of a pass.
    """

    def __init__(
        self,
        table: LayerTable,
        profile: DeviceProfile,
        network: NetworkRecord | None,
        kernels: Sequence[str],
        works: Mapping[str, tuple[Workload, ...]],
    ) -> None:
        self.table, self.profile, self.network = table, profile, network
        self.kernels, self.works, self.source = kernels, works, digest(table)

    def costed(self, name: str, pattern: Granularity) -> list[int]:
        """Kernels that have a cost for every call of a layer with zeros in a pattern."""
        return [
            index
            for index, kernel in enumerate(self.kernels)
            if self.profile.costs[kernel].serves(pattern)
            and not any(self.profile.refuses(self.profile.costs[kernel], work) for work in self.works[name])
        ]

    def fits_layout(self, kernel: str, kind: str, layout: str) -> bool:
        """Whether a kernel runs layers of a kind in networks of a layout."""
        own = self.profile.costs[kernel].layout
        return own is None or own == layout or (kind == "linear" and own == NCHW)

    def __call__(self, patterns: tuple[Granularity, ...], rests: Mapping[str, tuple[float, float]]) -> Compiled:
        """Curves of every layer and kernel.

        Args:
            patterns: per layer of the table.
            rests: per layout that counts, seconds of the rest of a pass, and by which share it grows with the layers'
                time.

        Raises:
            ValueError: no layout has kernels for all layers.
        """
        inputs: dict[str, Producers] = {}
        if self.network is not None and any(not isinstance(p, Unstructured | NM) for p in patterns):
            inputs = {name: groups for name, groups in self.network.producers.items() if name in self.works}
        rows = torch.tensor([row for row, spec in enumerate(self.table) if spec.name in self.works], dtype=torch.int64)
        layouts = []
        for layout in rests:
            usable = [
                [
                    k
                    for k in self.costed(self.table[row].name, patterns[row])
                    if self.fits_layout(self.kernels[k], self.table[row].kind, layout)
                ]
                for row in rows.tolist()
            ]
            if not all(usable):
                continue
            kernels = sorted({k for ks in usable for k in ks})
            knots = torch.stack([self._knots(row, patterns[row]) for row in rows.tolist()]) if len(rows) else None
            values = torch.zeros(0, 1, len(SPARSITY_KNOTS), 1)
            if knots is not None:
                values = torch.stack(
                    [
                        self._values(
                            row, patterns[row], layout, kernels, usable[i], coupled=bool(inputs), knots=knots[i]
                        )
                        for i, row in enumerate(rows.tolist())
                    ]
                )
            infinite = values.isinf().all(dim=3).all(dim=2)
            most = values.masked_fill(values.isinf(), 0.0).amax(dim=(1, 2, 3), keepdim=True)
            values = torch.where(values.isinf(), 2.0 * most, values)  # between finite ones, lines stay lines
            unusable = torch.where(infinite, math.inf, 0.0)
            layouts.append(LayoutCurves(rows, tuple(kernels), Curves(values, knots), unusable, *rests[layout]))
        if not layouts:
            raise ValueError(
                f"the device profile has in no memory layout kernels for all layers with zeros in the patterns "
                f"{sorted({str(pattern) for pattern in patterns})}; calibrate this network with all of KERNELS"
            )
        fixed = torch.tensor([r for r, spec in enumerate(self.table) if spec.name not in self.works], dtype=torch.int64)
        return Compiled(tuple(layouts), fixed, self._livings(inputs, patterns) if inputs else None)

    def _knots(self, row: int, pattern: Granularity) -> Tensor:
        if isinstance(pattern, Filter) and self.table[row].kind == "conv2d":
            return filter_knots(self.table[row].weight_shape[0])
        return torch.tensor(SPARSITY_KNOTS, dtype=torch.float64)

    def _values(
        self,
        row: int,
        pattern: Granularity,
        layout: str,
        kernels: Sequence[int],
        usable: Sequence[int],
        coupled: bool,
        knots: Tensor,
    ) -> Tensor:
        """`[kernels, sparsity knots, living knots]`, infinite for those that are not usable."""
        spec = self.table[row]
        # How many inputs are alive is known on average only: four places around it stand for its distribution.
        living = torch.tensor(LIVING_KNOTS if coupled else (1.0,), dtype=torch.float64)
        inputs = max(work.inputs for work in self.works[spec.name])
        spread = (living * (1.0 - living) / inputs).sqrt()[:, None] * torch.tensor([-1.2, -0.4, 0.4, 1.2])
        living = ((living[:, None] + spread).clamp(0.0, 1.0) * inputs).round().clamp_min(1.0) / inputs
        sparsity = knots[:, None, None].expand(-1, *living.shape)
        left = expected_occupancy(pattern, sparsity, spec.weight_shape, living.expand_as(sparsity))
        rows = []
        for index in kernels:
            if index not in usable:
                rows.append(torch.full(sparsity.shape, math.inf, dtype=torch.float64))
                continue
            cost = self.profile.costs[self.kernels[index]]
            rows.append(
                sum(
                    (
                        cost.seconds(work, left, self.source)
                        if isinstance(cost, FittedCost)
                        else cost.seconds(work, left)
                        for work in self.works[spec.name]
                    ),
                    torch.zeros(sparsity.shape, dtype=torch.float64),
                )
            )
            rows[-1] = rectified(rows[-1], self.network, spec.name, cost, layout)
        times = torch.stack(rows).mean(dim=-1)
        # What is hardly faster than the kernel that looks for no zeros is not faster: of several noisy estimates the
        # least is too low. `accelerate` asks for the same margin.
        costs = [self.profile.costs[self.kernels[index]] for index in kernels]
        plain = [k for k, index in enumerate(kernels) if index in usable and not costs[k].uses_sparsity]
        if plain:
            dense = times[plain].amin(dim=0)
            times = torch.where(times > MARGIN * dense, times.maximum(dense), times)
        return times

    def _livings(
        self, inputs: Mapping[str, Producers], patterns: tuple[Granularity, ...]
    ) -> Callable[[Tensor], Tensor]:
        """Share of living inputs of every layer: `[layers, n]` sparsities -> `[layers, n]`."""
        index = {spec.name: row for row, spec in enumerate(self.table)}
        knots = torch.tensor(SPARSITY_KNOTS, dtype=torch.float64)
        rows = torch.stack(
            [
                expected_occupancy(pattern, knots, spec.weight_shape).rows
                for spec, pattern in zip(self.table, patterns, strict=True)
            ]
        )
        left = Curves(rows[:, None, :, None])
        timed = {spec.name for spec in self.table if spec.name in self.works}

        def living(sparsity: Tensor) -> Tensor:
            result = torch.ones_like(sparsity)
            speaking = left(sparsity)[:, 0].clamp_(0.0, 1.0)
            for row, spec in enumerate(self.table):
                for share, layers in inputs.get(spec.name, ()):
                    if timed.issuperset(layers):
                        silent = torch.stack([1.0 - speaking[index[name]] for name in layers]).prod(dim=0)
                        result[row] -= share * silent
                if spec.groups > 1:
                    speaking[row] *= result[row]
                else:  # an output also falls silent when every input does
                    speaking[row] *= 1.0 - (1.0 - result[row]) ** spec.weight_shape[1]
            return result.clamp_(0.0, 1.0)

        return living
