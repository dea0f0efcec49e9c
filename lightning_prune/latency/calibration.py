"""Measures this machine: kernels on the layers of a network and on shapes around them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prune.kernels import ALL_KERNELS, KERNELS, LayerKernel, workloads
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.profile import DeviceProfile, digest
from lightning_prune.latency.session import Session
from lightning_prune.latency.spread import around
from lightning_prune.latency.timing import keep_freed_memory
from lightning_prune.layers import LayerTable
from lightning_prune.preparation import Prepared, placement

__all__ = ["calibrate"]

_DENSE = 4
"""How many times more shapes are timed dense."""


class NoisyMachineWarning(UserWarning):
    """Something else ran while the clock did, or slowed the processor down."""


def calibrate(
    model: nn.Module,
    example_inputs: Any,
    *,
    profile: DeviceProfile | str | Path | None = None,
    kernels: Sequence[LayerKernel] = KERNELS,
    rounds: int = 6,
    spread: int = 60,
    progress: bool = True,
) -> DeviceProfile:
    """Measure kernels on this machine, on the layers of a model and on shapes around them, and fit their costs.

    Every kernel is timed on every layer that it can run, at up to five sparsities, inside full passes of the model
    with BatchNorm folded: layers timed alone add up to 7 to 25 % less than the network. What passes take beside their
    layers is a line through passes in which nothing is timed but the whole. Weights are masked copies; the model is
    not changed.

    Timings hold for `torch.get_num_threads()` threads, the model's device and type of numbers, and the batch size of
    the example. With one thread they repeat within about 1 %, with more they do not: call `torch.set_num_threads(1)`
    first unless you deploy otherwise.

    From here on this process keeps memory that it frees (`mallopt`, where the allocator is glibc's): page faults would
    make times a matter of chance.

    Args:
        model: any module; an eval-mode copy of it is timed.
        example_inputs: as for `layer_table`.
        profile: to be extended: what it holds is not measured again. If it is a path, the profile is also written
            there after every kernel, so that an interrupted calibration goes on where it stopped.
        kernels: to be timed; `KERNELS` and your own, or `ALL_KERNELS` for those that run quantised twins as well.
        rounds: each timing is the least of so many; of up to eight times as many where passes take milliseconds, and
            of one or two where a variant is slower than dense in every layer, and in all by half.
        spread: how many shapes beside the model's are timed, so that the profile also answers for other networks.
        progress: whether to show a progress bar.

    Returns:
        The profile.

    Raises:
        ValueError: the model has no layer that a kernel can run, does not run on the example, or `profile` is for
            another machine, thread count or type.

    Warns:
        NoisyMachineWarning: the process did not have its core to itself, or neighbours on other hardware threads slowed
            it for more than a second and a quarter of what was timed; the profile says so as well.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 32))
    >>> profile = calibrate(model, torch.ones(4, 64), rounds=3, spread=0, progress=False)
    >>> profile.machine.kind, sorted(profile.costs)[:3]
    ('cpu', ['bsr-16', 'bsr-4', 'bsr-8'])
    """
    if rounds < 1 or spread < 0:
        raise ValueError(f"calibrate needs rounds >= 1 and spread >= 0, got rounds={rounds}, spread={spread}")
    keep_freed_memory()
    prepared = Prepared.of(model, example_inputs, drop_constants=False)
    device, dtype = placement(prepared.model)
    machine = Machine.here(device, dtype)
    path = Path(profile) if isinstance(profile, str | Path) else None
    known = _known(profile, kernels)
    if known is not None:
        known.require(machine)
    works, table = prepared.works, prepared.table
    if not works:
        raise ValueError(
            f"{type(model).__name__} has no layer to calibrate, kernels run modules of the classes nn.Linear and "
            f"nn.Conv2d: {_refused(table)}"
        )
    source = digest(table)
    everywhere = [work for calls in works.values() for work in calls]
    shapes = around(everywhere, spread)
    session = Session(machine, kernels, rounds, known, path)
    with _bar(progress, f"Calibrating {type(model).__name__}", session.steps(shapes)) as bar:
        session.measure_network(prepared, source, bar)
        session.measure_spread(shapes, bar)
        # Dense layers have one time for each shape where others have five: they need more shapes.
        more = [work for work in around(everywhere, _DENSE * spread) if work not in shapes]
        session.measure_spread(more, lambda share: None, dense_only=True)
    result = session.profile(held_out=True)
    if path is not None:
        result.save(path)
    if not result.quiet:
        slow_s, spent_s = session.pace.slow_s, session.pace.spent_s
        warnings.warn(
            "the machine was busy during calibration: wall time was above the time of this thread by more than 5 %, or "
            f"neighbours slowed the processor for {slow_s:.1f} of the {spent_s:.1f} s that were timed; estimates may "
            "be off. Close what else runs, or wait, and calibrate again without the old profile",
            NoisyMachineWarning,
            stacklevel=2,
        )
    return result


def _refused(table: LayerTable) -> str:
    """Why each layer has no kernel."""
    reasons = []
    for spec in table:
        try:
            workloads(spec)
            reasons.append(f"{spec.name}: not called as a plain module")
        except ValueError as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def _known(profile: DeviceProfile | str | Path | None, kernels: Sequence[LayerKernel]) -> DeviceProfile | None:
    if isinstance(profile, str | Path):
        return DeviceProfile.load(profile, (*ALL_KERNELS, *kernels)) if Path(profile).exists() else None
    return profile


@contextlib.contextmanager
def _bar(show: bool, description: str, total: int) -> Iterator[Callable[[float], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(description, total=total)
        yield lambda share: progress.update(task, advance=share)
