"""Validation of a LightningModule in pieces: what one step logs, and what a whole run does."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_prune.search.partial import Totals

Step = Callable[..., Any]


def require_validation(trainer: Trainer, model: LightningModule) -> None:
    """Refuse what cannot be validated in this process, before any work.

    Raises:
        ValueError: the model has no `validation_step`, or the Trainer has several devices.
    """
    if not is_overridden("validation_step", model):
        raise ValueError(
            f"{type(model).__name__} defines no validation_step, so nothing says how good it is; define one that logs "
            "a metric"
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"this runs on one device, and the Trainer has {trainer.world_size}; give --trainer.devices 1 and "
            "--trainer.num_nodes 1"
        )


def validated(
    trainer: Trainer,
    network: LightningModule,
    datamodule: LightningDataModule | None,
    replace_step: Callable[[Step], Step] | None = None,
) -> dict[str, float]:
    """What `trainer.validate` gives, without callbacks and loggers.

    Args:
        trainer: its callbacks and loggers are put back.
        network: that is validated.
        datamodule: with its data; None where the network has its own.
        replace_step: makes the `validation_step` of this run out of the network's own; None leaves it.

    Raises:
        KeyboardInterrupt: as everywhere; Lightning would end the process.
    """
    step = network.validation_step
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    if replace_step is not None:  # Lightning looks at the signature, which wraps() keeps
        network.__dict__["validation_step"] = wraps(step)(replace_step(step))
    try:
        with keyboard_interrupts():
            trainer.validate(network, datamodule=datamodule, verbose=False)
    finally:
        network.__dict__.pop("validation_step", None)
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextlib.contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Lets Ctrl-C in a Trainer be a KeyboardInterrupt, of which Lightning makes the end of the process."""
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def step_totals(network: LightningModule, step: Callable[[], Any], batch: Any) -> Totals:
    """What one validation step logs, as sums over the examples of its batch.

    Metric objects are read as if the batch were all data, and left as they were. This adds up to what Lightning logs
    for averages over examples, not for such as an F1 score.

    Args:
        network: whose step it is.
        step: runs it.
        batch: tells the number of examples where a call of `log` does not.
    """
    found: dict[str, tuple[Any, float]] = {}

    def log(name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        found[name] = value, float(extract_batch_size(batch) if batch_size is None else batch_size)

    with _metrics_kept(network):
        network.__dict__["log"] = log
        try:
            step()
        finally:
            del network.__dict__["log"]
        return {name: (_number(name, value) * size, size) for name, (value, size) in found.items()}


def averages(totals: Mapping[str, list[float]], logged: Mapping[str, float]) -> set[str]:
    """The logged metrics that are averages over examples: those that sums over batches add up to.

    >>> sorted(averages({"loss": [3.0, 2.0], "f1": [1.0, 2.0]}, {"loss": 1.5, "f1": 0.6, "late": 1.0}))
    ['loss']
    """
    found = set()
    for name, value in logged.items():
        amount, number = totals.get(name, (math.nan, 1.0))
        average = amount / number if number else math.nan
        undefined = name in totals and math.isnan(average) and math.isnan(value)
        if undefined or math.isclose(average, value, rel_tol=1e-4, abs_tol=1e-6):
            found.add(name)
    return found


def _number(name: str, value: Any) -> float:
    value = value.compute() if isinstance(value, Metric) else value
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"validation_step logs {name!r} of shape {list(value.shape)}; log single numbers")
    return float(value)


@contextlib.contextmanager
def _metrics_kept(network: LightningModule) -> Iterator[None]:
    """Empties the metrics of a network, and puts back what they had gathered."""
    metrics = [module for module in network.modules() if isinstance(module, Metric)]
    groups = [module for module in network.modules() if isinstance(module, MetricCollection)]
    kept = [{name: _held(getattr(metric, name)) for name in metric._defaults} for metric in metrics]
    counts = [metric._update_count for metric in metrics]
    for metric in metrics:
        metric.reset()
    for group in groups:  # which tie the states of their metrics together
        group.reset()
    try:
        yield
    finally:
        for metric, state, count in zip(metrics, kept, counts, strict=True):
            metric.reset()
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count = count


def _held(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value  # which reset() would empty
