"""Measures this machine: kernels on the layers of a network and on shapes around them."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.folding import fold_batch_norm
from lightning_prune.kernels import KERNELS, LAYOUTS, NHWC, LayerKernel, Workload
from lightning_prune.latency.context import Sequenced, TimedLayer
from lightning_prune.latency.fitted import FittedCost, fitted_cost, held_out_errors, summary
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.measurement import Measurement
from lightning_prune.latency.passes import Layers, measure_kernel, replaced
from lightning_prune.latency.producers import producers
from lightning_prune.latency.profile import DeviceProfile, NetworkRecord, digest, runnable
from lightning_prune.latency.spread import around
from lightning_prune.latency.timing import interleaved, synchroniser
from lightning_prune.layers import layer_table
from lightning_prune.tracing import call

__all__ = ["calibrate"]

_logger = logging.getLogger(__name__)

_IN_ONE_PASS = 30
"""Shapes beside the network's that are timed in one pass."""

_ATTEMPTS = 2
"""How often a kernel is timed again if the machine was not quiet."""


class NoisyMachineWarning(UserWarning):
    """Something else ran while the clock did."""


def calibrate(
    model: nn.Module,
    example_inputs: Any,
    *,
    profile: DeviceProfile | str | Path | None = None,
    kernels: Sequence[LayerKernel] = KERNELS,
    rounds: int = 9,
    spread: int = 60,
    progress: bool = True,
) -> DeviceProfile:
    """Measure kernels on this machine, on the layers of a model and on shapes around them, and fit their costs.

    Every kernel is timed on every layer that it can run, at up to five sparsities, inside full passes of the model
    with BatchNorm folded: layers timed alone add up to 7 to 25 % less than the network. The part of a pass that no
    kernel changes is what a dense pass takes beyond its layers. Weights are masked copies; the model is not changed.

    Timings hold for `torch.get_num_threads()` threads, the model's device and type of numbers, and the batch size of
    the example. With one thread they repeat within about 1 %, with more they do not: call `torch.set_num_threads(1)`
    first unless you deploy otherwise.

    Args:
        model: any module; an eval-mode copy of it is timed.
        example_inputs: as for `layer_table`.
        profile: to be extended: what it holds is not measured again. If it is a path, the profile is also written
            there after every kernel, so that an interrupted calibration goes on where it stopped.
        kernels: to be timed; `KERNELS` and your own.
        rounds: each timing is the least of so many.
        spread: how many shapes beside the model's are timed, so that the profile also answers for other networks.
        progress: whether to show a progress bar.

    Returns:
        The profile.

    Raises:
        ValueError: the model has no layer that a kernel can run, does not run on the example, or `profile` is for
            another machine, thread count or type.

    Warns:
        NoisyMachineWarning: the process did not have its core to itself; the profile says so as well.

    >>> profile = calibrate(nn.Linear(64, 32), torch.ones(4, 64), rounds=3, spread=0, progress=False)
    >>> profile.machine.kind, sorted(profile.costs)[:3]
    ('cpu', ['bsr-16', 'bsr-4', 'bsr-8'])
    """
    if rounds < 1 or spread < 0:
        raise ValueError(f"calibrate needs rounds >= 1 and spread >= 0, got rounds={rounds}, spread={spread}")
    model = inference_copy(model)
    device, dtype = placement(model)
    machine = Machine.here(device, dtype)
    path = Path(profile) if isinstance(profile, str | Path) else None
    known = _known(profile, kernels)
    if known is not None:
        known.require(machine)
    inputs = tree_map_only(Tensor, lambda x: x.to(device), example_inputs)
    table = layer_table(model, inputs)
    fold_batch_norm(model, inputs)
    works = executed(model, inputs, runnable(table))
    if not works:
        raise ValueError(
            f"{type(model).__name__} has no layer to calibrate: kernels run nn.Linear and nn.Conv2d, and its layers are "
            f"{sorted({spec.kind for spec in table}) or 'none'}"
        )
    layers: dict[str, nn.Linear | nn.Conv2d] = {name: _module(model, name) for name in works}
    source = digest(table)
    shapes = around([work for calls in works.values() for work in calls], spread)
    session = _Session(machine, kernels, rounds, known, path)
    with _bar(progress, f"Calibrating {type(model).__name__}", session.steps(source, shapes)) as bar:
        fixed_s, dense_s = {}, {}
        for layout in LAYOUTS:
            if layout == NHWC and not any(work.kind == "conv2d" for calls in works.values() for work in calls):
                fixed_s[layout], dense_s[layout] = fixed_s[LAYOUTS[0]], dense_s[LAYOUTS[0]]
                continue
            laid = in_layout(model, layout)
            data = inputs_in_layout(inputs, layout)
            named: Layers = {name.rpartition(".")[0]: (_module(laid, name), works[name]) for name in works}
            session.measure(laid, named, lambda: call(laid, data), source, layout, bar)  # noqa: B023
            dense_s[layout], fixed_s[layout] = _fixed(laid, named, lambda: call(laid, data), rounds, device)  # noqa: B023
        record = NetworkRecord(
            type(model).__name__,
            tuple(works),
            sum(work.output_elements for calls in works.values() for work in calls),
            fixed_s,
            dense_s,
            producers(model, inputs, layers),
        )
        session.networks[source] = record
        session.measure_spread(shapes, dtype, device, bar)
    result = session.profile(held_out=True)
    if path is not None:
        result.save(path)
    if not result.quiet:
        warnings.warn(
            "the machine was busy during calibration: wall time was above the time of this thread by more than 5 %; "
            "estimates may be off. Close what else runs and calibrate again without the old profile",
            NoisyMachineWarning,
            stacklevel=2,
        )
    return result


