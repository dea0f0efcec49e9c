"""A tiny training that the tests of callbacks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 8
EPOCHS = 4


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


class Tiny(LightningModule):
    """Two linear layers that learn to sort random points into four classes."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] = sgd, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        # Any: tests look at layers by number, and put other networks here.
        self.net: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.make_optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.make_optimizer(self.parameters())


def loader(batch_size: int = 8, batches: int = BATCHES) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch_size * batches, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, :4]).argmax(dim=1)), batch_size=batch_size)


def trainer(callbacks: list[Callback], folder: Path | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=callbacks, **{**settings, **options})


def fit(callbacks: list[Callback], model: Tiny | None = None, **options: Any) -> Tiny:
    model = model or Tiny()
    trainer(callbacks, **options).fit(model, loader(), loader())
    return model


def share_of_zeros(model: nn.Module, *names: str) -> float:
    weights = [p for name, p in model.named_parameters() if (name in names if names else p.ndim > 1)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class Watch(Callback):
    """Notes something after every batch."""

    def __init__(self, look: Callable[[Trainer, LightningModule], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append(self.look(trainer, pl_module))
