"""The LightningModule that trains every classification network of the zoo."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.zoo.weights import load_weights


class Classifier(LightningModule):
    """Cross-entropy training of a network, with top-1 and (for more than five classes) top-5 accuracy.

    Logs `train_loss`; `val_loss`, `val_acc`, `val_acc_top5`; `test_loss`, `test_acc`, `test_acc_top5`.
    Accuracies are shares in [0, 1]. The network's parameters are named `network.*`.

    Args:
        network: Maps images `[batch, ...]` to logits `[batch, num_classes]`.
        num_classes: Classes.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a scheduler from the optimizer, stepped after every epoch; None keeps the rate.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        initialize_from: File of pretrained weights for the network, see `load_weights`.
        input_shape: Shape of one example without the batch. Where given, the `example_input_array` that
            model summaries and layer tables start from needs no data.

    Raises:
        ValueError: Fewer than two classes, or a network that does not return logits of that many.

    Example:
        >>> from lightning_prune.zoo import MLP
        >>> model = Classifier(MLP([64, 20, 10]), num_classes=10)
        >>> model(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        initialize_from: str | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"Classifier needs num_classes >= 2, got {num_classes}.")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
        if initialize_from is not None:
            load_weights(network, initialize_from)
        self.network = network
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.label_smoothing = label_smoothing
        if input_shape is not None:
            self.example_input_array = torch.zeros(1, *input_shape)
        metrics: dict[str, Metric | MetricCollection] = {"acc": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.val_metrics = MetricCollection(metrics, prefix="val_", compute_groups=False)
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits, shape `[batch, num_classes]`."""
        logits = self.network(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != self.num_classes:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"Classifier needs logits [batch, num_classes={self.num_classes}], but its network "
                f"{type(self.network).__name__} returned {got}; set num_classes of both alike "
                "(and aux_logits=False for googlenet and inception_v3)."
            )
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies of the validation set."""
        self._evaluate(batch, self.val_metrics, "val_loss")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies of the test set."""
        self._evaluate(batch, self.test_metrics, "test_loss")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the probabilities of one batch, shape `[batch, num_classes]`; labels are ignored."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).softmax(dim=1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and, where one is given, its scheduler."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        epochs = self.trainer.max_epochs
        period = getattr(scheduler, "T_max", epochs)
        if period != epochs and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            warnings.warn(
                f"The cosine of the learning rate ends after T_max={period} epochs but training lasts "
                f"max_epochs={epochs}; set both alike.",
                stacklevel=2,
            )
        monitor = getattr(scheduler, "monitor", None)
        if monitor is not None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, loss_name: str) -> None:
        images, labels = batch
        logits = self(images)
        self.log(loss_name, functional.cross_entropy(logits, labels), batch_size=len(labels))
        metrics.update(logits, labels)
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name.endswith("_acc"), batch_size=len(labels))
