"""SparsityMonitor: what pruning does to a network, in every logger, in TensorBoard and in the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_prune import metrics, targets
from lightning_prune.callbacks import _training
from lightning_prune.callbacks._histograms import Histograms
from lightning_prune.callbacks._hparams import Session
from lightning_prune.callbacks._latency import TAGS, Latency, settings_of
from lightning_prune.callbacks._prunings import Prunings, removed
from lightning_prune.callbacks._records import Records
from lightning_prune.figures import layer_figure, to_array
from lightning_prune.latency.profile import DeviceProfile
from lightning_prune.layers import LayerTable, layer_table
from lightning_prune.metrics import Count
from lightning_prune.summary import LayerRow, Summary, Totals, layer_rows, to_markdown, to_rich
from lightning_prune.terminal import console, say

_AT_TARGET = "_at_target"
_SIZES = ("sparsity/global", "compression_ratio", "theoretical_speedup")


class SparsityMonitor(Callback):
    """Shows what pruning does: scalars in any logger, more in TensorBoard, a table in the terminal at the end.

    All numbers are counted in the weights. The callback reads: it changes no weight, no gradient and no
    random state. It works with any number of `Pruning` callbacks, before or after them, or without.

    | tag | where | when |
    |---|---|---|
    | `sparsity/global` | every logger, `trainer.callback_metrics` | start, mask updates, epoch ends, end |
    | `sparsity/<parameter>` | every logger | likewise |
    | `sparsity/target` | every logger; only with `Pruning` | likewise |
    | `compression_ratio`, `theoretical_speedup` | every logger, `trainer.callback_metrics` | likewise |
    | `latency/estimated_ms`, `latency/dense_ms`, `latency/speedup` | every logger, `trainer.callback_metrics`; only \
with `profile` | likewise |
    | `mask/churn` | every logger; only with `Pruning` | mask updates |
    | `summary/<metric>_before`, `_best`, `_last` | every logger | end |
    | `weights/<parameter>`, `weights_kept/<parameter>` | TensorBoard, histograms | start; before the first weight is \
