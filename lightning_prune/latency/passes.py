"""Measures the layers of a network, kernel by kernel, in full passes of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.kernels import LayerKernel, Workload
from lightning_prune.latency.context import TimedLayer, passes_of, timed_passes
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement
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
        quiet: whether the process had its core to itself.
    """

    measurements: tuple[Measurement, ...]
    dense_s: Mapping[Workload, float]
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
        advance: told after each pass what share of the passes it was.
    """
    device = torch.device(machine.kind)
    generator = torch.Generator().manual_seed(0)
    timed: dict[str, TimedLayer] = {}
    places: dict[str, tuple[Point, ...]] = {}
    for name, (layer, works) in layers.items():
        if any(kernel.refuses(work, machine.torch_dtype, device) for work in works):
            continue
        places[name] = points(kernel, works[0]) if kernel.uses_sparsity else ()
        variants = [kernel.build(pruned(layer, kernel.granularity, place, generator)) for place in places[name]]
        timed[name] = TimedLayer([layer, *variants], device)
    if not timed:
        advance(1.0)
        return Passes((), {}, True)
    wall, thread = 0.0, 0.0
    with torch.inference_mode(), replaced(model, timed):
        total = passes_of(list(timed.values()), rounds)
        for pass_ in timed_passes(list(timed.values()), run, rounds):
            wall, thread = wall + pass_.wall_s[0], thread + pass_.thread_s[0]
            advance(1.0 / total)
    measurements: list[Measurement] = []
    dense_s: dict[Workload, float] = {}
    for name, layer in timed.items():
        works = layers[name][1]
        variants_s = list(layer.seconds)
        for work, times in zip(works, variants_s[0], strict=True):
            dense_s[work] = dense_s.get(work, 0.0) + min(times)
        where = places[name] if kernel.uses_sparsity else ((0.0, 1.0),)
        for place, calls in zip(where, variants_s[1:] or variants_s, strict=True):
            for work, times in zip(works, calls, strict=True):
                scatter = statistics.median(times) / min(times) - 1.0
                measurements.append(Measurement(kernel.name, work, *place, min(times), scatter, source))
    single = machine.kind == "cpu" and machine.threads == 1
    return Passes(tuple(measurements), dense_s, not single or wall - thread <= AGREEMENT * wall)


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
