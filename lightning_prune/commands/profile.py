"""`lightning-prune profile`: which kernel runs each layer of a network, how long that takes, and where zeros pay."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lightning_prune import metrics
from lightning_prune.commands.network import example_inputs, network_of, torch_threads
from lightning_prune.figures import speedup_figure
from lightning_prune.files import write_file, write_text
from lightning_prune.granularities import Granularity
from lightning_prune.kernel_report import KernelReport, LayerReport
from lightning_prune.latency.estimator import MARGIN, LatencyEstimator
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.layers import LayerTable, layer_table
from lightning_prune.plan import Share, SparsityPlan
from lightning_prune.pruner import Pruner
from lightning_prune.runtime import accelerate
from lightning_prune.speedups import SpeedupCurve, speedup_curves
from lightning_prune.terminal import console, say

SCHEMA = "lightning-prune/kernel-report/1"


def run(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    *,
    device_profile: str | Path,
    ckpt_path: str | Path | None,
    weights_only: bool | None,
    plan: float | SparsityPlan | Mapping[str, Share] | str | Path | None,
    batch_size: int,
    threads: int,
    granularity: Granularity,
    output: str | Path | None,
) -> KernelReport:
    """See `PruneTrainer.profile`."""
    out = console()
    profile = DeviceProfile.load(device_profile)
    network = network_of(trainer, model, ckpt_path, weights_only)
    granularities = _pruned(network, plan, granularity)
    inputs = example_inputs(trainer, network, datamodule, batch_size)
    table = layer_table(network, inputs)
    estimator = LatencyEstimator(table, profile)
    analytic = profile.machine.kind == "analytic"
    with torch_threads(threads):
        if analytic:
            patterns = [granularities.get(name, granularity) for name in table.names]
            report = _estimated(estimator, network, patterns)
        else:
            report = accelerate(network, inputs, profile).kernel_report()
    curves = speedup_curves(estimator, granularity)
    zeros = metrics.parameter_sparsity(network)
    _print(out, report, curves, zeros, estimator, granularity, analytic)
    folder = _folder(trainer, ckpt_path) if output is None else Path(output)
    chart = speedup_figure(
        curves,
        zeros,
        f"{type(model).__name__} on {profile.machine.device}, zeros in the pattern {granularity}, batch {batch_size}",
    )
    write_file(folder / "speedup.png", lambda file: chart.savefig(file, format="png"))
    content = {
        "schema": SCHEMA,
        "model": type(model).__name__,
        "checkpoint": None if ckpt_path is None else str(ckpt_path),
        "plan": None if plan is None else str(plan),
        "granularity": str(granularity),
        "batch_size": batch_size,
        "device_profile": str(device_profile),
        "machine": asdict(profile.machine),
        "calibrated": estimator.fixed_is_measured,
        **asdict(report),
        "speedup": _speedup(report),
        "speedup_curves": [asdict(curve) for curve in curves],
    }
    write_text(folder / "kernel_report.json", json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")
    for name in ("kernel_report.json", "speedup.png"):
        say(out, f"written: {folder / name}")
    return report


def _pruned(
    network: nn.Module, plan: float | SparsityPlan | Mapping[str, Share] | str | Path | None, granularity: Granularity
) -> dict[str, Granularity]:
    """Prune a network by magnitude, each parameter for itself.

    Returns:
        Parameter name -> the pattern of its zeros, for those that the plan names.
    """
    if plan is None:
        return {}
    pruner = Pruner(network, SparsityPlan.of(plan), granularity=granularity, scope="local")
    pruner.update(level=1.0)
    return {name: pruner.granularity_of(name) for name in pruner.plan}


def _estimated(estimator: LatencyEstimator, network: nn.Module, patterns: Sequence[Granularity]) -> KernelReport:
    """What the report would be on a machine that cannot be run: measured times are NaN, dense ones estimates."""
    table: LayerTable = estimator.table
    zeros = metrics.parameter_sparsity(network)
    sparsity = torch.tensor([zeros[name] for name in table.names], dtype=torch.float64)
    seconds = estimator.kernel_latency_s(sparsity, patterns)
    chosen = estimator.best_kernels(sparsity, patterns).tolist()
    nothing = torch.zeros_like(sparsity)
    dense_s = estimator.dense.kernel_latency_s(nothing)
    dense_chosen = estimator.dense.best_kernels(nothing).tolist()
    pays_from = [float(estimator.break_even(pattern)[row]) for row, pattern in enumerate(patterns)]
    rows = tuple(
        LayerReport(
            name,
            zeros[name],
            estimator.kernels[chosen[row]],
            float(seconds[row, chosen[row]]),
            math.nan,
            float(dense_s[row, dense_chosen[row]]),
            pays_from[row],
        )
        for row, name in enumerate(table.names)
        if chosen[row] >= 0
    )
    return KernelReport(
        rows,
        estimator.best_layout(sparsity, patterns),
        float(estimator.latency_s(sparsity, patterns)),
        math.nan,
        estimator.dense_latency_s,
        math.nan,
    )


def _folder(trainer: Trainer, ckpt_path: str | Path | None) -> Path:
    """`latency` in the folder of the run: of the checkpoint's, or else of a new one."""
    if ckpt_path is not None and Path(ckpt_path).parent.name == "checkpoints":
        return Path(ckpt_path).parents[1] / "latency"
    return Path(trainer.log_dir or trainer.default_root_dir) / "latency"


