"""Measures the layers of a network, kernel by kernel, in full passes of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.kernels import Dense, LayerKernel, Workload
from lightning_prune.latency.context import Pass, TimedLayer, overhead_s, passes_of, timed_passes
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement
from lightning_prune.latency.pace import Pace
from lightning_prune.latency.timing import AGREEMENT
from lightning_prune.latency.variants import Point, points, pruned
from lightning_prune.preparation import put

Layers = Mapping[str, tuple[nn.Linear | nn.Conv2d, tuple[Workload, ...]]]
"""Module name -> the layer and the calls that one pass makes of it."""


@dataclass(frozen=True)
class Passes:
    """What full passes with one kernel gave.

    Args:
        measurements: per layer call and variant.
        dense_s: per layer call, the least time of the dense layer in the same passes.
        shares: per variant, the layers' least times added up, and the least time of a pass, as shares of those of the
            dense passes beside it.
        rest_s: what of the dense passes is not spent in layers: the least, the timing's own share taken off.
        quiet: whether the process had its core to itself.
    """

    measurements: tuple[Measurement, ...]
    dense_s: Mapping[Workload, float]
    shares: tuple[tuple[float, float], ...]
    rest_s: float
    quiet: bool


def measure_kernel(
    kernel: LayerKernel,
    model: nn.Module,
    layers: Layers,
    run: Callable[[], Any],
    *,
    source: str,
    rounds: int,
    machine: Machine,
    pace: Pace,
    advance: Callable[[float], None] = lambda share: None,
) -> Passes:
    """Time a kernel, and the dense layers beside it, on every layer of a model that it can run.

    Args:
        kernel: to be timed.
        model: holds the layers; they are replaced while this runs and put back.
        layers: those to be timed, dense, in the layout of the kernel.
        run: makes one pass of the model.
        source: as for `Measurement`.
        rounds: how often each variant runs.
        machine: that this is.
        pace: of its processor.
        advance: told after each pass what share of the passes it was.
    """
    device = torch.device(machine.kind)
    generator = torch.Generator().manual_seed(0)
    timed: dict[str, TimedLayer] = {}
    places: dict[str, tuple[Point, ...]] = {}
    for name, (layer, works) in layers.items():
        variants: list[nn.Module] = []
        if not any(kernel.refuses(work, machine.torch_dtype, device) for work in works):
            places[name] = () if isinstance(kernel, Dense) else points(kernel, works[0])
            variants = [kernel.sample(pruned(layer, kernel.granularity, place, generator)) for place in places[name]]
        timed[name] = TimedLayer([layer, *variants], device)
    if not places:
        advance(1.0)
        return Passes((), {}, (), math.nan, True)
    passes: list[Pass] = []
    with torch.inference_mode(), replaced(model, timed):
        total = passes_of(list(timed.values()), rounds)
        for one in timed_passes(list(timed.values()), run, rounds, pace):
            passes.append(one)
            advance(1.0 / total)
    measurements: list[Measurement] = []
    dense_s: dict[Workload, float] = {}
    for name, where in places.items():
        works = layers[name][1]
        dense, *sparse = timed[name].seconds
        for work, times in zip(works, dense, strict=True):
            dense_s[work] = dense_s.get(work, 0.0) + min(times)
        for place, calls in zip(where or ((0.0, 1.0),), sparse or [dense], strict=True):
            for work, times in zip(works, calls, strict=True):
                scatter = statistics.median(times) / min(times) - 1.0
                measurements.append(Measurement(kernel.name, work, *place, min(times), scatter, source))
    wall = sum(one.whole.wall_s[0] for one in passes)
    thread = sum(one.whole.thread_s[0] for one in passes)
    single = machine.kind == "cpu" and machine.threads == 1
    clock_s = overhead_s(device) * sum(len(works) for _, works in layers.values())
    outside = min(one.whole.wall_s[0] - one.layers_s for one in passes if one.number == 0)
    return Passes(
        tuple(measurements),
        dense_s,
        _shares(passes, list(timed.values()), clock_s),
        outside - clock_s,
        not single or wall - thread <= AGREEMENT * wall,
    )


def _shares(passes: Sequence[Pass], layers: Sequence[TimedLayer], clock_s: float) -> tuple[tuple[float, float], ...]:
    """How layers' time, and that of a pass without its clocks, differ from the dense pass for each other variant."""
    whole: dict[int, float] = {}
    for one in passes:
        whole[one.number] = min(one.whole.wall_s[0] - clock_s, whole.get(one.number, math.inf))
    inside = {
        number: sum(min(times) for layer in layers for times in layer.seconds[number % len(layer.variants)])
        for number in whole
    }
    dense_s, dense_layers_s = whole.pop(0), inside.pop(0)
    if dense_s <= 0 or dense_layers_s <= 0:  # an empty pass, shorter than its clocks
        return ()
    return tuple((inside[number] / dense_layers_s, max(whole[number], 0.0) / dense_s) for number in whole)


class replaced:
    """A context in which modules stand in the places of a model's layers.

    Args:
        model: whose layers are put back at the end.
        modules: by the name of the layer.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.model, self.modules = model, modules
        self.before: dict[str, nn.Module] = {}

    def __enter__(self) -> None:
        """Replace."""
        self.before = {name: self.model.get_submodule(name) for name in self.modules}
        for name, module in self.modules.items():
            put(self.model, name, module)

    def __exit__(self, *_: object) -> None:
        """Put back."""
        for name, module in self.before.items():
            put(self.model, name, module)
