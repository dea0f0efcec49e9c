"""The `Pruning` callback: decides *when* a `Pruner` does its work during `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_prune import rewinding
from lightning_prune.callbacks import _training
from lightning_prune.callbacks._windowed import Windowed, check_kind
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.moments import Length, Moment, Window, check_moment, position_of
from lightning_prune.plan import Share, SparsityPlan
from lightning_prune.pruner import Pruner, refuse_changes
from lightning_prune.rewinding import Rewinding
from lightning_prune.schedules import AGP, Schedule


class Pruning(Windowed[Pruner]):
    """Prunes a network while it trains.

    At each update the sparsity of parameter `i` is `s_i + (t_i - s_i) * f(p)`, with `s` the initial and `t` the target
    plan, `f` the schedule and `p` the share of the window from `begin` to `end` that has passed. Removed weights are
    exactly 0 from then on, under any optimizer. The target is reached exactly at `end`, whatever the cadence.

    A structured target counts weights, not groups: filters are removed until the share of removed weights is as close
    to the target as whole filters allow (see `lightning_prune.masks`).

    Beside every metric `m` in `trainer.callback_metrics` there is `m_at_target`, NaN if it was measured before all
    masks had reached their targets. A `ModelCheckpoint` that monitors such a metric, as in
    `ModelCheckpoint(monitor="val_acc_at_target", mode="max")`, keeps best models at full sparsity only, and an
    `EarlyStopping` (listed after this callback) loses no patience before. Such a checkpoint's `save_last`
    waits as well: to resume what was interrupted earlier, add a `ModelCheckpoint` without monitor.

    Args:
        sparsity: the target: one number for all conv and linear weights, a map of name patterns to numbers, a
            `SparsityPlan`, or the path of a saved one. Always the fraction removed, in [0, 1], of the original count.
        schedule: how the way to the target is divided up.
        criterion: which weights go first.
        granularity: which weights go together; an entry of a plan may have its own.
        scope: who competes: "global" (all that share an entry of the plan), "local" (each parameter for itself),
            "filter" (each filter for itself), or a map of group names to lists of name patterns.
        initial: the plan to start from, given as `sparsity` is.
        begin: of the window: a share of the training, `Epochs(n)` or `Steps(n)`.
        end: of the window; training after it is fine-tuning.
        every: the interval between updates; a hundredth of the window unless given.
        rewind: go back in training after each update that removes weights: `WeightRewinding`, `LearningRateRewinding`.
        regrow: let removed weights return if their scores say so; scores made of the weight alone never do.

    Raises:
        ValueError: on anything that cannot work, before training starts; the message names value and remedy.

    >>> Pruning(0.9, begin=0.6, end=0.5)
    Traceback (most recent call last):
    ValueError: Pruning needs begin < end, got begin=0.6, end=0.5; lower begin or raise end
    """

    def __init__(
        self,
        sparsity: float | SparsityPlan | Mapping[str, Share] | str | Path,
        schedule: Schedule = AGP(),  # noqa: B008  frozen
        criterion: Criterion = Magnitude(),  # noqa: B008
        granularity: Granularity = Unstructured(),  # noqa: B008
        scope: str | dict[str, list[str] | str] = "global",
        initial: float | SparsityPlan | Mapping[str, Share] | str | Path = 0.0,
        begin: Moment = 0.0,
        end: Moment = 0.75,
        every: Moment | None = None,
        rewind: Rewinding | None = None,
        regrow: bool = False,
    ) -> None:
        check_kind("schedule", schedule, Schedule, "AGP()")
        super().__init__(sparsity, criterion, granularity, scope, begin, end, every)
        if rewind is not None:
            check_moment("rewind.to", rewind.to)
            if not schedule.stepwise:
                raise ValueError(
                    f"{schedule} changes masks at every update, so {rewind} would undo all training in between; use "
                    "OneShot() or Iterative(steps)"
                )
        self.initial = SparsityPlan.of(initial)
        self.schedule = schedule
        self.rewind, self.regrow = rewind, regrow
        self._rewind_position = 0

    def _forget(self) -> None:
        super()._forget()
        self._snapshot: rewinding.Snapshot | None = None

    @property
    def pruner(self) -> Pruner:
        """What does the work; it exists once `fit` has started.

        Raises:
            RuntimeError: before that.
        """
        return self._at_work()

    @property
    def initial_plan(self) -> SparsityPlan:
        """Where pruning starts from, by plain parameter names once `fit` has started."""
        return self._worker.initial_plan if self._worker else self.initial

    @property
    def updates(self) -> int:
        """Number of mask updates so far."""
        return self._worker.updates if self._worker else 0

    @property
    def at_target(self) -> bool:
        """Whether the masks have reached the target plan."""
        return self._worker is not None and self._worker.at_target

    def state_dict(self) -> dict[str, Any]:
        """Masks, progress, and what criterion and rewinding remember: tensors and plain containers."""
        if self._worker is None:
            return {}
        return {
            "settings": self._settings(),
            "pruner": self._worker.state_dict(),
            "progress": self._progress,
            "snapshot": self._snapshot,
        }

    def _hire(self, pl_module: LightningModule) -> Pruner:
        return Pruner(
            pl_module,
            self.target,
            initial=self.initial if any(self.initial.values()) else None,
            criterion=self.criterion,
            granularity=self.granularity,
            scope=self.scope,
            regrow=self.regrow,
        )

    def _restore(self, worker: Pruner, state: dict[str, Any]) -> None:
        refuse_changes(state["settings"], self._settings())
        worker.load_state_dict(state["pruner"])
        self._progress, self._snapshot = state["progress"], state["snapshot"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, after the sanity check and the finders, which may have changed the number of steps."""
        self._place(trainer, pl_module)
        self.pruner.begin()
        gradients_stay = not _training.gradients_may_change(trainer, pl_module, after=self)
        self.pruner.attach(trainer.optimizers, gradients_stay)
        self._enforce(trainer)
        if self is _all(trainer)[0]:
            self._gate.hold(trainer)
        if self is _all(trainer)[-1]:  # all have found their windows
            _advance(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are complete, unscaled and not yet clipped."""
        self.pruner.observe(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update masks if one is due, right after an optimizer step that really happened."""
        if self is _all(trainer)[0] and any([each.pruner.stepped() for each in _all(trainer)]):  # noqa: C419  asks all
            _advance(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the metrics of validation once more, under names that count only at full sparsity."""
        if _training.is_validating(trainer) and self is _all(trainer)[0]:
            self._gate.publish(trainer, _at_target(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report weights that have diverged; publish training metrics for checkpoints that monitor them."""
        for name in self.pruner.diverged():
            self._warn(
                f"weights of {name!r} are NaN or infinite: training has diverged; lower the learning rate, clip "
                "gradients, or resume from an earlier checkpoint"
            )
        if self is _all(trainer)[0]:
            self._gate.publish(trainer, _at_target(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for an update that no step followed, and say so if the target was not reached."""
        if self is _all(trainer)[0]:
            _advance(trainer, pl_module)
        self._enforce(trainer)
        self._let_go()
        if not self.at_target and self._window is not None:
            unit = self._window.unit
            self._warn(
                f"training stopped after {_training.position(trainer, pl_module, unit)} {unit}, pruning ends after "
                f"{self._window.end}: the plan was not reached; train longer, or lower end"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask once more what other callbacks, such as weight averaging, wrote into the model at the end."""
        self.pruner.enforce()

    def _settings(self) -> dict[str, str]:
        """What must not change when a training is resumed, beyond what the pruner itself compares."""
        return {"schedule": str(self.schedule), "rewind": str(self.rewind)}

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rewind_position = 0  # of a trial run
        super()._place(trainer, pl_module)

    def _placed(self, found: Window, length: Length) -> Window:
        starts_pruned = self.schedule(0.0) > 0 or any(self.initial.values())
        if self.criterion.uses_gradient and found.begin == 0 and starts_pruned:
            raise ValueError(
                f"{self.criterion} needs gradients, but {self.schedule} prunes before the first optimizer step; begin "
                "later, for example begin=Steps(1)"
            )
        if self.rewind is not None:
            unit = found.unit
            self._rewind_position = position_of("rewind.to", self.rewind.to, length, unit)
            if self._rewind_position > found.begin:
                raise ValueError(
                    f"rewinding to {self.rewind.to}, after {self._rewind_position} {unit}, needs pruning to begin no "
                    f"earlier, but it begins after {found.begin}; raise begin or lower rewind.to"
                )
        return found

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Update masks if the window has moved on; whether training is to be rewound for it."""
        if self._window is None:
            return False
        position = _training.position(trainer, pl_module, self._window.unit)
        if self.rewind is not None and self._snapshot is None and position >= self._rewind_position:
            schedulers = _training.schedulers(trainer)
            self._snapshot = rewinding.take(self.rewind, pl_module, trainer.optimizers, schedulers)
        progress = self._due(trainer, pl_module)
        if progress is None:
            return False
        self._progress = progress
        removed = self.pruner.removed
        self.pruner.update(self.schedule(progress), trainer.strategy.broadcast if trainer.world_size > 1 else None)
        return self._snapshot is not None and self.pruner.removed > removed and position > self._rewind_position

    def _enforce(self, trainer: Trainer) -> None:
        """Zero removed weights wherever they live: model, optimizer state, averages kept by other callbacks."""
        self.pruner.enforce(trainer.optimizers, _training.averages(trainer))


def _all(trainer: Trainer) -> list[Pruning]:
    return [callback for callback in _training.callbacks(trainer) if isinstance(callback, Pruning)]


def _at_target(trainer: Trainer) -> bool:
    return all(callback.at_target for callback in _all(trainer))


def _advance(trainer: Trainer, pl_module: LightningModule) -> None:
    """Update the masks of all callbacks that are due, and only then rewind: none may score rewound weights."""
    before = [callback.updates for callback in _all(trainer)]
    rewound = [callback for callback in _all(trainer) if callback._update(trainer, pl_module)]
    for callback in rewound:
        if callback._snapshot is not None:
            rewinding.restore(callback._snapshot, pl_module, trainer.optimizers, _training.schedulers(trainer))
    if before != [callback.updates for callback in _all(trainer)]:
        for callback in _all(trainer):
            callback._enforce(trainer)
    if _at_target(trainer):
        _all(trainer)[0]._gate.release()
