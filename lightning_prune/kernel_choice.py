"""Which kernel each layer of a network is fastest with: by the estimate, near-ties by time, the whole by a race."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.kernel_report import KernelReport, LayerReport
from lightning_prune.kernels import CHWN, LAYOUTS, NCHW, Dense, LayerKernel, measured_occupancy
from lightning_prune.latency.context import TimedLayer, timed_passes
from lightning_prune.latency.estimator import MARGIN, LatencyEstimator
from lightning_prune.latency.fitted import FittedCost
from lightning_prune.latency.passes import replaced
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.latency.race import race
from lightning_prune.latency.timing import synchroniser
from lightning_prune.preparation import Prepared, inputs_in_layout, placement, run_in_layout

_NEAR = 1.15
"""Kernels estimated to take at most this much longer than the best are timed beside it."""


@dataclass
class Candidate:
    """A whole network with its kernels."""

    network: nn.Module
    layout: str
    kernels: Mapping[str, LayerKernel]
    seconds: float = math.nan

    def run(self, inputs: Any) -> Any:
        with torch.inference_mode():
            return run_in_layout(self.network, inputs, self.layout)


class Choice:
    """Finds the fastest kernels for a prepared network."""

    def __init__(
        self, prepared: Prepared, kernels: Sequence[LayerKernel], profile: DeviceProfile | None, rounds: int
    ) -> None:
        self.prepared, self.kernels, self.profile, self.rounds = prepared, kernels, profile, rounds
        self.inputs, self.layers, self.works = prepared.inputs, prepared.layers, prepared.works
        self.device, self.dtype = placement(prepared.model)
        self.estimator = None if profile is None else LatencyEstimator(prepared.table, profile)
        known = LAYOUTS if self.estimator is None else self.estimator.layouts
        self.layouts = tuple(layout for layout in prepared.layouts(kernels) if layout in known)
        self.dense_s = math.nan

    def fastest(self) -> Candidate:
        """The fastest of the dense networks and the best sparse one of each layout, all executed."""
        # With the batch last, dense layers copy from and to what PyTorch takes.
        candidates = {f"dense-{layout}": self.dense(layout) for layout in self.layouts if layout != CHWN}
        for layout in self.layouts:
            chosen = self._chosen(layout)
            own = layout != CHWN or any(kernel.layout == CHWN and kernel.uses_sparsity for kernel in chosen.values())
            if own and not plain_kernels(chosen):
                candidates[f"sparse-{layout}"] = self._assembled(layout, chosen)
        handicaps = {name: MARGIN for name, candidate in candidates.items() if plain_kernels(candidate.kernels)}
        found = race({name: self._runner(candidate) for name, candidate in candidates.items()}, handicaps)
        for name, seconds in found.best_s.items():
            candidates[name].seconds = seconds
        self.dense_s = min(c.seconds for name, c in candidates.items() if name.startswith("dense"))
        return candidates[found.winner]

    def _runner(self, candidate: Candidate) -> Callable[[], None]:
        inputs, synchronise = inputs_in_layout(self.inputs, NCHW), synchroniser(self.device)

        def run() -> None:
            candidate.run(inputs)
            synchronise()

        return run

    def dense(self, layout: str) -> Candidate:
        """The network without sparse kernels."""
        return self._assembled(layout, {name: self.prepared.dense_kernel(name, layout) for name in self.layers})

    def report(self, best: Candidate, error: float) -> KernelReport:
        """What was chosen, with the times of each layer in passes of the chosen and of the dense network."""
        dense = self.dense(NCHW if best.layout == CHWN else best.layout)
        chosen_s, dense_s = self._in_context(best), self._in_context(dense)
        pays = self.estimator.break_even() if self.estimator is not None else None
        rows = []
        estimated = math.nan
        if self.estimator is not None and best.kernels:
            estimated = 0.0
        for name, layer in self.layers.items():
            kernel = best.kernels.get(name)
            seconds = math.nan if kernel is None else self._estimate(name, kernel, best.layout)
            estimated += seconds
            row = self.prepared.table.names.index(f"{name}.weight")
            rows.append(
                LayerReport(
                    f"{name}.weight",
                    float((layer.weight == 0).double().mean()),
                    "dense" if kernel is None else kernel.name,
                    seconds,
                    chosen_s[name],
                    dense_s[name],
                    math.nan if pays is None else float(pays[row]),
                )
            )
        if self.estimator is not None:
            estimated = self.estimator.whole_s(estimated, best.layout)
        return KernelReport(tuple(rows), best.layout, estimated, best.seconds, self.dense_s, error)

    def _assembled(self, layout: str, chosen: Mapping[str, LayerKernel]) -> Candidate:
        return Candidate(self.prepared.network(layout, chosen), layout, dict(chosen))

    def _usable(self, name: str, layout: str) -> list[LayerKernel]:
        """Kernels that run a layer in a layout, the dense one first."""
        dense = self.prepared.dense_kernel(name, layout)
        others = [
            kernel
            for kernel in self.kernels
            if (kernel.uses_sparsity if kernel.exact else name in self.prepared.steps)
            and (kernel.layout == layout or (kernel.layout == NCHW and isinstance(self.layers[name], nn.Linear)))
            and not any(kernel.refuses(work, self.dtype, self.device) for work in self.works[name])
            and self.prepared.kernel_for(name, kernel).refuses_weight(self.layers[name].weight) is None
        ]
        return [dense, *others]

    def _chosen(self, layout: str) -> dict[str, LayerKernel]:
        """The fastest kernel of each layer: by the estimate, near-ties by time."""
        rivals: dict[str, list[LayerKernel]] = {}
        for name, layer in self.layers.items():
            usable = self._usable(name, layout)
            if self.profile is None and not (layer.weight == 0).any():
                usable = [kernel for kernel in usable if not kernel.uses_sparsity]
            if self.profile is not None and len(usable) > 1:
                estimates = {kernel: self._estimate(name, kernel, layout) for kernel in usable}
                least = min(value for value in estimates.values() if not math.isnan(value))
                usable = [kernel for kernel in usable if estimates[kernel] <= _NEAR * least]
            rivals[name] = usable
        contested = {name: kernels for name, kernels in rivals.items() if len(kernels) > 1}
        chosen = {name: kernels[0] for name, kernels in rivals.items()}
        if contested:
            times = self._contest(layout, chosen, contested)
            for name, kernels in contested.items():
                dense_first = [
                    seconds * (MARGIN if isinstance(kernel, Dense) else 1.0)
                    for kernel, seconds in zip(kernels, times[name], strict=True)
                ]
                chosen[name] = kernels[dense_first.index(min(dense_first))]
        return chosen

    def _contest(
        self, layout: str, chosen: Mapping[str, LayerKernel], contested: Mapping[str, Sequence[LayerKernel]]
    ) -> dict[str, list[float]]:
        """Least seconds of rival kernels, timed in passes in which the other layers vary too."""
        candidate = self._assembled(layout, chosen)
        timed = {
            name: TimedLayer([self.prepared.built(name, kernel) for kernel in kernels], self.device)
            for name, kernels in contested.items()
        }
        with replaced(candidate.network, timed):
            for _ in timed_passes(list(timed.values()), lambda: candidate.run(self.inputs), self.rounds):
                pass
        return {name: [sum(min(times) for times in calls) for calls in layer.seconds] for name, layer in timed.items()}

    def _in_context(self, candidate: Candidate) -> dict[str, float]:
        """Least seconds of each layer in passes of a network."""
        if not self.layers:
            return {}
        timed = {name: TimedLayer([candidate.network.get_submodule(name)], self.device) for name in self.layers}
        with replaced(candidate.network, timed):
            for _ in timed_passes(list(timed.values()), lambda: candidate.run(self.inputs), self.rounds):
                pass
        return {name: sum(min(times) for times in layer.seconds[0]) for name, layer in timed.items()}

    def _estimate(self, name: str, kernel: LayerKernel, layout: str) -> float:
        """Seconds of a layer as it is; NaN if the profile does not know the kernel."""
        cost = self.profile.costs.get(kernel.name) if self.profile is not None else None
        if self.profile is None or not isinstance(cost, FittedCost):
            return math.nan
        if any(self.profile.refuses(cost, work) for work in self.works[name]):
            return math.nan
        left = measured_occupancy(self.layers[name].weight)
        source = self.estimator.source if self.estimator is not None else None
        seconds = torch.stack([cost.seconds(work, left, source) for work in self.works[name]]).sum()
        if self.estimator is not None and self.prepared.rectifies(name, kernel):
            seconds = self.estimator.rectified(seconds, f"{name}.weight", cost, layout)
        return float(seconds)


def plain_kernels(kernels: Mapping[str, LayerKernel]) -> bool:
    """Whether all layers run dense and in floating point."""
    return all(isinstance(kernel, Dense) for kernel in kernels.values())
