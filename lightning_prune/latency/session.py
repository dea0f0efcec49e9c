"""One calibration: what was measured by now, in which passes, and what is left to measure."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_prune.kernels import CHWN, LAYOUTS, NHWC, Dense, LayerKernel, Workload
from lightning_prune.kernels.batch_last import batch_last, refused
from lightning_prune.latency.context import Sequenced
from lightning_prune.latency.fitted import fitted_cost, held_out_errors, summary
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement, telling
from lightning_prune.latency.pace import Pace
from lightning_prune.latency.passes import Layers, Passes, measure_kernel
from lightning_prune.latency.producers import producers
from lightning_prune.latency.profile import DeviceProfile, NetworkRecord
from lightning_prune.latency.rectifying import rectifier_seconds
from lightning_prune.latency.timing import synchroniser
from lightning_prune.preparation import Prepared, any_batch_last, in_layout, inputs_in_layout, run_in_layout

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_SPREAD = "spread"
"""Source of the measurements of shapes beside the network's."""

_IN_ONE_PASS = 30
"""Shapes beside the network's that are timed in one pass."""

_WHILE_S, _MOST = 1.0, 8
"""Where passes are short, so long a kernel is timed on a network, in at most so many times more rounds."""

_ATTEMPTS = 3
"""How often a kernel is timed until the machine is quiet."""

_SLOW, _SLOW_S = 0.25, 1.0
"""Share of what is timed, and seconds, for which the processor may be slow: of a few rounds one still is at speed."""


