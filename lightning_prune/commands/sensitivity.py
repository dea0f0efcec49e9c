"""`lightning-prune sensitivity`: what each layer costs when it is pruned alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_prune.commands.network import network_of
from lightning_prune.commands.validation import Step, averages, require_validation, step_totals, validated
from lightning_prune.criteria import Criterion
from lightning_prune.figures import to_array
from lightning_prune.files import write_file
from lightning_prune.granularities import Granularity
from lightning_prune.preparation import cloned
from lightning_prune.search.curves import Sensitivity, checked_levels
from lightning_prune.search.partial import Totals, fingerprint
from lightning_prune.search.scan import Scan, matched_names, require_weights_alone
from lightning_prune.search.sensitivity import bar, generators_kept, rows
from lightning_prune.targets import closest
from lightning_prune.terminal import console, say


def run(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    *,
    levels: Sequence[float],
    names: Sequence[str] | None,
    metrics: Sequence[str] | None,
    criterion: Criterion,
    granularity: Granularity,
    ckpt_path: str | Path | None,
    weights_only: bool | None,
    reuse: bool,
    output: str | Path | None,
) -> Sensitivity:
    """See `PruneTrainer.sensitivity`."""
    out = console()
    levels = checked_levels(levels)
    require_weights_alone(criterion)
    require_validation(trainer, model)
    if "mixed" in str(trainer.precision):
        raise ValueError(
            f"sensitivity needs weights of one type, and trainer.precision={trainer.precision!r} mixes two; give "
            "--trainer.precision 32-true"
        )
    network = network_of(trainer, model, ckpt_path, weights_only)
    found = matched_names(network, names)
    folder = _folder(trainer, ckpt_path) if output is None else Path(output)
    partial = folder / "sensitivity.partial.json"
    progress = trainer.progress_bar_callback is not None
    with generators_kept(network):
        dense = _Dense.of(trainer, network, datamodule)
        wanted = dense.wanted(metrics)
        whole = [name for name in wanted if name not in dense.averages]
        if whole:
            say(
                out,
                f"{', '.join(whole)}: no average over examples that a step logs, so each layer and level is validated "
                f"whole, {len(found) * len(levels)} times {dense.batches} batches; name other metrics with --metrics "
                "to have the fast way",
                "yellow",
            )
        per_batch = len(found) * len(levels)
        total = per_batch * (1 if whole else dense.batches)
        with bar(progress, f"Sensitivity of {type(model).__name__}", total) as advance:
            scan = Scan(
                network,
                names=found,
                levels=levels,
                criterion=criterion,
                granularity=granularity,
                reuse=reuse and not whole,
                partial=partial,
                progress=advance,
            )
            try:
                if whole:
                    _whole(scan, trainer, network, datamodule, wanted, dense)
                else:
                    _by_batch(scan, trainer, network, datamodule, wanted)
            except KeyboardInterrupt:
                say(out, _interrupted(partial))
                raise
        result = scan.result()
    times = dense.batches if whole else 1
    extra = dense.batches * (2 if whole else 3)  # the ordinary runs, of which the first one also looks into each step
    result = replace(
        result,
        forward_passes=result.forward_passes * times + extra,
        full_passes=result.full_passes * times + extra,
        plain_passes=result.plain_passes * times,
    )
    _write(trainer, result, folder, f"{type(model).__name__}, {result.examples} examples, {granularity}")
    _print(out, result, type(model).__name__, folder)
    return result


@dataclass
class _Dense:
    """An ordinary validation of the dense network.

    Args:
        logged: what Lightning gives.
        totals: metric -> sum over examples and their number, as steps log it.
        batches: how many.
        examples: in them.
    """

    logged: Mapping[str, float] = field(default_factory=dict)
    totals: dict[str, list[float]] = field(default_factory=dict)
    batches: int = 0
    examples: int = 0

    @classmethod
    def of(cls, trainer: Trainer, network: LightningModule, datamodule: LightningDataModule | None) -> _Dense:
        """Validate once.

        Raises:
            ValueError: there are no data, or nothing is logged.
        """
        dense = cls()

        def observed(step: Step) -> Step:
            def observe(batch: Any, *args: Any) -> Any:
                totals = step_totals(network, lambda: step(cloned(batch), *args), batch)
                for name, (amount, number) in totals.items():
                    held = dense.totals.setdefault(name, [0.0, 0.0])
                    held[0] += amount
                    held[1] += number
                dense.batches += 1
                dense.examples += rows(batch)
                return step(batch, *args)

            return observe

        dense.logged = validated(trainer, network, datamodule, observed)
        if not dense.batches:
            raise ValueError(
                "there are no validation data: the validation loader is empty, or --trainer.limit_val_batches is 0"
            )
        if not dense.logged:
            raise ValueError(
                f"the validation_step of {type(network).__name__} logs nothing; log a metric with self.log(name, value)"
            )
        return dense

    @property
    def averages(self) -> set[str]:
        """The metrics that batches add up to."""
        return averages(self.totals, self.logged)

    def wanted(self, metrics: Sequence[str] | None) -> list[str]:
        """The metrics to look at, all that are logged by default.

        Raises:
            ValueError: one of them is never logged.
        """
        for name in metrics or ():
            if name not in self.logged:
                raise ValueError(
                    f"the metric {name!r} is never logged in validation; closest: {closest(name, self.logged)}"
                )
        return list(metrics or self.logged)


def _by_batch(
    scan: Scan,
    trainer: Trainer,
    network: LightningModule,
    datamodule: LightningDataModule | None,
    wanted: Sequence[str],
) -> None:
    """One validation, whose steps run each batch through all networks."""

    def scanned(step: Step) -> Step:
        def scan_batch(batch: Any, *args: Any) -> Any:
            def run() -> Totals:
                totals = step_totals(network, lambda: step(cloned(batch), *args), batch)
                return {name: totals[name] for name in wanted if name in totals}

            scan.add(fingerprint(batch), rows(batch), run)
            return step(batch, *args)  # what the end of the epoch expects to have happened

        return scan_batch

    validated(trainer, network, datamodule, scanned)


def _whole(
    scan: Scan,
    trainer: Trainer,
    network: LightningModule,
    datamodule: LightningDataModule | None,
    wanted: Sequence[str],
    dense: _Dense,
) -> None:
    """One validation for each network."""

    def run() -> Totals:
        logged = validated(trainer, network, datamodule)
        return {name: (logged[name], 1.0) for name in wanted if name in logged}

    scan.add(hashlib.sha256(repr(sorted(dense.logged.items())).encode()).digest(), dense.examples, run)


def _folder(trainer: Trainer, ckpt_path: str | Path | None) -> Path:
    """`sensitivity` in the folder of the run: of the checkpoint's, or else of a new one."""
    if ckpt_path is not None and Path(ckpt_path).parent.name == "checkpoints":
        return Path(ckpt_path).parents[1] / "sensitivity"
    return Path(trainer.log_dir or trainer.default_root_dir) / "sensitivity"


