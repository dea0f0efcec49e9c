"""Fine-tuning of a search's candidates and of its winner, their zeros kept."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_prune.callbacks.learning_compression import LearningCompression
from lightning_prune.callbacks.pruning import Pruning
from lightning_prune.commands.validation import keyboard_interrupts
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
        self.attempts: list[dict[str, Any]] = []
        """What is known of each call: the folder of its TensorBoard files, the number of its best epoch, counted from
        0, and the metric of that."""

    def __call__(self, repaired: nn.Module, plan: SparsityPlan) -> nn.Module:
        """The network of the best epoch.

        Raises:
            KeyboardInterrupt: as everywhere; Lightning would end the process.
        """
        more = f"_{len(self.attempts) + 1}" if self.attempts else ""  # nothing of an earlier attempt is overwritten
        details: dict[str, Any] = {"kind": self.kind, "epochs": self.epochs, "folder": f"recovery{more}"}
        best = ModelCheckpoint(
            self.folder / f"recovered{more}",
            "best",
            monitor=f"{self.metric}_at_target",
            mode=self.mode,
            enable_version_counter=False,
        )
        sibling = _sibling(
            self.trainer,
            [RECOVERIES[self.kind](plan), best],
            max_epochs=self.epochs,
            limit_val_batches=self.trainer.limit_val_batches,
            logger=TensorBoardLogger(self.folder, name=details["folder"], version=""),
            enable_progress_bar=self.trainer.progress_bar_callback is not None,
            log_every_n_steps=self.trainer.log_every_n_steps,  # type: ignore[attr-defined]
        )
        model = copy.deepcopy(_detached(self.model))
        model.load_state_dict(repaired.state_dict())
        with keyboard_interrupts():
            sibling.fit(model, datamodule=self.datamodule)
        if best.best_model_path:
            # Our own file of a moment ago, in which a user's hyperparameters may be of any class.
            checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=False)
            model.load_state_dict(checkpoint["state_dict"])
            details |= {"best_epoch": int(checkpoint["epoch"]), "best_metric": float(best.best_model_score)}  # type: ignore[arg-type]
        self.attempts.append(details)
        return inference_copy(_detached(model)).to(self.trainer.strategy.root_device)


class Tuning:
    """Fine-tunes candidates of a search for some steps, their zeros kept: each on the same batches, with one seed.

    Optimizer and learning rate are the model's own, as in any other training.

    Args:
        trainer: as for `Recovery`.
        model: whose training it is; it is not changed.
        datamodule: with the training data.
        steps: of the optimizer, at least 1.
        seed: of the order of examples, and of everything else that training draws.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        *,
        steps: int,
        seed: int = 0,
    ) -> None:
        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        self.steps, self.seed = steps, seed

    def __call__(self, network: nn.Module, plan: SparsityPlan) -> None:
        """Train the network in place.

        Raises:
            KeyboardInterrupt: as everywhere; Lightning would end the process.
        """
        model = copy.deepcopy(_detached(self.model))
        model.load_state_dict(network.state_dict())
        with keyboard_interrupts(), isolate_rng(), _silence():
            sibling = _sibling(
                self.trainer,
                [RECOVERIES["one_shot"](plan)],
                max_epochs=-1,
                max_steps=self.steps,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
            )
            random.seed(self.seed)
            np.random.seed(self.seed)  # noqa: NPY002  what users' augmentations draw from
            torch.manual_seed(self.seed)
            sibling.fit(model, datamodule=self.datamodule)
        network.load_state_dict(model.state_dict())


@contextmanager
def _silence() -> Iterator[None]:
    """Without what Lightning says of every training: it was said when the dense network was trained."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _sibling(trainer: Trainer, callbacks: list[Callback], **settings: Any) -> Trainer:
    """A Trainer like the one of the search, for another training."""
    given: Any = trainer
    # Lightning comments on limits that are given and are none.
    limits = {"limit_train_batches": given.limit_train_batches, "limit_val_batches": settings.pop("limit_val_batches")}
    return Trainer(
        callbacks=callbacks,
        accelerator="cpu" if given.strategy.root_device.type == "cpu" else "auto",
        devices=1,
        precision=given.precision,
        gradient_clip_val=given.gradient_clip_val,
        gradient_clip_algorithm=given.gradient_clip_algorithm,
        accumulate_grad_batches=given.accumulate_grad_batches,
        **{name: limit for name, limit in limits.items() if limit != 1.0},
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **settings,
    )


def _detached(model: LightningModule) -> LightningModule:
    """The model without its Trainer, which cannot be copied."""
    if model._trainer is not None:
        model.trainer = None
    return model