class Session:
    """Collects measurements, skips what is known, and saves after every step.

    Dense layers are timed first, and again beside every kernel: where the whole machine has become slower or faster
    meanwhile, the kernel's times are scaled to the first time.
    """

    def __init__(
        self,
        machine: Machine,
        kernels: Sequence[LayerKernel],
        rounds: int,
        known: DeviceProfile | None,
        path: Path | None,
    ) -> None:
        self.machine, self.rounds, self.path, self.known = machine, rounds, path, known
        self.pace = Pace(torch.device(machine.kind))
        layouts = [layout for layout in LAYOUTS if layout != CHWN or any(kernel.layout == CHWN for kernel in kernels)]
        self.kernels = tuple(dict.fromkeys((*(Dense(layout) for layout in layouts), *kernels)))
        self.measurements = list(known.measurements) if known else []
        self.networks = dict(known.networks) if known else {}
        self.quiet = known.quiet if known else True

    def steps(self, shapes: Sequence[Workload]) -> int:
        """How many steps a whole calibration has."""
        return len(self.kernels) * (1 + len(_parts(shapes)))

    def measure_network(self, prepared: Prepared, source: str, bar: Callable[[float], None]) -> None:
        """Time a network: whole and dense, then layer by layer with every kernel."""
        self._report_idle(prepared)
        known = self.networks.get(source)
        if known is None:
            self.measurements = [m for m in self.measurements if m.source != source]  # of an interrupted start
        fixed_s: dict[str, float] = {}
        dense_s: dict[str, float] = {}
        layers_s: dict[str, float] = {}
        rectifiers_s: dict[str, dict[str, float]] = {}
        wholes: dict[str, tuple[tuple[float, float], ...]] = {}
        layouts = prepared.layouts(self.kernels)
        speed = self._speed_since(known, prepared, layouts)
        bar(sum(kernel.layout not in layouts for kernel in self.kernels))
        layers: Layers = {name: (layer, prepared.works[name]) for name, layer in prepared.layers.items()}
        rounds = 0
        for dense_first in (True, False):
            for layout in layouts:
                model = prepared.dense(layout)

                def run(model: nn.Module = model, layout: str = layout) -> None:
                    run_in_layout(model, prepared.inputs, layout)  # copying inputs and outputs is part of a pass

                kernels = [k for k in self.kernels if k.layout == layout and k.uses_sparsity != dense_first]
                rounds = rounds or self._rounds_of(run)
                passes = self._measure(kernels, model, layers, run, source, bar, rounds, speed)
                if dense_first and (known is None or layout not in known.dense_s):
                    wholes[layout] = tuple(pair for one in passes for pair in one.wholes)
                    found_s = rectifier_seconds(model, prepared.rectified, run, rounds, self.pace.settle)
                    rectifiers_s[layout] = {f"{name}.weight": seconds * speed for name, seconds in found_s.items()}
                    dense_s[layout] = self._whole_s(run, rounds) * speed
                    layers_s[layout] = self._dense_s(source, layout)
                    most_s = max(dense_s[layout] - layers_s[layout], 0.0)
                    rest_s = passes[0].rest_s if passes else math.nan  # measured before this calibration went on
                    fixed_s[layout] = most_s if math.isnan(rest_s) else min(max(rest_s, 0.0), most_s)
            if dense_first and dense_s:
                named = {f"{name}.weight": layer for name, layer in prepared.layers.items()}
                self.networks[source] = NetworkRecord(
                    type(prepared.model).__name__,
                    tuple(named),
                    sum(work.output_elements for works in prepared.works.values() for work in works),
                    {**_of(layouts, known.fixed_s if known else {}), **fixed_s},
                    {**_of(layouts, known.dense_s if known else {}), **dense_s},
                    {**_of(layouts, known.layers_s if known else {}), **layers_s},
                    {**_of(layouts, known.passes if known else {}), **wholes},
                    producers(prepared.model, prepared.inputs, named),
                    {**_of(layouts, known.rectifiers_s if known else {}), **rectifiers_s},
                )
                self.save()

    def _speed_since(self, known: NetworkRecord | None, prepared: Prepared, layouts: Sequence[str]) -> float:
        """By what times of layouts that are measured later have to be multiplied to fit those of the first."""
        if known is None or set(layouts) <= set(known.dense_s):
            return 1.0
        first, model = LAYOUTS[0], prepared.dense(LAYOUTS[0])
        now_s = self._whole_s(lambda: run_in_layout(model, prepared.inputs, first), self.rounds)
        return known.dense_s[first] / now_s

    def _report_idle(self, prepared: Prepared) -> None:
        """Say which kernels run nothing here, for lack of a library, say."""
        works = [work for calls in prepared.works.values() for work in calls]
        device, dtype = torch.device(self.machine.kind), self.machine.torch_dtype
        for kernel in self.kernels:
            reasons = {kernel.refuses(work, dtype, device) for work in works}
            if None not in reasons:
                _logger.info("kernel %s is left out: %s", kernel.name, "; ".join(sorted(map(str, reasons))))

    def measure_spread(
        self, shapes: Sequence[Workload], bar: Callable[[float], None], *, dense_only: bool = False
    ) -> None:
        """Time the kernels on single layers that are run one after another, alike ones together."""
        generator = torch.Generator().manual_seed(0)
        device, dtype = torch.device(self.machine.kind), self.machine.torch_dtype
        for alike in _parts(shapes):
            for layout in LAYOUTS:
                part = [w for w in alike if _lies(w, layout)]
                if layout == CHWN and not any_batch_last(self.kernels, part, dtype, device):
                    part = []
                # Up and down again, so that the first of a pass follows one of its size as the others do.
                part = part[::2] + part[1::2][::-1]
                with torch.random.fork_rng(devices=[]):  # the weights of new layers are drawn
                    modules = [w.layer().to(device, dtype).eval().requires_grad_(False) for w in part]
                inputs = [torch.randn(w.input_shape(), generator=generator).to(device, dtype) for w in part]
                lying = [batch_last(x) for x in inputs] if layout == CHWN else inputs_in_layout(inputs, layout)
                sequence = in_layout(Sequenced(modules, lying), layout)
                layers: Layers = {f"layers.{i}": (sequence.layers[i], (w,)) for i, w in enumerate(part)}  # type: ignore[index,misc]
                usable = [k for k in self.kernels if k.layout == layout and not (dense_only and k.uses_sparsity)]
                kernels = sorted(usable, key=lambda k: k.uses_sparsity)
                self._measure(kernels, sequence, layers, sequence, _SPREAD, bar, self.rounds)

    def _measure(
        self,
        kernels: Sequence[LayerKernel],
        model: nn.Module,
        layers: Layers,
        run: Callable[[], Any],
        source: str,
        bar: Callable[[float], None],
        rounds: int,
        speed: float = 1.0,
    ) -> list[Passes]:
        """Time kernels on those layers of a model that they were not timed on before.

        Times of dense ones are multiplied by `speed`, and others are brought to theirs.
        """
        done = []
        for kernel in kernels:
            have = {m.work for m in self.measurements if m.kernel == kernel.name and m.source == source}
            missing = {name: (layer, works) for name, (layer, works) in layers.items() if not have.issuperset(works)}
            if not missing:
                bar(1.0)
                continue
            for attempt in range(_ATTEMPTS):
                passes = measure_kernel(
                    kernel,
                    model,
                    missing,
                    run,
                    source=source,
                    rounds=rounds,
                    machine=self.machine,
                    pace=self.pace,
                    wholes=source != _SPREAD,
                    advance=bar if attempt == 0 else lambda share: None,
                )
                if passes.quiet:
                    break
            self.quiet &= passes.quiet
            passes = _scaled(passes, speed if isinstance(kernel, Dense) else self._first_speed(passes, kernel, source))
            if passes.measurements:
                self.measurements += passes.measurements
                self._add_wholes(source, kernel.layout, passes.wholes)
                self.save()
            done.append(passes)
        return done

    def _rounds_of(self, run: Callable[[], object]) -> int:
        """How many rounds of a kernel's usual five places fit, at least those that were asked for."""
        room = int(_WHILE_S / (6 * max(self._whole_s(run, 3), 1e-6)))
        return max(self.rounds, min(_MOST * self.rounds, room))

    def _whole_s(self, run: Callable[[], object], rounds: int) -> float:
        """Seconds of a whole dense pass."""
        synchronise = synchroniser(torch.device(self.machine.kind))

        def whole() -> None:
            run()
            synchronise()

        with torch.inference_mode():
            return self.pace.repeated(whole, rounds).best_s

    def _add_wholes(self, source: str, layout: str, wholes: tuple[tuple[float, float], ...]) -> None:
        record = self.networks.get(source)
        if wholes and record is not None:  # that of a network is made when its dense layers have been timed
            together = {**record.passes, layout: (*record.passes.get(layout, ()), *wholes)}
            self.networks[source] = replace(record, passes=together)

    def _first_speed(self, passes: Passes, kernel: LayerKernel, source: str) -> float:
        first: dict[Workload, list[float]] = {}
        for m in self.measurements:
            if m.source == source and _is_dense(m, kernel.layout):
                first.setdefault(m.work, []).append(m.seconds)
        both = [work for work in passes.dense_s if work in first]
        return sum(sum(first[work]) for work in both) / sum(passes.dense_s[work] for work in both) if both else 1.0

    def _dense_s(self, source: str, layout: str) -> float:
        """Seconds of a network's layers when dense."""
        return sum(m.seconds for m in self.measurements if m.source == source and _is_dense(m, layout))

    def profile(self, held_out: bool) -> DeviceProfile:
        """What is known by now."""
        by_kernel = {
            kernel: telling(kernel, self.measurements)
            for kernel in self.kernels
            if any(m.kernel == kernel.name for m in self.measurements)
        }
        costs = {kernel.name: fitted_cost(kernel, found) for kernel, found in by_kernel.items() if found}
        others = {} if self.known is None else {n: c for n, c in self.known.costs.items() if n not in costs}
        errors = {
            kernel.name: summary(held_out_errors(kernel, found), len({m.work for m in found}))
            for kernel, found in by_kernel.items()
            if found and held_out
        }
        return DeviceProfile(
            self.machine,
            {**others, **costs},
            tuple(self.measurements),
            self.networks,
            {name: error for name, error in errors.items() if error is not None},
            self.rounds,
            self._trusted,
            *self._energies,
        )

    @property
    def _trusted(self) -> bool:
        return self.quiet and self.pace.slow_s <= max(_SLOW * self.pace.spent_s, _SLOW_S)

    @property
    def _energies(self) -> tuple[float | None, float | None]:
        """Whatever somebody wrote into the profile that is extended."""
        return (None, None) if self.known is None else (self.known.joules_per_mac, self.known.joules_per_byte)

    def save(self) -> None:
        """Write what is known by now, costs not yet fitted, so that an interrupt loses one step at most."""
        if self.path is not None:
            DeviceProfile(
                self.machine,
                {},
                tuple(self.measurements),
                self.networks,
                rounds=self.rounds,
                quiet=self._trusted,
                joules_per_mac=self._energies[0],
                joules_per_byte=self._energies[1],
            ).save(self.path)