def _print(
    out: Console,
    report: KernelReport,
    curves: Sequence[SpeedupCurve],
    zeros: Mapping[str, float],
    estimator: LatencyEstimator,
    granularity: Granularity,
    analytic: bool,
) -> None:
    machine = estimator.profile.machine
    pays_from = {curve.layer: curve.pays_from for curve in curves}
    title = f"{'Estimates for' if analytic else 'Kernels on'} {machine.device}, {machine.threads} thread(s)"
    out.print(_table(report, pays_from, f"{title}, {machine.dtype}", analytic))
    if analytic:
        say(out, "The device profile is analytic: nothing was executed, all times are estimates.", "yellow")
    elif not estimator.fixed_is_measured:
        say(
            out,
            "This network was not calibrated at this batch size: its layers and its fixed part are estimated from "
            "others; `lightning-prune calibrate` with the same configuration measures them.",
            "yellow",
        )
    now_s = report.estimated_s if analytic else report.measured_s
    say(
        out,
        f"a pass takes {now_s * 1e3:.4g} ms, dense {report.dense_s * 1e3:.4g} ms: {_speedup(report):.2f}x"
        + ("" if analytic else f" (estimated {report.estimated_s * 1e3:.4g} ms)"),
    )
    # A layer's own zeros: the report also counts weights that meet nothing but other layers' zeros.
    losing = [row for row in report.layers if zeros[row.layer] > 0 and not _pays(row, analytic)]
    if losing:
        say(out, f"Zeros do not pay in {len(losing)} of {len(report.layers)} layers at their sparsity:")
    for row in losing:
        verdict = _verdict(zeros[row.layer], pays_from.get(row.layer, math.nan), granularity)
        say(out, f"  {row.layer}: {zeros[row.layer]:.3f} are zero; {verdict}")


def _table(report: KernelReport, pays_from: Mapping[str, float], title: str, analytic: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("sparsity", justify="right")
    table.add_column("kernel")
    names = ("estimated ms", *(() if analytic else ("measured ms",)), "dense ms", "pays from")
    for name in names:
        table.add_column(name, justify="right")

    def times(each: LayerReport | KernelReport) -> list[str]:
        seconds = [each.estimated_s, *(() if analytic else (each.measured_s,)), each.dense_s]
        return ["–" if math.isnan(value) else f"{value * 1e3:.4g}" for value in seconds]

    for row in report.layers:
        table.add_row(
            escape(row.layer),
            f"{row.sparsity:.3f}",
            row.kernel,
            *times(row),
            _break_even(pays_from.get(row.layer, math.nan)),
        )
    table.add_section()
    table.add_row("whole pass", "", report.layout, *times(report), "")
    return table


def _pays(row: LayerReport, analytic: bool) -> bool:
    if analytic:
        return row.estimated_s <= MARGIN * row.dense_s
    return not row.kernel.startswith("dense")


def _verdict(sparsity: float, pays_from: float, granularity: Granularity) -> str:
    if math.isnan(pays_from):
        return "the profile cannot say from where they would"
    if math.isinf(pays_from):
        return f"with zeros in the pattern {granularity} no sparsity pays"
    if pays_from <= sparsity:
        return f"by the estimate they would from {pays_from:.2f}, but the dense kernel was timed faster"
    return f"they would from {pays_from:.2f}"


def _break_even(sparsity: float) -> str:
    if math.isnan(sparsity):
        return "–"
    return "never" if math.isinf(sparsity) else f"{sparsity:.2f}"


def _speedup(report: KernelReport) -> float:
    return report.dense_s / (report.estimated_s if math.isnan(report.measured_s) else report.measured_s)


def _plain(value: Any) -> Any:
    """For JSON, which knows neither NaN (nothing known) nor infinity (never)."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "never"
    return value
