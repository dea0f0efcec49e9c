"""`lightning-prune search`: the fastest network within an accuracy threshold, from training to the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from optuna import load_study
from rich.console import Console
from torch import nn

from lightning_prune.commands.evaluation import Validation
from lightning_prune.commands.network import example_inputs, network_of, torch_threads
from lightning_prune.commands.recipe import write_recipe
from lightning_prune.commands.recovery import RECOVERIES, Recovery, Tuning
from lightning_prune.commands.validation import keyboard_interrupts, require_validation
from lightning_prune.kernels import ALL_KERNELS, KERNELS, QUANTIZED_KERNELS
from lightning_prune.kernels.int8 import unavailable
from lightning_prune.latency import DeviceProfile, calibrate
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.profile import digest
from lightning_prune.layers import layer_table
from lightning_prune.preparation import placement
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.report import report
from lightning_prune.search.events import SearchEvents
from lightning_prune.search.history import save_trials
from lightning_prune.search.objectives import objective_of
from lightning_prune.search.phases import Phases
from lightning_prune.search.quantized import quantization_of, require_quantizable
from lightning_prune.search.result import SearchResult
from lightning_prune.search.schemes import entries_of
from lightning_prune.search.search import require_settings, search_sparsity
from lightning_prune.search.sensitivity import generators_kept, rows
from lightning_prune.search.storages import open_storage, shown
from lightning_prune.terminal import console, say

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler


def run(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    *,
    metric: str,
    mode: Literal["max", "min"],
    max_drop: float | None,
    objective: str,
    scheme: str,
    levels: Sequence[float],
    names: Sequence[str] | None,
    n_trials: int,
    timeout: float | None,
    sampler: BaseSampler | None,
    seed: int,
    storage: str | None,
    study_name: str | None,
    profile: str | Path,
    quantize: str | QuantizationSettings | None,
    repair: Literal["layerwise", "sequential"],
    tuning_steps: int,
    recovery: str,
    recovery_epochs: int,
    confirmations: int,
    calibration_examples: int,
    batch_size: int,
    threads: int,
    ckpt_path: str | Path | None,
    weights_only: bool | None,
    output: str | Path | None,
) -> SearchResult:
    """See `PruneTrainer.search`."""
    require_settings(max_drop, metric, mode, n_trials, timeout, confirmations)
    _check(objective, tuning_steps, recovery, recovery_epochs, calibration_examples)
    quantization = None if quantize is None else quantization_of(quantize)
    require_validation(trainer, model)
    out = console()
    folder = Path(output or trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    progress = trainer.progress_bar_callback is not None
    validation = Validation(trainer, datamodule, metric)
    # Everything that can be refused is, before anything that takes time.
    network = network_of(trainer, model, ckpt_path, weights_only)
    with generators_kept(network):
        inputs = example_inputs(trainer, network, datamodule, batch_size)
        entries_of(network, layer_table(network, inputs), scheme, levels, names)
        if quantization is not None:
            require_quantizable(quantization, network, objective_of(objective, batch_size))
        validation.check(network)
        batches = _calibration(trainer, network, datamodule, calibration_examples)
    if Path(profile).exists():
        with torch_threads(threads):
            _known(Path(profile), network)
    where, name = storage or f"sqlite:///{folder / 'study.db'}", study_name or "search"
    opened = open_storage(where)
    if ckpt_path is None:
        ckpt_path = _trained(trainer, model, datamodule, out)
        network = network_of(trainer, model, ckpt_path, weights_only)
    recover = None
    if recovery != "none":
        recover = Recovery(
            trainer,
            model,
            datamodule,
            kind=recovery,
            epochs=recovery_epochs,
            metric=metric,
            mode=mode,
            folder=folder,
        )
    events = SearchEvents(folder / "search", metric, mode, max_drop)
    try:
        with torch_threads(threads):
            result = search_sparsity(
                network,
                inputs,
                batches,
                validation,
                max_drop=max_drop,
                metric=metric,
                mode=mode,
                profile=_profile(network, inputs, Path(profile), quantization is not None, progress, out),
                objective=objective,
                scheme=scheme,
                levels=levels,
                names=names,
                n_trials=n_trials,
                timeout=timeout,
                sampler=sampler,
                seed=seed,
                storage=opened,
                study_name=name,
                chance=_chance(model, metric, mode),
                quantize=quantization,
                repair=repair,
                tune=Tuning(trainer, model, datamodule, steps=tuning_steps) if tuning_steps else None,
                recover=recover,
                confirm=validation.whole if validation.partial else None,
                confirmations=confirmations,
                on_trial=events.on_trial,
                phases=Phases(said=lambda line: say(out, line)),
                progress=progress,
            )
        details = {**result.details, "dense_checkpoint": str(ckpt_path), "dense_epoch": _epoch(ckpt_path)}
        if recover is not None and recover.attempts:
            tried = [each["trial"] for each in details["confirmations"]]
            details["recovery"] = recover.attempts[tried.index(details["trial"])]
        result = replace(result, details=details)
        _write(trainer, result, folder)
        events.finish(result)
        _report(folder, load_study(study_name=name, storage=opened), result)
    except (KeyboardInterrupt, OSError) as error:
        say(
            out,
            f"{'Interrupted' if isinstance(error, KeyboardInterrupt) else 'Stopped'}: finished trials are kept. To go "
            f"on, give the same options and --ckpt_path {ckpt_path} --storage {shown(where)} --study_name {name}",
        )
        raise
    finally:
        events.close()
    _say_result(out, result, folder)
    return result


def _check(objective: str, tuning_steps: int, recovery: str, recovery_epochs: int, calibration_examples: int) -> None:
    objective_of(objective, 1)
    if tuning_steps < 0:
        raise ValueError(f"candidates are tuned for some steps, or for none (0), got tuning_steps={tuning_steps!r}")
    if recovery not in (*RECOVERIES, "none"):
        raise ValueError(f"recovery is one of {sorted([*RECOVERIES, 'none'])}, got {recovery!r}")
    if recovery != "none" and recovery_epochs < 1:
        raise ValueError(f"recovery trains for at least one epoch, got recovery_epochs={recovery_epochs!r}")
    if calibration_examples < 1:
        raise ValueError(f"repairing needs examples, got calibration_examples={calibration_examples!r}")


def _trained(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, out: Console
) -> str | Path:
    """Train the dense network; the path of its best checkpoint."""
    say(out, "Training the dense network (give --ckpt_path to start from one that is trained)")
    with keyboard_interrupts():
        trainer.fit(model, datamodule=datamodule)
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best:
        return str(best)
    path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "dense.ckpt"
    trainer.save_checkpoint(path)
    return path


def _epoch(path: str | Path) -> int | None:
    """Of a checkpoint, counted from 0; None where it does not say."""
    found = torch.load(path, map_location="cpu", weights_only=False, mmap=True).get("epoch")
    return None if found is None else int(found)


def _calibration(
    trainer: Trainer, network: LightningModule, datamodule: LightningDataModule | None, examples: int
) -> list[Any]:
    """Inputs of the first training batches, without labels."""
    source: Any = datamodule if datamodule is not None else network
    if not is_overridden("train_dataloader", source):
        raise ValueError(
            f"{type(source).__name__} has no train_dataloader, whose inputs the kept weights are fitted on; define one"
        )
    if datamodule is not None:
        datamodule.prepare_data()
    source.setup("fit")
    try:
        loader = source.train_dataloader()
        batches, found = [], 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same examples for every worker
            for batch in islice(loader, examples):
                batch = source.on_after_batch_transfer(source.on_before_batch_transfer(batch, 0), 0)
                inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
                batches.append(move_data_to_device(trainer.precision_plugin.convert_input(inputs), network.device))
                found += rows(inputs)
                if found >= examples:
                    break
    finally:
        source.teardown("fit")
    if not batches:
        raise ValueError("the training loader is empty, and the kept weights are fitted on its inputs")
    return batches


def _chance(model: LightningModule, metric: str, mode: str) -> float | None:
    """What guessing reaches, where the model says how many classes there are and the metric is an accuracy."""
    classes = getattr(model, "num_classes", None) or model.hparams.get("num_classes")
    return 1.0 / classes if classes and "acc" in metric and mode == "max" else None


def _profile(
    network: nn.Module, inputs: Any, path: Path, quantized: bool, progress: bool, out: Console
) -> DeviceProfile:
    """The profile of this machine, calibrated for this network where it does not know it, or not in integers."""
    table = layer_table(network, inputs)
    kernels = ALL_KERNELS if quantized and unavailable() is None else KERNELS
    if path.exists():
        known = _known(path, network)
        timed = {m.kernel for m in known.measurements if m.source == digest(table)}
        if known.network(table) is not None and (kernels is KERNELS or timed & {k.name for k in QUANTIZED_KERNELS}):
            return known
    say(out, f"Timing this machine's kernels on the network's layers ({path})")
    return calibrate(network, inputs, profile=path, kernels=kernels, spread=0, progress=progress)


def _known(path: Path, network: nn.Module) -> DeviceProfile:
    """The profile in a file, if it is of this machine."""
    known = DeviceProfile.load(path)
    known.require(Machine.here(*placement(network)))
    return known


def _write(trainer: Trainer, result: SearchResult, folder: Path) -> None:
    if not result.is_front:  # of a front, nobody has chosen a plan yet
        result.plan.save(folder / "plan.yaml")
        write_recipe(trainer, result, folder / "recipe.yaml")
    result.save(folder / "search_result.json")  # last: where it stands, the others do


def _report(folder: Path, study: Study, result: SearchResult) -> None:
    """Write the trials, so that a page needs no database, and the page."""
    save_trials(folder / "trials.json", study, unit=result.unit)
    report(folder)


def _say_result(out: Console, result: SearchResult, folder: Path) -> None:
    if result.is_front:
        points = ", ".join(f"{point['cost']:.4g} {result.unit} at {point['accuracy']:.4f}" for point in result.front)
        say(
            out,
            f"front of {result.objective} and {result.metric} (dense {result.dense_cost:.4g} {result.unit} at "
            f"{result.dense_accuracy:.4f}): {points or 'nothing was evaluated'}",
        )
        say(out, f"written: {folder}/search_result.json, trials.json, report.html; the plans are in the first")
        return
    verdict = "feasible" if result.feasible else "NOT feasible: the nearest plan found is reported"
    if not len(result.plan) and not result.bits:
        verdict = f"NOTHING found that is cheaper than the dense network ({result.details.get('stopped')})"
    say(
        out,
        f"{result.metric} {result.accuracy:.4f} (dense {result.dense_accuracy:.4f}, drop {result.drop:.4f} of at most "
        f"{result.max_drop:g}): {verdict}",
    )
    if result.quantization:
        say(
            out,
            f"quantised ({result.quantization}): {len(result.bits)} layers; in floating point it is "
            f"{result.float_accuracy:.4f}, and the dense network, quantised, {result.quantized_dense_accuracy:.4f}",
        )
    if not math.isnan(result.measured_latency_s):
        say(
            out,
            f"{result.measured_latency_s * 1e3:.4g} ms a pass, dense {result.dense_measured_latency_s * 1e3:.4g} ms: "
            f"{result.speedup:.2f}x measured, {result.dense_latency_s / result.latency_s:.2f}x estimated; "
            f"{result.sparsity:.1%} of the weights removed in {result.evaluations} evaluations",
        )
        if result.disagreement:
            say(out, result.disagreement)
    say(out, f"written: {folder}/search_result.json, plan.yaml, recipe.yaml, trials.json, report.html")