def _parts(shapes: Sequence[Workload]) -> list[list[Workload]]:
    """What is timed in one pass: layers of one kind and about one size.

    A small linear layer behind convolutions whose weights fill the caches was seen to take 85 us instead of 10.
    """

    def size(work: Workload) -> int:
        return work.macs + 20 * (work.weights + work.input_elements + work.output_elements)

    found = []
    for kind in sorted({work.kind for work in shapes}):
        order = sorted((work for work in shapes if work.kind == kind), key=size)
        found += [order[start : start + _IN_ONE_PASS] for start in range(0, len(order), _IN_ONE_PASS)]
    return found


def _scaled(passes: Passes, speed: float) -> Passes:
    """The same at another speed of the machine."""
    return replace(
        passes,
        measurements=tuple(replace(m, seconds=m.seconds * speed) for m in passes.measurements),
        wholes=tuple((layers_s * speed, whole_s * speed) for layers_s, whole_s in passes.wholes),
        rest_s=passes.rest_s * speed,
    )


def _of(layouts: Sequence[str], known: Mapping[str, T]) -> dict[str, T]:
    """What is known of some layouts."""
    return {layout: value for layout, value in known.items() if layout in layouts}


def _lies(work: Workload, layout: str) -> bool:
    """Whether the activations of a layer can lie in a layout of their own."""
    return refused(work) is None if layout == CHWN else layout != NHWC or work.kind == "conv2d"


def _is_dense(measurement: Measurement, layout: str) -> bool:
    """Whether it is of a dense layer of a network in a layout; linear layers have one time in all."""
    return measurement.kernel == Dense(LAYOUTS[0] if measurement.work.kind == "linear" else layout).name
