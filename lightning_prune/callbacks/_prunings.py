"""Several `Pruning` callbacks, read as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_prune.callbacks import _training
from lightning_prune.callbacks.pruning import Pruning
from lightning_prune.granularities import Granularity
from lightning_prune.metrics import Count


class Prunings:
    """What the `Pruning` callbacks of a training say together; they prune disjoint parameters."""

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._each = [callback for callback in callbacks if isinstance(callback, Pruning)]

    @classmethod
    def of(cls, trainer: Trainer) -> Prunings:
        """Those of a trainer."""
        return cls(_training.callbacks(trainer))

    def __bool__(self) -> bool:
        """Whether anything is pruned."""
        return bool(self._each)

    @property
    def updates(self) -> int:
        """Mask updates so far."""
        return sum(pruning.updates for pruning in self._each)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask."""
        return {name: mask for pruning in self._each for name, mask in pruning.masks.items()}

    @property
    def plan(self) -> dict[str, float]:
        """Parameter name -> target; complete once training has started."""
        return {name: share for pruning in self._each for name, share in pruning.plan.items()}

    @property
    def granularities(self) -> dict[str, Granularity]:
        """Parameter name -> the groups in which it is pruned; complete once training has started."""
        return {
            name: pruning.plan.granularity(name) or pruning.granularity
            for pruning in self._each
            for name in pruning.plan
        }

    @property
    def at_target(self) -> bool:
        """Whether all have reached their targets; trivially so where nothing is pruned."""
        return all(pruning.at_target for pruning in self._each)

    @property
    def begun(self) -> bool:
        """Whether a mask removes more than its initial plan asks for."""
        return any(
            mask.numel() - int(mask.sum()) > round(pruning.initial_plan.get(name, 0.0) * mask.numel())
            for pruning in self._each
            for name, mask in pruning.masks.items()
        )

    def settings(self, counts: Mapping[str, Count]) -> dict[str, Any]:
        """Hyperparameters: `pruning/schedule`, or `pruning/0/schedule` where several callbacks prune."""
        each = {
            str(index): {
                "sparsity": removed(pruning.plan, counts, pruning.plan),
                "schedule": str(pruning.schedule),
                "criterion": str(pruning.criterion),
                "granularity": str(pruning.granularity),
                "scope": str(pruning.scope),
            }
            for index, pruning in enumerate(self._each)
        }
        if not each:
            return {}
        return {"pruning": each if len(each) > 1 else each["0"]}


def removed(plan: Mapping[str, float], counts: Mapping[str, Count], names: Iterable[str]) -> float:
    """The share that a plan removes of the parameters in `names`, taken together.

    >>> removed({"a": 0.5}, {"a": Count((4,), 4, 4), "b": Count((6,), 6, 6)}, ["a", "b"])
    0.2
    """
    totals = {name: counts[name].total for name in names}
    return sum(plan.get(name, 0.0) * total for name, total in totals.items()) / max(sum(totals.values()), 1)