class _Session:
    """Collects measurements, skips what is known, and saves after every step."""

    def __init__(
        self, machine: Machine, kernels: Sequence[LayerKernel], rounds: int, known: DeviceProfile | None, path: Path | None
    ) -> None:
        self.machine, self.kernels, self.rounds, self.path = machine, tuple(kernels), rounds, path
        self.measurements = list(known.measurements) if known else []
        self.networks = dict(known.networks) if known else {}
        self.known = known
        self.quiet = known.quiet if known else True

    def steps(self, source: str, shapes: Sequence[Workload]) -> int:
        """How many steps a whole calibration has at most."""
        return len(self.kernels) * (1 + len(shapes) // _IN_ONE_PASS + (len(shapes) % _IN_ONE_PASS > 0))

    def measure(
        self, model: nn.Module, layers: Layers, run: Callable[[], Any], source: str, layout: str, bar: Callable[[float], None]
    ) -> None:
        """Time the kernels of one layout on layers of a model."""
        dtype, device = self.machine.torch_dtype, torch.device(self.machine.kind)
        for kernel in self.kernels:
            if kernel.layout != layout:
                continue
            have = {m.work for m in self.measurements if m.kernel == kernel.name and m.source == source}
            missing = {name: (layer, calls) for name, (layer, calls) in layers.items() if not have.issuperset(calls)}
            if not missing:
                bar(1.0)
                continue
            passes = measure_kernel(
                kernel, model, missing, run, source=source, rounds=self.rounds, dtype=dtype, device=device, advance=bar
            )
            for _ in range(_ATTEMPTS):
                if passes.quiet:
                    break
                passes = measure_kernel(
                    kernel, model, missing, run, source=source, rounds=self.rounds, dtype=dtype, device=device
                )
            self.quiet &= passes.quiet
            if passes.measurements:
                self.measurements += passes.measurements
                self.save()

    def measure_spread(
        self, shapes: Sequence[Workload], dtype: torch.dtype, device: torch.device, bar: Callable[[float], None]
    ) -> None:
        """Time the kernels on single layers that are run one after another."""
        order = sorted(shapes, key=lambda w: (w.kind, w.macs + 20 * (w.weights + w.input_elements + w.output_elements)))
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(order), _IN_ONE_PASS):
            for layout in LAYOUTS:
                part = [w for w in order[start : start + _IN_ONE_PASS] if layout != NHWC or w.kind == "conv2d"]
                layers = [in_layout(w.layer().to(device, dtype).eval().requires_grad_(False), layout) for w in part]
                inputs = [
                    inputs_in_layout(torch.randn(w.input_shape(), generator=generator).to(device, dtype), layout)
                    for w in part
                ]
                sequence = Sequenced(layers, inputs)
                named: Layers = {f"layers.{i}": (layer, (w,)) for i, (layer, w) in enumerate(zip(layers, part, strict=True))}  # type: ignore[misc]
                self.measure(sequence, named, sequence, "spread", layout, bar)

    def profile(self, held_out: bool) -> DeviceProfile:
        """What is known by now."""
        by_kernel = {
            kernel: [m for m in self.measurements if m.kernel == kernel.name] for kernel in self.kernels
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
            self.quiet,
        )

    def save(self) -> None:
        """Write what is known by now, costs not yet fitted, so that an interrupt loses one step at most."""
        if self.path is not None:
            DeviceProfile(
                self.machine,
                {},
                tuple(self.measurements),
                self.networks,
                rounds=self.rounds,
                quiet=self.quiet,
            ).save(self.path)


