"""What a Trainer knows about the training at hand, in the words of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_prune.moments import Length, Unit
from lightning_prune.rewinding import Scheduler


def callbacks(trainer: Trainer) -> list[Callback]:
    """Its callbacks."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector that mypy does not see


def refuse_shards(trainer: Trainer, this: Callback) -> None:
    """Raise where no process has whole weights, for a callback that needs them.

    Raises:
        ValueError: under FSDP, DeepSpeed and model parallelism.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{type(this).__name__} needs whole weights, {type(trainer.strategy).__name__} shards them; train on one "
            "device or with strategy='ddp'"
        )


def schedulers(trainer: Trainer) -> list[Scheduler]:
    """Its learning-rate schedulers."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def length(trainer: Trainer, pl_module: LightningModule, max_epochs: int | None) -> Length:
    """What is known about the length of the training; sets up the training loader.

    Args:
        trainer: who trains.
        pl_module: what is trained.
        max_epochs: as the user gave it; `StochasticWeightAveraging` adds an epoch in which nothing is learned.
    """
    epochs = max_epochs if max_epochs is not None and max_epochs >= 0 else None
    accumulation = [other for other in callbacks(trainer) if isinstance(other, GradientAccumulationScheduler)]
    if any(len(set(scheduler.scheduling.values())) > 1 for scheduler in accumulation):
        return Length(steps=None, steps_per_epoch=None, epochs=epochs)  # epochs of different numbers of steps
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None
    limits = [] if steps_per_epoch is None or epochs is None else [steps_per_epoch * epochs]
    if trainer.max_steps >= 0:
        # Lightning counts the steps of every optimizer; under manual optimization we count batches.
        optimizers = 1 if pl_module.automatic_optimization else max(len(trainer.optimizers), 1)
        limits.append(trainer.max_steps // optimizers)
    return Length(min(limits) if limits else None, steps_per_epoch, epochs)


def position(trainer: Trainer, pl_module: LightningModule, unit: Unit) -> int:
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
    best = [each for each in checkpoints if each.monitor and each.best_model_path and each.best_model_score is not None]
    return [
        *(
            f"best {each.monitor} {float(each.best_model_score or 0.0):.4f}: {each.best_model_path}"
            for each in sorted(best, key=lambda each: not str(each.monitor).endswith("_at_target"))
        ),
        *(f"watch it: tensorboard --logdir {board.save_dir}" for board in tensorboards(trainer)),
    ]


def averages(trainer: Trainer) -> list[nn.Module]:
    """Averaged copies of the model that callbacks keep, whose weights will replace the model's."""
    keepers = [each for each in callbacks(trainer) if isinstance(each, WeightAveraging | StochasticWeightAveraging)]
    return [value for keeper in keepers for value in vars(keeper).values() if isinstance(value, nn.Module)]


def gradients_may_change(trainer: Trainer, pl_module: LightningModule, after: Callback) -> bool:
    """Whether anything has the chance to change gradients between the hook of the callback `after` and the step."""
    later = callbacks(trainer)[callbacks(trainer).index(after) + 1 :]
    return (
        is_overridden("on_before_optimizer_step", pl_module)
        or is_overridden("configure_gradient_clipping", pl_module)
        or any(is_overridden("on_before_optimizer_step", each) and type(each) is not type(after) for each in later)
        or any(optimizer._optimizer_step_pre_hooks for optimizer in trainer.optimizers)
    )