def _interrupted(partial: Path) -> str:
    if not partial.exists():
        return "Interrupted: nothing was finished yet."
    return (
        f"Interrupted: what was finished is kept; the same command with --output {partial.parent} goes on from there."
    )


def _write(trainer: Trainer, result: Sensitivity, folder: Path, title: str) -> None:
    from lightning_prune.search.figures import sensitivity_figure

    result.save(folder / "sensitivity.json")
    result.to_csv(folder / "sensitivity.csv")
    figure = sensitivity_figure(result, result.metrics, title)
    write_file(folder / "sensitivity.png", lambda file: figure.savefig(file, format="png"))
    if trainer.logger is not None:
        from torch.utils.tensorboard import SummaryWriter

        # Beside the files, so that TensorBoard shows it with the run whose weights these are.
        with SummaryWriter(str(folder)) as writer:
            writer.add_image("sensitivity", to_array(figure), dataformats="HWC")


def _print(out: Console, result: Sensitivity, model: str, folder: Path) -> None:
    metric = next((name for name in result.metrics if "acc" in name), result.metrics[0])
    say(out, f"{metric} of {model} with one layer pruned, dense {result.dense[metric]:.4g}", "bold")
    out.print(_table(result, metric))
    if strange := result.not_finite:
        cells = ", ".join(f"{metric} of {name} at {level:g}" for metric, name, level in strange[:3])
        say(out, f"Not finite in {len(strange)} cells: {cells}{', …' if len(strange) > 3 else ''}", "yellow")
    say(
        out,
        f"{result.examples} examples; {result.forward_passes} forward passes of a batch, the work of "
        f"{result.full_passes:.4g} whole ones, where {result.plain_passes} would be run without reuse",
    )
    for name in ("json", "csv", "png"):
        say(out, f"written: {folder / f'sensitivity.{name}'}")


def _table(result: Sensitivity, metric: str) -> Table:
    """A row per layer, a column per level."""
    table = Table()
    table.add_column("layer", overflow="fold")
    for level in result.levels:
        table.add_column(f"{level:g}", justify="right")
    for name, cells in zip(result.names, _cells(result, metric), strict=True):
        table.add_row(escape(name), *cells)
    return table


def _cells(result: Sensitivity, metric: str) -> Iterator[list[str]]:
    for row in result.values[metric]:
        yield [f"{value:.4g}" if math.isfinite(value) else str(value) for value in row]
