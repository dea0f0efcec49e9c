"""Metrics that count at full sparsity only, and the callbacks that wait for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_prune.callbacks import _training

AT_TARGET = "_at_target"


class Gate:
    """Publishes `<metric>_at_target` and holds back who monitors it until masks have reached their target.

    A `ModelCheckpoint` that monitors such a metric saves no best model before, an `EarlyStopping` does not lose
    patience: both through their public attributes, which are given back when the gate opens or closes for good.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Callback, dict[str, Any]]] = []
        self._seen: dict[str, Tensor] = {}

    def check(self, trainer: Trainer, before: Callback) -> None:
        """Refuse an order of callbacks in which early stopping would look at a metric before it is published.

        Raises:
            ValueError: naming the metric and the remedy.
        """
        callbacks = _training.callbacks(trainer)
        for callback in callbacks[: callbacks.index(before)]:
            if isinstance(callback, EarlyStopping) and callback.monitor.endswith(AT_TARGET):
                raise ValueError(
                    f"EarlyStopping on {callback.monitor!r} comes before Pruning, which publishes that metric; list "
                    "Pruning first"
                )

    def hold(self, trainer: Trainer) -> None:
        """Hold back those that monitor a metric at target."""
        self.release()
        for callback in _training.callbacks(trainer):
            if isinstance(callback, ModelCheckpoint | EarlyStopping) and (callback.monitor or "").endswith(AT_TARGET):
                waiting = (
                    {"save_top_k": 0}
                    if isinstance(callback, ModelCheckpoint)
                    else {"patience": math.inf, "check_finite": False, "wait_count": 0}
                )
                self._held.append((callback, {name: getattr(callback, name) for name in waiting}))
                vars(callback).update(waiting)

    def release(self) -> None:
        """Give them back what they had."""
        for callback, settings in self._held:
            vars(callback).update(settings)
        self._held.clear()

    def publish(self, trainer: Trainer, at_target: bool) -> None:
        """Mirror the metrics that are new since the last call: their value at target, else NaN."""
        metrics = trainer.callback_metrics
        for name in [name for name in metrics if not name.endswith(AT_TARGET)]:
            if self._seen.get(name) is not metrics[name]:
                self._seen[name] = metrics[name]
                metrics[f"{name}{AT_TARGET}"] = metrics[name] if at_target else torch.tensor(math.nan)
