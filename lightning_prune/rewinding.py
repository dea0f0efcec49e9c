"""Rewinding: retraining methods that go back in training each time weights have been removed.

A snapshot is taken at an early point; after every mask update that removes weights, training continues from there:
with the weights of then (weight rewinding) or only with the learning rate of then (learning-rate rewinding). It is the
whole network that goes back, not only what is pruned.
Source: Frankle et al., "Stabilizing the Lottery Ticket Hypothesis" (2019); Renda et al., "Comparing Rewinding and
Fine-tuning in Neural Network Pruning" (2020), section 2.
"""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.moments import Epochs, Moment

__all__ = ["LearningRateRewinding", "WeightRewinding"]


class Scheduler(Protocol):
    """Whatever can save and load its state as torch's learning-rate schedulers do."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state."""


@dataclass(frozen=True)
class Rewinding(ABC):
    """Go back to an earlier point of training after each mask update.

    Args:
        to: the point; not after pruning begins.
    """

    weights: ClassVar[bool]
    """Whether weights go back, or only learning rates."""

    to: Moment = field(default_factory=lambda: Epochs(0))


@dataclass(frozen=True)
class WeightRewinding(Rewinding):
    """All weights and BatchNorm statistics go back to the values they had at `to`, learning rates too.

    Optimizer state begins anew. With `Epochs(0)` weights go back to initialisation, as in the lottery-ticket paper.

    >>> WeightRewinding(to=Epochs(2))
    WeightRewinding(to=Epochs(n=2))
    """

    weights: ClassVar[bool] = True


@dataclass(frozen=True)
class LearningRateRewinding(Rewinding):
    """Weights stay as trained; learning rates and their schedulers go back to where they were at `to`."""

    weights: ClassVar[bool] = False


Snapshot = dict[str, Any]
"""Plain containers and tensors: what `take` remembers and `restore` brings back."""


def take(
    rewinding: Rewinding, module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Scheduler]
) -> Snapshot:
    """Remember weights (if they are to be rewound), optimizer settings and scheduler states."""
    return {
        "weights": {name: value.detach().clone() for name, value in module.state_dict().items()}
        if rewinding.weights
        else {},
        "groups": [
            # Copies in depth: a learning rate may be a tensor, which schedulers change in place.
            [copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in groups]
            for groups in (optimizer.param_groups for optimizer in optimizers)
        ],
        "schedulers": [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers],
    }


def restore(
    snapshot: Snapshot,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Scheduler],
) -> None:
    """Go back to a snapshot; masks have to be applied again afterwards.

    Parameter groups that joined an optimizer since (unfrozen layers) keep their settings, their weights go back.

    Raises:
        ValueError: if there are now other optimizers or schedulers than when it was taken.
    """
    if len(snapshot["groups"]) != len(optimizers) or len(snapshot["schedulers"]) != len(schedulers):
        raise ValueError(
            f"cannot rewind: the snapshot holds {len(snapshot['groups'])} optimizers and "
            f"{len(snapshot['schedulers'])} schedulers, training has {len(optimizers)} and {len(schedulers)} now; "
            "keep configure_optimizers as it was"
        )
    if snapshot["weights"]:
        with torch.no_grad():
            module.load_state_dict(snapshot["weights"])
        for optimizer in optimizers:
            optimizer.state.clear()
    for optimizer, groups in zip(optimizers, snapshot["groups"], strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=False):
            group.update(copy.deepcopy(settings))
    for scheduler, state in zip(schedulers, snapshot["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(state))