removed; before and after the target is reached; end |
    | `layers` | TensorBoard, images | start, end |
    | `summary` | TensorBoard, text | end |
    | `pruning/...`, `latency/...` beside the user's own | TensorBoard, hparams | start, final metrics at the end |
    | `pruning`, `latency` | hyperparameters of every other logger | start |

    `sparsity/global` and `sparsity/<parameter>` are about the weights of linear and convolution layers and whatever
    else a `Pruning` callback names; `compression_ratio` is about all parameters (see `lightning_prune.metrics`).
    `weights_kept` leaves out the exact zeros, whose spike hides the shape of the rest. A histogram "before" was
    counted ahead of the last batch of an epoch, or at the mask update before, whichever came later. Only the first
    process logs and prints.

    Latency is an estimate for the device of `profile`, which need not be the one that trains, from the zeros that are
    really there and in the pattern in which `Pruning` removes them. It holds for the batch size of the example, and
    `lightning-prune calibrate` measures for that of `example_input_array`.

    Args:
        every_n_epochs: epochs between logs while the masks stand still.
        histograms: whether to write weight histograms.
        figures: whether to write the figure of the layers.
        summary: whether to print the final table; it is in TensorBoard either way.
        progress_bar: whether to show `sparsity` there.
        example_inputs: what `layer_table` runs the module on to count multiplications; the module's
            `example_input_array` by default, else one example of the first training batch.
        profile: a `DeviceProfile` or the path of one, to estimate latency with.

    Raises:
        ValueError: if `every_n_epochs` is below 1, the profile is none, or, when fit starts, it does not know the
            model's layers.
        FileNotFoundError: if there is no such profile.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        histograms: bool = True,
        figures: bool = True,
        summary: bool = True,
        progress_bar: bool = False,
        example_inputs: Any = None,
        profile: DeviceProfile | str | Path | None = None,
    ) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise ValueError(f"SparsityMonitor needs every_n_epochs >= 1, got every_n_epochs={every_n_epochs!r}")
        self.every_n_epochs = every_n_epochs
        self.histograms = histograms
        self.figures = figures
        self.summary = summary
        self.progress_bar = progress_bar
        self.example_inputs = example_inputs
        self.profile = DeviceProfile.load(profile) if isinstance(profile, str | Path) else profile
        self._restart()

    def _restart(self) -> None:
        """Be as new, for another fit."""
        self._records = Records()
        self._before: dict[str, int] = {}  # entries kept when the run began
        self._updates: int | None = None  # of masks that were seen; None: as many as there are when training starts
        self._started = False
        self._begun = False
        self._reached = False
        self._forget()

    def _forget(self) -> None:
        """Let go of the model and of all that is of no use outside a running fit."""
        self._prunings = Prunings([])
        self._masks: Mapping[str, Tensor] = {}
        self._table: LayerTable | None = None
        self._latency: Latency | None = None
        self._start: dict[str, Count] = {}
        self._histograms = Histograms([])
        self._logged: tuple[int, int | None] | None = None
        self._known: dict[str, Any] = {}
        self._session: Session | None = None

    def state_dict(self) -> dict[str, Any]:
        """What the summary of a resumed run needs: plain containers."""
        return {"records": self._records.state_dict(), "before": dict(self._before), "updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the records of the run that is resumed."""
        self._records.load_state_dict(state_dict["records"])
        self._before = dict(state_dict["before"])
        self._updates = state_dict["updates"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh with every fit; the state of a resumed one is loaded afterwards."""
        if stage == "fit":
            self._restart()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the weights before anybody removes one."""
        self._prunings = Prunings.of(trainer)
        self._start = metrics.count(pl_module)
        if not self._before:
            self._before = {name: each.kept for name, each in self._start.items()}
            # Masks of an earlier fit may still be there: Pruning drops them when training starts from its first step.
            self._updates = 0 if trainer.global_step == 0 and trainer.ckpt_path is None else None
        if trainer.is_global_zero:
            self._session = Session(_training.tensorboards(trainer))
            if self.histograms:
                self._histograms = Histograms(_training.tensorboards(trainer))
        self._take(trainer, pl_module)
        example = self._example(pl_module)
        if example is not None:
            self._build_table(pl_module, example)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the settings, now that Lightning has recorded the user's and Pruning knows its plan."""
        if self._updates is None or self._updates == self._prunings.updates:
            self._updates, self._masks = self._prunings.updates, self._prunings.masks
            self._begun, self._reached = self._prunings.begun, self._prunings.at_target
        settings = self._prunings.settings(self._start)
        if self.profile is not None:
            settings["latency"] = settings_of(self.profile)
        if self._session is not None:
            self._session.start(settings)
        for logger in trainer.loggers:
            if settings and not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the start, once there is a batch to count multiplications on."""
        if not self._started:
            if self._example(pl_module) is None:
                self._build_table(pl_module, _one_example(batch))
            self._open(trainer, pl_module)
        self._follow(trainer, pl_module)
        if trainer.is_last_batch and not self._reached:
            self._take(trainer, pl_module)  # a mask update is most likely at the end of an epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if the masks have changed."""
        self._follow(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log also what stands still."""
        self._follow(trainer, pl_module)
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._log(trainer, pl_module, metrics.count(pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is known already, to tell which metrics validation brings."""
        if _training.is_validating(trainer):
            self._follow(trainer, pl_module)
            self._known = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics."""
        if not _training.is_validating(trainer):
            return
        modes = _training.modes(trainer)
        self._records.modes.update({name.removesuffix(_AT_TARGET): mode for name, mode in modes.items()})
        new = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if self._known.get(name) is not value and not name.endswith(_AT_TARGET)
        }
        dense = bool(self._prunings) and not self._prunings.begun
        self._records.add(new, dense, self._prunings.at_target)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the end and say what it all came to.

        Not in `on_fit_end`: there `Pruning` masks once more what weight averaging wrote into the model.
        """
        if stage == "fit" and self._start:
            if not self._started:
                self._open(trainer, pl_module)
            self._follow(trainer, pl_module)
            self._close(trainer, pl_module)
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the loggers as they were."""
        if self._session is not None:
            self._session.release()
        self._forget()

    # The moments of a run

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The start, as it was when fit began."""
        self._started = True
        self._log(trainer, pl_module, self._start)
        # Counted when fit began; of a resumed run only now is it known at which step that was.
        self._histograms.write(self._names(pl_module), step=trainer.global_step)
        self._add_figure(trainer, pl_module, self._start, "Start of fit")

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a mask update, if there was one."""
        if self._prunings.updates == self._updates:
            return
        before = self._masks
        self._updates, self._masks = self._prunings.updates, self._prunings.masks
        self._log(trainer, pl_module, metrics.count(pl_module), {"mask/churn": metrics.churn(before, self._masks)})
        if self._reached:
            return
        first = not self._begun and self._prunings.begun
        self._begun, self._reached = self._begun or first, self._prunings.at_target
        if first or self._reached:
            self._histograms.write(self._names(pl_module))
        self._take(trainer, pl_module)
        if self._reached:
            self._histograms.write(self._names(pl_module))

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end."""
        counts = metrics.count(pl_module)
        self._log(trainer, pl_module, counts)
        if not trainer.is_global_zero:
            return
        self._take(trainer, pl_module)
        self._histograms.write(self._names(pl_module))
        self._add_figure(trainer, pl_module, counts, "End of fit")
        report = self._report(pl_module, counts)
        _training.log_scalars(trainer, report.scalars())
        notes = [] if self._latency is None else [self._latency.line(self._estimates(counts))]
        for board in _training.tensorboards(trainer):
            board.experiment.add_text("summary", "\n\n".join([to_markdown(report), *notes]), trainer.global_step)
        if self._session is not None:
            sizes = [name for name in _SIZES if name != "theoretical_speedup" or self._table is not None]
            sizes += TAGS if self._latency is not None else ()
            own = [name for name in self._records.last if name == "hp_metric"]
            final = list(report.scalars())
            # TensorBoard shows the first five at once, the others when they are ticked.
            self._session.end([*own, *final[:4], *sizes, *final[4:]])
        for logger in trainer.loggers:
            logger.save()
        if self.summary:
            if trainer.progress_bar_callback is not None:
                # A bar that is still alive would draw itself over the table; it has nothing more to show.
                trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")
            terminal = console()
            terminal.print(to_rich(report))
            for line in (*notes, *_training.whereabouts(trainer)):
                say(terminal, line)

    # Numbers

    def _names(self, pl_module: LightningModule) -> list[str]:
        """The parameters that are reported one by one, in the model's order."""
        named = self._prunings.plan.keys() | targets.prunable(pl_module).keys()
        return [name for name in self._start if name in named]

    def _totals(self, pl_module: LightningModule, counts: Mapping[str, Count]) -> Totals:
        speedup = None if self._table is None else metrics.theoretical_speedup_of(counts, self._table)
        sparsity = metrics.sparsity_of(counts[name] for name in self._names(pl_module))
        return Totals(sparsity, metrics.compression_ratio_of(counts.values()), speedup)

    def _log(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        counts: Mapping[str, Count],
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Scalars to every logger, and to those who monitor metrics; nothing twice for one state."""
        state = (trainer.global_step, self._updates)
        if state == self._logged and not more:
            return
        self._logged = state
        totals = self._totals(pl_module, counts)
        sizes = {"sparsity/global": totals.sparsity, "compression_ratio": totals.compression_ratio}
        if totals.theoretical_speedup is not None:
            sizes["theoretical_speedup"] = totals.theoretical_speedup
        sizes |= self._estimates(counts)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in sizes.items()})
        if self.progress_bar:
            trainer.progress_bar_metrics["sparsity"] = totals.sparsity
        names = self._names(pl_module)
        scalars = sizes | {f"sparsity/{name}": counts[name].sparsity for name in names}
        if self._prunings:
            scalars["sparsity/target"] = removed(self._prunings.plan, counts, names)
        _training.log_scalars(trainer, scalars | dict(more or {}))

    def _estimates(self, counts: Mapping[str, Count]) -> dict[str, float]:
        return {} if self._latency is None else self._latency.scalars(counts, self._prunings.granularities)

    def _report(self, pl_module: LightningModule, counts: Mapping[str, Count]) -> Summary:
        started = {name: Count(each.shape, each.total, self._before[name]) for name, each in counts.items()}
        return Summary(
            before=self._totals(pl_module, started),
            after=self._totals(pl_module, counts),
            metrics=self._records.rows(),
            layers=self._rows(pl_module, counts),
            pruned=bool(self._prunings),
            at_target=self._prunings.at_target,
        )

    def _rows(self, pl_module: LightningModule, counts: Mapping[str, Count]) -> tuple[LayerRow, ...]:
        macs = {} if self._table is None else metrics.kept_macs(counts, self._table)
        return layer_rows({name: counts[name] for name in self._names(pl_module)}, macs)

    def _example(self, pl_module: LightningModule) -> Any:
        return pl_module.example_input_array if self.example_inputs is None else self.example_inputs

    def _build_table(self, pl_module: LightningModule, example: Any) -> None:
        if not is_overridden("forward", pl_module):
            self._without_table(
                f"SparsityMonitor counts no multiplications: {type(pl_module).__name__} has no forward; define it"
            )
            return
        try:
            self._table = layer_table(pl_module, example)
        except ValueError as error:
            self._without_table(
                f"SparsityMonitor leaves out multiplications and theoretical speedup: {str(error).rstrip('.')}; "
                "give SparsityMonitor(example_inputs=...)"
            )
            return
        if self.profile is not None:
            self._latency = Latency(self.profile, self._table)

    def _without_table(self, reason: str) -> None:
        """Do with less, unless an estimate was asked for, which needs the table."""
        if self.profile is not None:
            raise ValueError(f"SparsityMonitor(profile=...) cannot estimate latency. {reason}")
        warnings.warn(reason, stacklevel=3)

    # Pictures

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._histograms.take(targets.parameters(pl_module), trainer.global_step)

    def _add_figure(
        self, trainer: Trainer, pl_module: LightningModule, counts: Mapping[str, Count], moment: str
    ) -> None:
        loggers = _training.tensorboards(trainer)
        rows = self._rows(pl_module, counts)
        if not (self.figures and trainer.is_global_zero and loggers and rows):
            return
        totals = self._totals(pl_module, counts)
        title = f"{moment}: sparsity {totals.sparsity:.4f}, compression ratio {totals.compression_ratio:.2f}x"
        pixels = to_array(layer_figure(rows, title))
        for logger in loggers:
            logger.experiment.add_image("layers", pixels, trainer.global_step, dataformats="HWC")


def _one_example(batch: Any) -> Any:
    """What a module's forward is likely to take, of a batch: the first element of a pair, one example of a tensor."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return inputs[:1] if isinstance(inputs, Tensor) and inputs.ndim else inputs
