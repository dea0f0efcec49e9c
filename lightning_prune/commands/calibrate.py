"""`lightning-prune calibrate`: measures this machine on the layers of a network, and says what came of it."""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_prune.commands.network import example_inputs, network_of, torch_threads
from lightning_prune.kernels import KERNELS, LayerKernel, Workload
from lightning_prune.latency.calibration import NoisyMachineWarning, calibrate
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.layers import layer_table
from lightning_prune.preparation import Prepared, placement
from lightning_prune.terminal import console, say


def run(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    *,
    output: str | Path,
    batch_size: int,
    threads: int,
    rounds: int,
    spread: int,
    ckpt_path: str | Path | None,
    weights_only: bool | None,
) -> DeviceProfile:
    """See `PruneTrainer.calibrate`."""
    out = console()
    network = network_of(trainer, model, ckpt_path, weights_only)
    inputs = example_inputs(trainer, network, datamodule, batch_size)
    with torch_threads(threads):
        _check_extends(Path(output), Machine.here(*placement(network)))
        progress = trainer.progress_bar_callback is not None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoisyMachineWarning)  # said below, in its place
                profile = calibrate(
                    network, inputs, profile=Path(output), rounds=rounds, spread=spread, progress=progress
                )
        except KeyboardInterrupt:
            kept = f"what was measured is kept in {output}" if Path(output).exists() else "nothing was measured yet"
            say(out, f"Interrupted: {kept}; the same command goes on from there.")
            raise
        _report(out, network, inputs, profile, output)
    return profile


def _check_extends(path: Path, here: Machine) -> None:
    """Refuse to extend a profile of another machine before any work."""
    if not path.exists():
        return
    if difference := DeviceProfile.load(path).machine.difference(here):
        raise ValueError(
            f"{str(path)!r} holds a profile of another machine or setting: {difference}; write to another file with "
            "--output, or remove this one"
        )


def _report(out: Console, network: LightningModule, inputs: Any, profile: DeviceProfile, path: str | Path) -> None:
    machine = profile.machine
    works = Prepared.of(network, inputs, drop_constants=False).works
    title = f"Kernels for the {len(works)} layers of {type(network).__name__} on {machine.device}"
    out.print(_kernel_table(title, works, machine, profile))
    record = profile.network(layer_table(network, inputs))
    if record is not None:
        for layout, fixed_s in record.fixed_s.items():
            whole_s = record.dense_s[layout]
            say(
                out,
                f"fixed part, {layout}: {fixed_s * 1e3:.4g} ms of {whole_s * 1e3:.4g} ms that a dense pass takes",
            )
    if not profile.quiet:
        say(
            out,
            "The machine was busy: something else ran while the clock did, or slowed the processor, and estimates may "
            f"be off. Close what else runs, or wait, remove {path} and calibrate again.",
            style="yellow",
        )
    say(
        out,
        f"written: {path} ({len(profile.measurements)} measurements; {machine.threads} thread(s), {machine.dtype})",
    )


def _kernel_table(
    title: str, works: Mapping[str, Sequence[Workload]], machine: Machine, profile: DeviceProfile
) -> Table:
    """Which kernels run how many layers, how well they are estimated, and why they refuse the others."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("kernel")
    table.add_column("layers", justify="right")
    table.add_column("held-out error", justify="right")
    table.add_column("within 10 %", justify="right")
    table.add_column("layers refused, and why", overflow="fold")
    for kernel in KERNELS:
        reasons = refusals(kernel, works, machine)
        error = profile.held_out.get(kernel.name)
        table.add_row(
            kernel.name,
            str(len(works) - reasons.total()),
            "–" if error is None else f"{error.mape:.1%}",
            "–" if error is None else f"{error.within_10:.0%}",
            escape("\n".join(_gathered(reasons))),
        )
    table.caption = "Held-out error: mean error on shapes that took no part in the fit; – where they were too few."
    table.caption_justify = "left"
    return table


def refusals(kernel: LayerKernel, works: Mapping[str, Sequence[Workload]], machine: Machine) -> Counter[str]:
    """Reason -> number of layers that a kernel refuses for it.

    Args:
        kernel: that may run them.
        works: layer -> its calls.
        machine: where.
    """
    device = torch.device(machine.kind)
    found = [
        next(filter(None, (kernel.refuses(work, machine.torch_dtype, device) for work in calls)), None)
        for calls in works.values()
    ]
    return Counter(reason for reason in found if reason is not None)


def _gathered(reasons: Counter[str]) -> list[str]:
    """One line for all reasons that differ in numbers alone, the most frequent first.

    >>> _gathered(Counter({"4 does not divide 7": 1, "4 does not divide 9": 2, "no GPU": 1}))
    ['3: 4 does not divide 9, and the like', '1: no GPU']
    """
    alike: dict[str, Counter[str]] = defaultdict(Counter)
    for reason, count in reasons.items():
        alike[re.sub(r"\d+", "#", reason)][reason] = count
    return [
        f"{found.total()}: {found.most_common(1)[0][0]}{', and the like' if len(found) > 1 else ''}"
        for found in sorted(alike.values(), key=lambda found: -found.total())
    ]
