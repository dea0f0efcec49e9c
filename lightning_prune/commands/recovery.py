"""Fine-tuning of a search's winner, its zeros kept."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_prune.callbacks.learning_compression import LearningCompression
from lightning_prune.callbacks.pruning import Pruning
from lightning_prune.moments import Epochs
from lightning_prune.plan import SparsityPlan
from lightning_prune.preparation import inference_copy
from lightning_prune.rewinding import LearningRateRewinding
from lightning_prune.schedules import AGP, OneShot

RECOVERIES: dict[str, Callable[[SparsityPlan], Callback]] = {
    "one_shot": lambda plan: Pruning(plan, OneShot(), scope="local", end=0.01),
    "agp": lambda plan: Pruning(plan, AGP(), scope="local", end=0.5),
    "rewind": lambda plan: Pruning(
        plan, OneShot(), scope="local", end=0.01, rewind=LearningRateRewinding(to=Epochs(0))
    ),
    "lc": lambda plan: LearningCompression(plan, scope="local"),
}
"""Name on the command line -> what keeps the plan while the winner is fine-tuned."""


class Recovery:
    """Fine-tunes the winner of a search, and keeps its best epoch.

    Args:
        trainer: whose device, precision, gradient clipping and limits on training are taken over.
        model: whose training it is; it is not changed.
        datamodule: with the data.
        kind: a name of `RECOVERIES`.
        epochs: of training.
        metric: by which an epoch is best.
        mode: "max" where higher is better.
        folder: of checkpoints and TensorBoard files.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        *,
        kind: str,
        epochs: int,
        metric: str,
        mode: str,
        folder: Path,
    ) -> None:
        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        self.kind, self.epochs, self.metric, self.mode, self.folder = kind, epochs, metric, mode, folder
        self.details: dict[str, Any] = {"kind": kind, "epochs": epochs}
        """What is known afterwards: of the best epoch its number, counted from 0, and its metric."""

    def __call__(self, repaired: nn.Module, plan: SparsityPlan) -> nn.Module:
        """The network of the best epoch.

        Raises:
            KeyboardInterrupt: as everywhere; Lightning would end the process.
        """
        best = ModelCheckpoint(
            self.folder / "recovered",
            "best",
            monitor=f"{self.metric}_at_target",
            mode=self.mode,
            enable_version_counter=False,
        )
        sibling = self._sibling([RECOVERIES[self.kind](plan), best])
        model = copy.deepcopy(_detached(self.model))
        model.load_state_dict(repaired.state_dict())
        with keyboard_interrupts():
            sibling.fit(model, datamodule=self.datamodule)
        if best.best_model_path:
            # Our own file of a moment ago, in which a user's hyperparameters may be of any class.
            checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=False)
            model.load_state_dict(checkpoint["state_dict"])
            self.details |= {"best_epoch": int(checkpoint["epoch"]), "best_metric": float(best.best_model_score)}  # type: ignore[arg-type]
        return inference_copy(_detached(model)).to(self.trainer.strategy.root_device)

    def _sibling(self, callbacks: list[Callback]) -> Trainer:
        """A Trainer like the one of the search, for this training."""
        given: Any = self.trainer
        limits = {name: getattr(given, name) for name in ("limit_train_batches", "limit_val_batches")}
        return Trainer(
            max_epochs=self.epochs,
            callbacks=callbacks,
            logger=TensorBoardLogger(self.folder, name="recovery", version=""),
            accelerator="cpu" if given.strategy.root_device.type == "cpu" else "auto",
            devices=1,
            precision=given.precision,
            gradient_clip_val=given.gradient_clip_val,
            gradient_clip_algorithm=given.gradient_clip_algorithm,
            accumulate_grad_batches=given.accumulate_grad_batches,
            # Lightning comments on limits that are given and are none.
            **{name: limit for name, limit in limits.items() if limit != 1.0},
            num_sanity_val_steps=0,
            enable_progress_bar=given.progress_bar_callback is not None,
            enable_model_summary=False,
            log_every_n_steps=given.log_every_n_steps,
        )


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Lets Ctrl-C during a training be a KeyboardInterrupt, of which Lightning makes the end of the process."""
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def _detached(model: LightningModule) -> LightningModule:
    """The model without its Trainer, which cannot be copied."""
    if model._trainer is not None:
        model.trainer = None
    return model
