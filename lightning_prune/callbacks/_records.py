"""The validation metrics of a run, told apart by what the network was when they were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_prune.summary import MetricRow

_LOWER_IS_BETTER = ("loss", "err", "mae", "mse", "nll", "perplexity", "wer", "fid")


class Records:
    """Last value while dense, best at target, last of all, for each metric.

    >>> records = Records()
    >>> records.add({"val_acc": 0.98}, dense=True, at_target=False)
    >>> records.add({"val_acc": 0.95}, dense=False, at_target=True)
    >>> records.add({"val_acc": 0.94}, dense=False, at_target=True)
    >>> records.rows()
    (MetricRow(name='val_acc', mode='max', dense=0.98, best=0.95, last=0.94),)
    """

    def __init__(self) -> None:
        self.dense: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.modes: dict[str, str] = {}

    def add(self, metrics: Mapping[str, float], dense: bool, at_target: bool) -> None:
        """Takes in one validation."""
        self.last.update(metrics)
        if dense:
            self.dense.update(metrics)
        if at_target:
            self.best.update({name: value for name, value in metrics.items() if self._improves(name, value)})

    def mode(self, name: str) -> str:
        """`"max"` or `"min"`: as a callback monitors it, else by the name: losses and errors are to be low."""
        lower = any(part in name.lower() for part in _LOWER_IS_BETTER)
        return self.modes.get(name, "min" if lower else "max")

    def rows(self) -> tuple[MetricRow, ...]:
        """One row per metric, in the order in which they appeared."""
        return tuple(
            MetricRow(name, self.mode(name), self.dense.get(name), self.best.get(name), value)
            for name, value in self.last.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {name: dict(values) for name, values in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue where `state_dict` was taken."""
        for name in vars(self):
            setattr(self, name, dict(state[name]))

    def _improves(self, name: str, value: float) -> bool:
        best = self.best.get(name, math.nan)
        if math.isnan(best):
            return True
        return value > best if self.mode(name) == "max" else value < best
