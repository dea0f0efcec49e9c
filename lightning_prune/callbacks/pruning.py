"""The `Pruning` callback: decides *when* a `Pruner` does its work during `fit`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_prune import rewinding
from lightning_prune.callbacks import _training
from lightning_prune.callbacks._gate import Gate
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.masks import Masks, Scope, pools
from lightning_prune.moments import Moment, Window, check_moment, check_order, position_of, window
from lightning_prune.plan import Share, SparsityPlan
from lightning_prune.pruner import Pruner, refuse_changes
from lightning_prune.rewinding import Rewinding
from lightning_prune.schedules import AGP, Schedule


class Pruning(Callback):
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
        super().__init__()
        for what, value, kind, example in (
            ("schedule", schedule, Schedule, "AGP()"),
            ("criterion", criterion, Criterion, "Magnitude()"),
            ("granularity", granularity, Granularity, "Unstructured()"),
        ):
            if not isinstance(value, kind):
                raise ValueError(f"{what} is an object such as {example}, got {value!r}; mind order and parentheses")
        for what, moment in (("begin", begin), ("end", end), ("every", every)):
            if moment is not None:
                check_moment(what, moment)
        check_order(begin, end)
        if rewind is not None:
            check_moment("rewind.to", rewind.to)
            if not schedule.stepwise:
                raise ValueError(
                    f"{schedule} changes masks at every update, so {rewind} would undo all training in between; use "
                    "OneShot() or Iterative(steps)"
                )
        self.target, self.initial = SparsityPlan.of(sparsity), SparsityPlan.of(initial)
        self.schedule, self.criterion, self.granularity = schedule, criterion, granularity
        self.scope: Scope = scope  # type: ignore[assignment]  # a word is checked here, names when the model is known
        pools(self.scope if isinstance(scope, str) else "global", {})
        self.begin, self.end, self.every = begin, end, every
        self.rewind, self.regrow = rewind, regrow
        self._gate = Gate()
        self._max_epochs: int | None = None
        self._pruner: Pruner | None = None
        self._window: Window | None = None
        self._rewind_position = 0
        self._forget()

    def _forget(self) -> None:
        self._progress: float | None = None
        self._snapshot: rewinding.Snapshot | None = None
        self._restored: dict[str, Any] = {}
        self._warned: set[str] = set()

    @property
    def pruner(self) -> Pruner:
        """What does the work; it exists once `fit` has started.

        Raises:
            RuntimeError: before that.
        """
        if self._pruner is None:
            raise RuntimeError("Pruning knows its model only once Trainer.fit has started")
        return self._pruner

    @property
    def masks(self) -> Masks:
        """Plain parameter name -> bool tensor, True where kept; another dict after every update, empty before."""
        return self._pruner.masks if self._pruner else {}

    @property
    def plan(self) -> SparsityPlan:
        """The target, by plain parameter names once `fit` has started."""
        return self._pruner.plan if self._pruner else self.target

    @property
    def initial_plan(self) -> SparsityPlan:
        """Where pruning starts from, by plain parameter names once `fit` has started."""
        return self._pruner.initial_plan if self._pruner else self.initial

    @property
    def updates(self) -> int:
        """Number of mask updates so far."""
        return self._pruner.updates if self._pruner else 0

    @property
    def at_target(self) -> bool:
        """Whether the masks have reached the target plan."""
        return self._pruner is not None and self._pruner.at_target

    @property
    def state_key(self) -> str:
        """Unique among callbacks that prune different parameters."""
        return f"Pruning[{','.join(self.target)}]"

    def state_dict(self) -> dict[str, Any]:
        """Masks, progress, and what criterion and rewinding remember: tensors and plain containers."""
        if self._pruner is None:
            return {}
        return {
            "settings": self._settings(),
            "pruner": self._pruner.state_dict(),
            "progress": self._progress,
            "snapshot": self._snapshot,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until `on_fit_start`, when model and plan can be compared with it."""
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a pruned training under another plan: its masks would be lost silently."""
        ours = {other.state_key for other in _all(trainer)}
        orphans = [key for key in checkpoint.get("callbacks", {}) if str(key).startswith("Pruning[")]
        orphans = [key for key in orphans if key not in ours]
        if orphans and trainer.state.fn == "fit":
            raise ValueError(
                f"the checkpoint was pruned by {orphans[0]}, this training has {sorted(ours)}: resuming needs the same "
                "plan; or start anew from its weights (LightningModule.load_from_checkpoint)"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that cannot work; state of an earlier run is not this run's."""
        self._restored = {}
        self._max_epochs = trainer.max_epochs
        if stage == "fit" and isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ValueError(
                f"Pruning needs whole weights, {type(trainer.strategy).__name__} shards them; train on one device or "
                "with strategy='ddp'"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Match plan and model, take up a checkpoint's state, and check the window: all before work starts."""
        pruner = Pruner(
            pl_module,
            self.target,
            initial=self.initial if any(self.initial.values()) else None,
            criterion=self.criterion,
            granularity=self.granularity,
            scope=self.scope,
            regrow=self.regrow,
        )
        _refuse_overlap(self, pruner.plan, trainer, pl_module)
        self._gate.check(trainer, before=self)
        previous, self._pruner = self._pruner, pruner
        if self._restored:
            refuse_changes(self._restored["settings"], self._settings())
            pruner.load_state_dict(self._restored["pruner"])
            self._progress, self._snapshot = self._restored["progress"], self._restored["snapshot"]
        elif trainer.global_step > 0 and previous is not None and previous.settings() == pruner.settings():
            pruner.load_state_dict(previous.state_dict())  # the same training goes on for more epochs
        else:
            self._forget()
        if trainer.ckpt_path is None:
            # A resumed training must not set up its loader before Lightning has restored the loops: the loader would
            # forget its place. So its window is placed when training starts.
            self._place(trainer, pl_module)

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

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of optimizers and callbacks."""
        self._let_go()

    def _let_go(self) -> None:
        self._gate.release()
        if self._pruner:
            self._pruner.detach()

    def _settings(self) -> dict[str, str]:
        """What must not change when a training is resumed, beyond what the pruner itself compares."""
        return {"schedule": str(self.schedule), "rewind": str(self.rewind)}

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the window in this training."""
        length = _training.length(trainer, pl_module, self._max_epochs)
        if trainer.fast_dev_run and length.steps:  # type: ignore[attr-defined]
            self._window = Window(0, length.steps, 1)  # a trial run of a few batches goes through everything
            self._rewind_position = 0
            return
        self._window = window(self.begin, self.end, self.every, length)
        starts_pruned = self.schedule(0.0) > 0 or any(self.initial.values())
        if self.criterion.uses_gradient and self._window.begin == 0 and starts_pruned:
            raise ValueError(
                f"{self.criterion} needs gradients, but {self.schedule} prunes before the first optimizer step; begin "
                "later, for example begin=Steps(1)"
            )
        if self.rewind is not None:
            unit = self._window.unit
            self._rewind_position = position_of("rewind.to", self.rewind.to, length, unit)
            if self._rewind_position > self._window.begin:
                raise ValueError(
                    f"rewinding to {self.rewind.to}, after {self._rewind_position} {unit}, needs pruning to begin no "
                    f"earlier, but it begins after {self._window.begin}; raise begin or lower rewind.to"
                )

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Update masks if the window has moved on; whether training is to be rewound for it."""
        if self._window is None:
            return False
        position = _training.position(trainer, pl_module, self._window.unit)
        if self.rewind is not None and self._snapshot is None and position >= self._rewind_position:
            schedulers = _training.schedulers(trainer)
            self._snapshot = rewinding.take(self.rewind, pl_module, trainer.optimizers, schedulers)
        progress = self._window.progress(position)
        # A training that is longer now than when its checkpoint was written may be earlier in its window: masks stay.
        if progress is None or (self._progress is not None and progress <= self._progress):
            return False
        self._progress = progress
        removed = self.pruner.removed
        self.pruner.update(self.schedule(progress), trainer.strategy.broadcast if trainer.world_size > 1 else None)
        return self._snapshot is not None and self.pruner.removed > removed and position > self._rewind_position

    def _enforce(self, trainer: Trainer) -> None:
        """Zero removed weights wherever they live: model, optimizer state, averages kept by other callbacks."""
        self.pruner.enforce(trainer.optimizers, _training.averages(trainer))

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def _all(trainer: Trainer) -> list[Pruning]:
    return [callback for callback in _training.callbacks(trainer) if isinstance(callback, Pruning)]


def _refuse_overlap(this: Pruning, plan: SparsityPlan, trainer: Trainer, pl_module: LightningModule) -> None:
    for other in _all(trainer):
        others = {name for name, share in other.target.resolve(pl_module).items() if share > 0}
        shared = sorted(others & set(plan))
        if other is not this and shared:
            raise ValueError(
                f"two Pruning callbacks prune {shared[0]!r} ({len(shared)} such); give each its own parameters by "
                "pattern, for example Pruning({'conv*': 0.7}) and Pruning({'fc*': 0.87})"
            )


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