def _known(profile: DeviceProfile | str | Path | None, kernels: Sequence[LayerKernel]) -> DeviceProfile | None:
    if isinstance(profile, str | Path):
        return DeviceProfile.load(profile, kernels) if Path(profile).exists() else None
    return profile


def _fixed(
    model: nn.Module, layers: Layers, run: Callable[[], Any], rounds: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of a whole dense pass, and of the part of it that is not spent in the layers."""
    synchronise = synchroniser(device)

    def whole() -> None:
        run()
        synchronise()

    with torch.inference_mode():
        dense_s = interleaved({"dense": whole}, max(rounds, 15))["dense"].best_s
        timed = {name: TimedLayer([layer], device) for name, (layer, _) in layers.items()}
        with replaced(model, timed):
            for _ in range(max(rounds, 15) + 1):
                for layer in timed.values():
                    layer.begin(0)
                whole()
    inside = sum(min(times[1:]) for layer in timed.values() for times in layer.seconds[0])
    return dense_s, max(dense_s - inside, 0.0)


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients, that leaves a Trainer it is attached to behind."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        trainer = module.__dict__.get("_trainer")
        if trainer is not None:
            memo[id(trainer)] = None
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the weights of a model are, and of what type.

    Raises:
        ValueError: it has none, or they are in several places or of several types.
    """
    found = {(p.device, p.dtype) for p in model.parameters() if p.is_floating_point()}
    if len(found) != 1:
        places = sorted(f"{dtype} on {device}" for device, dtype in found)
        raise ValueError(f"latency is measured for weights of one type on one device, {type(model).__name__} has {places}")
    return found.pop()


def in_layout(model: nn.Module, layout: str) -> nn.Module:
    """A copy with the weights of convolutions in a layout."""
    copied = copy.deepcopy(model)
    return copied.to(memory_format=torch.channels_last) if layout == NHWC else copied


def inputs_in_layout(inputs: Any, layout: str) -> Any:
    """Inputs with images in a layout."""
    form = torch.channels_last if layout == NHWC else torch.contiguous_format
    return tree_map_only(Tensor, lambda x: x.contiguous(memory_format=form) if x.ndim == 4 else x, inputs)


def executed(
    model: nn.Module, inputs: Any, works: dict[str, tuple[Workload, ...]]
) -> dict[str, tuple[Workload, ...]]:
    """Of the runnable layers, those that are modules of torch's own classes and are called as such."""
    candidates = {}
    for name in works:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) in (nn.Linear, nn.Conv2d):
            candidates[name] = module
    counts = dict.fromkeys(candidates, 0)
    handles = []
    for name, module in candidates.items():

        def count(_: nn.Module, args: Any, name: str = name) -> None:
            counts[name] += 1

        handles.append(module.register_forward_pre_hook(count))
    try:
        with torch.inference_mode():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: works[name] for name in candidates if counts[name] == len(works[name])}


def _module(model: nn.Module, weight: str) -> nn.Linear | nn.Conv2d:
    return model.get_submodule(weight.rpartition(".")[0])  # type: ignore[return-value]


@contextlib.contextmanager
def _bar(show: bool, description: str, total: int) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(description, total=total)
        yield lambda share: progress.update(task, advance=share)


