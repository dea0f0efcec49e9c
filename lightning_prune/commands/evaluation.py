"""One metric of many networks on the same validation data, set up once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_prune.commands.validation import validated
from lightning_prune.targets import closest

_HOOKS = ("prepare_data", "setup", "val_dataloader", "teardown")


class Validation:
    """A metric as `trainer.validate` gives it, of one network after another.

    The data module prepares, sets up and makes its loader at the first one; every further validation reads that
    loader again.

    Args:
        trainer: that validates.
        datamodule: with the validation data; None where networks have their own.
        metric: that validation logs.
    """

    def __init__(self, trainer: Trainer, datamodule: LightningDataModule | None, metric: str) -> None:
        self.trainer, self.datamodule, self.metric = trainer, datamodule, metric
        self._kept: dict[str, Any] = {}

    def __call__(self, network: nn.Module) -> float:
        """The metric of a network, on as many batches as the Trainer validates on.

        Raises:
            ValueError: there are no validation data, or the metric is not logged.
        """
        with self._set_up_once():
            logged = validated(self.trainer, network, self.datamodule)  # type: ignore[arg-type]
        if not logged:
            raise ValueError(
                "validation logged nothing: the validation set is empty, --trainer.limit_val_batches is 0, or "
                "validation_step logs no metric"
            )
        if self.metric not in logged:
            raise ValueError(
                f"validation never logs {self.metric!r}; closest of what it logs: {closest(self.metric, logged)}; give "
                "one of them as --metric"
            )
        return logged[self.metric]

    def check(self, network: LightningModule) -> None:
        """Refuse an empty validation set and a metric that is not logged, after one batch.

        Raises:
            ValueError: see above.
        """
        few = min(1, self.trainer.limit_val_batches)
        with self._limit(few and 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics that want more than a batch, and of loaders without any
            self(network)

    @property
    def partial(self) -> bool:
        """Whether the Trainer validates on a part of the data."""
        return self.trainer.limit_val_batches != 1.0 and not self.trainer.fast_dev_run  # type: ignore[attr-defined]

    def whole(self, network: nn.Module) -> float:
        """The metric on all validation data."""
        with self._limit(1.0):
            return self(network)

    @contextlib.contextmanager
    def _limit(self, batches: float) -> Iterator[None]:
        before = self.trainer.limit_val_batches
        self.trainer.limit_val_batches = batches
        try:
            yield
        finally:
            self.trainer.limit_val_batches = before

    @contextlib.contextmanager
    def _set_up_once(self) -> Iterator[None]:
        """Answers for the data module's hooks, and leaves it as it was."""
        data = self.datamodule
        if data is None:
            yield
            return
        own = {name: data.__dict__[name] for name in _HOOKS if name in data.__dict__}
        data.__dict__.update({name: self._once(name, getattr(data, name)) for name in _HOOKS})
        try:
            yield
        finally:
            for name in _HOOKS:
                del data.__dict__[name]
            data.__dict__.update(own)

    def _once(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)  # Lightning asks whether the method beneath is the user's own
        def answer(*args: Any, **kwargs: Any) -> Any:
            if name == "teardown":  # what was set up is read again
                return None
            if name not in self._kept:
                self._kept[name] = method(*args, **kwargs)
            return self._kept[name]

        return answer
