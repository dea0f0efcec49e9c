"""What a Trainer knows about the training at hand, in the words of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.moments import Length
from lightning_prune.rewinding import Scheduler


def callbacks(trainer: Trainer) -> list[Callback]:
    """Its callbacks."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector that mypy does not see


def schedulers(trainer: Trainer) -> list[Scheduler]:
    """Its learning-rate schedulers."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def length(trainer: Trainer, pl_module: LightningModule) -> Length:
    """What is known about the length of the training; sets up the training loader."""
    accumulation = [other for other in callbacks(trainer) if isinstance(other, GradientAccumulationScheduler)]
    if any(len(set(scheduler.scheduling.values())) > 1 for scheduler in accumulation):
        return Length(steps=None, steps_per_epoch=None)  # epochs of different numbers of steps
    trainer.fit_loop.setup_data()
    estimate = trainer.estimated_stepping_batches
    steps = int(estimate) if math.isfinite(estimate) and estimate > 0 else None
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        return Length(steps, steps_per_epoch=None)
    if not pl_module.automatic_optimization and steps is not None and trainer.max_steps > 0:
        # Lightning counts the steps of every optimizer; under manual optimization we count batches.
        steps = min(steps, trainer.max_steps // max(len(trainer.optimizers), 1))
    return Length(steps, steps_per_epoch=math.ceil(batches / trainer.accumulate_grad_batches))


def position(trainer: Trainer, pl_module: LightningModule, unit: Literal["steps", "epochs"]) -> int:
    """How far the training has come; under manual optimization a step is a batch."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    if unit == "epochs":
        epochs: Any = trainer.fit_loop.epoch_progress.total
        underway = epochs.started > epochs.processed
        return int(epochs.processed + (underway and batches.is_last_batch))
    return trainer.global_step if pl_module.automatic_optimization else int(batches.total.processed)


def is_validating(trainer: Trainer) -> bool:
    """Whether a validation under way is part of training."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """Those of its loggers that can take more than scalars."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Tell every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=trainer.global_step)


def modes(trainer: Trainer) -> dict[str, str]:
    """Metric -> "min" or "max", as checkpoints and early stopping have been told."""
    return {
        callback.monitor: callback.mode
        for callback in callbacks(trainer)
        if isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor
    }


def whereabouts(trainer: Trainer) -> list[str]:
    """What a user may want to do with what the training has written."""
    checkpoints = [callback for callback in callbacks(trainer) if isinstance(callback, ModelCheckpoint)]
    return [
        *(
            f"best {each.monitor}: {each.best_model_path}"
            for each in checkpoints
            if each.monitor and each.best_model_path
        ),
        *(f"watch it: tensorboard --logdir {board.save_dir}" for board in tensorboards(trainer)),
    ]
