"""Measures the layers of a network, kernel by kernel, in full passes of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.kernels import LayerKernel, Workload
from lightning_prune.latency.context import TimedLayer
from lightning_prune.latency.measurement import Measurement
from lightning_prune.latency.timing import AGREEMENT
from lightning_prune.latency.variants import Point, points, pruned

Layers = Mapping[str, tuple[nn.Linear | nn.Conv2d, tuple[Workload, ...]]]
"""Module name -> the layer and the calls that one pass makes of it."""


@dataclass(frozen=True)
class Passes:
    """What full passes with one kernel gave.

    Args:
        measurements: per layer call and variant.
        quiet: whether the process had its core to itself.
    """

    measurements: tuple[Measurement, ...]
    quiet: bool


def measure_kernel(
    kernel: LayerKernel,
    model: nn.Module,
    layers: Layers,
    run: Callable[[], Any],
    *,
    source: str,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[float], None] = lambda share: None,
) -> Passes:
    """Time a kernel on every layer of a model that it can run.

    Each pass draws a variant for each layer, so that over `rounds` rounds every variant of every layer has run
    equally often, between neighbours that vary.

    Args:
        kernel: to be timed.
        model: holds the layers; they are replaced while this runs and put back.
        layers: those to be timed.
        run: makes one pass of the model.
        source: as for `Measurement`.
        rounds: how often each variant runs.
        dtype: of the weights.
        device: of the weights.
        advance: told after each pass what share of the passes it was.
    """
    generator = torch.Generator().manual_seed(0)
    timed: dict[str, tuple[TimedLayer, tuple[Workload, ...], tuple[Point, ...]]] = {}
    for name, (layer, works) in layers.items():
        if any(kernel.refuses(work, dtype, device) for work in works):
            continue
        places = points(kernel, works[0])
        variants = [kernel.build(pruned(layer, kernel.granularity, place, generator)) for place in places]
        timed[name] = (TimedLayer(variants, device), works, places)
    if not timed:
        advance(1.0)
        return Passes((), True)
    count = max(len(places) for _, _, places in timed.values())
    wall, thread = 0.0, 0.0
    with torch.inference_mode(), replaced(model, {name: layer for name, (layer, _, _) in timed.items()}):
        run()
        for layer, _, _ in timed.values():
            layer.forget()
        for turn in range(count * rounds):
            for shift, (layer, _, _) in enumerate(timed.values()):
                layer.begin(turn + shift)
            wall_start, thread_start = time.perf_counter(), time.thread_time()
            run()
            wall += time.perf_counter() - wall_start
            thread += time.thread_time() - thread_start
            advance(1.0 / (count * rounds))
    single = device.type == "cpu" and torch.get_num_threads() == 1
    measurements = tuple(
        Measurement(kernel.name, work, *place, min(times), statistics.median(times) / min(times) - 1.0, source)
        for layer, works, places in timed.values()
        for place, calls in zip(places, layer.seconds, strict=True)
        for work, times in zip(works, calls, strict=True)
    )
    return Passes(measurements, not single or wall - thread <= AGREEMENT * wall)


class replaced:  # noqa: N801
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


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def unique(works: Sequence[Workload]) -> Iterator[Workload]:
    """Each once, in order."""
    yield from dict.fromkeys(works)
