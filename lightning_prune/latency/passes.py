"""Measures the layers of a network, kernel by kernel, in full passes of it."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.kernels import Dense, LayerKernel, Workload
from lightning_prune.latency.context import Pass, TimedLayer, passes_of, timed_passes
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement
from lightning_prune.latency.pace import Pace
from lightning_prune.latency.timing import AGREEMENT, synchroniser
from lightning_prune.latency.variants import Point, points, pruned
from lightning_prune.preparation import dense_kernel, put

_FEWEST, _MOST, _WHILE_S = 3, 48, 0.25
"""Passes of one variant in which nothing is timed but the whole, and for how long."""

_WHOLES_S = 0.6
"""Whole passes are timed of as many variants of a kernel as three dense passes each fit in here, or of the fastest."""

_FASTER = 0.9
"""Share of the dense layers' time below which a pass says more than the dense one."""

Layers = Mapping[str, tuple[nn.Linear | nn.Conv2d, tuple[Workload, ...]]]
"""Module name -> the layer and the calls that one pass makes of it."""


@dataclass(frozen=True)
class Passes:
    """What full passes with one kernel gave.

    Args:
        measurements: per layer call and variant.
        dense_s: per layer call, the least time of the dense layer in the same passes.
        wholes: for passes whose layers are faster than dense ones, the layers' least times added up, and the least time
            of a pass in which nothing is timed but the whole.
        rest_s: what of such a dense pass is not spent in layers; NaN except for dense kernels.
        quiet: whether the process had its core to itself.
    """

    measurements: tuple[Measurement, ...]
    dense_s: Mapping[Workload, float]
    wholes: tuple[tuple[float, float], ...]
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
    wholes: bool = True,
    advance: Callable[[float], None] = lambda share: None,
) -> Passes:
    """Time a kernel, and the dense layers beside it, on every layer of a model that it can run.

    Args:
        kernel: to be timed.
        model: holds the layers; they are replaced while this runs and put back.
        layers: those to be timed, dense; they are copied.
        run: makes one pass of the model.
        source: as for `Measurement`.
        rounds: how often each variant runs.
        machine: that this is.
        pace: of its processor.
        wholes: whether to time whole passes as well, for `wholes` and `rest_s`.
        advance: told after each pass what share of the passes it was.
    """
    device = torch.device(machine.kind)
    generator = torch.Generator().manual_seed(0)
    timed: dict[str, TimedLayer] = {}
    places: dict[str, tuple[Point, ...]] = {}
    samples: dict[Any, list[nn.Module]] = {}
    for name, (layer, works) in layers.items():
        variants: list[nn.Module] = []
        if not any(kernel.refuses(work, machine.torch_dtype, device) for work in works):
            places[name] = () if isinstance(kernel, Dense) else points(kernel, works[0])
            alike = (works, layer.bias is None)
            if alike in samples:  # memory of its own, but the same zeros: these take long to choose
                variants = copy.deepcopy(samples[alike])
            else:
                variants = [kernel.sample(pruned(layer, kernel.granularity, at, generator)) for at in places[name]]
                if device.type == "cpu":  # not every PyTorch copies the 2:4 weights of CUDA
                    samples[alike] = variants
        timed[name] = TimedLayer([dense_kernel(layer, kernel.layout).build(layer), *variants], device)
    if not places:
        advance(1.0)
        return Passes((), {}, (), math.nan, True)
    passes: list[Pass] = []
    with torch.inference_mode(), replaced(model, timed):
        total = passes_of(list(timed.values()), rounds)
        for one in timed_passes(list(timed.values()), run, rounds, pace):
            passes.append(one)
            advance(1.0 / total)
        advance(1.0 - len(passes) / total)
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
    pairs: tuple[tuple[float, float], ...] = ()
    rest_s = math.nan
    if wholes:
        inside = [_least_s(timed, number) for number in range(max(len(layer.variants) for layer in timed.values()))]
        faster = [number for number, layers_s in enumerate(inside) if layers_s < _FASTER * inside[0]]
        pairs = tuple(
            (inside[number], _whole_s(model, timed, number, run, device, pace))
            for number in _spread(sorted(faster, key=inside.__getitem__), int(_WHOLES_S / (_FEWEST * inside[0])))
        )
        if isinstance(kernel, Dense):
            rest_s = _whole_s(model, timed, 0, run, device, pace) - min(one.layers_s for one in passes)
    return Passes(tuple(measurements), dense_s, pairs, rest_s, not single or wall - thread <= AGREEMENT * wall)


def _spread(ordered: Sequence[int], most: int) -> list[int]:
    """At most so many of some numbers, but the first, evenly from the first to the last.

    >>> _spread([7, 8, 9, 5, 6], 3), _spread([7, 8, 9], 0), _spread([], 3)
    ([7, 9, 6], [7], [])
    """
    count = min(len(ordered), max(1, most))
    return [ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)]


def _least_s(layers: Mapping[str, TimedLayer], number: int) -> float:
    """Least seconds of the layers' variants of a number, added up."""
    return sum(layer.least_s(number % len(layer.variants)) for layer in layers.values())


def _whole_s(
    model: nn.Module,
    layers: Mapping[str, TimedLayer],
    number: int,
    run: Callable[[], Any],
    device: torch.device,
    pace: Pace,
) -> float:
    """Least seconds of passes with the layers' variants of a number in which nothing is timed but the whole.

    What clocks around layers take cannot be taken off: where layers fill the caches with their data, a clock's code
    takes three times as long as it does when it is called again and again.
    """
    synchronise = synchroniser(device)
    variants = {name: layer.variants[number % len(layer.variants)] for name, layer in layers.items()}

    def whole() -> None:
        run()
        synchronise()

    rounds = int(_WHILE_S / max(_least_s(layers, number), 1e-6))
    with torch.inference_mode(), replaced(model, variants):
        return pace.repeated(whole, max(_FEWEST, min(_MOST, rounds))).best_s


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
