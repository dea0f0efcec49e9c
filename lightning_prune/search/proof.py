"""From the plans that a search found to the network that is its result: recovered, and confirmed on all data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_prune import targets
from lightning_prune.plan import SparsityPlan
from lightning_prune.preparation import inference_copy
from lightning_prune.search.candidates import Candidates
from lightning_prune.search.claims import accuracy_of, choices_of, cost_of
from lightning_prune.search.phases import Phases
from lightning_prune.search.result import drop_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

Measure = Callable[[nn.Module], float]
Recover = Callable[[nn.Module, SparsityPlan], nn.Module]


class Counted:
    """Measures networks, and how often.

    Args:
        measure: the metric of a network.
    """

    def __init__(self, measure: Measure) -> None:
        self._measure, self.calls = measure, 0

    def __call__(self, network: nn.Module) -> float:
        """The metric."""
        self.calls += 1
        return float(self._measure(network))


def recovered(repaired: nn.Module, plan: SparsityPlan, removed: Mapping[str, int], recover: Recover) -> nn.Module:
    """The network after recovery, with all its zeros.

    Args:
        repaired: the network before; it is not changed.
        plan: that it has.
        removed: name -> weights that the plan removes.
        recover: see `search_sparsity`.

    Raises:
        ValueError: recovery gave nothing, or brought removed weights back.
    """
    found = recover(inference_copy(repaired), plan)
    if not isinstance(found, nn.Module):
        raise ValueError(f"recover returns the network that it trained, got {type(found).__name__}")
    network = inference_copy(found)
    zeros = {name: int((weight == 0).sum()) for name, weight in targets.parameters(network).items()}
    for name, count in removed.items():
        if zeros.get(name, 0) < count:
            raise ValueError(
                f"recovery brought removed weights back: {name!r} has {zeros.get(name, 0)} zeros, the plan wants "
                f"{count}; keep them while training, with Pruning(plan, scope='local') among the callbacks"
            )
    return network


def better(
    repaired: nn.Module, trained: nn.Module | None, measure: Measure, dense: float, mode: str
) -> tuple[Any, ...]:
    """The network and its metric: of the repaired and the trained one, the more accurate; the trained one of equals."""
    value = measure(repaired)
    if trained is None:
        return repaired, value
    after = measure(trained)
    lost, kept = drop_of(after, dense, mode, 0.0), drop_of(value, dense, mode, 0.0)
    return (trained, after) if lost <= kept else (repaired, value)


@dataclass(frozen=True, eq=False)
class Proof:
    """A plan of a study, confirmed.

    Args:
        trial: whose plan it is.
        network: repaired, and recovered where that helped.
        accuracy: of it, on all validation data.
        dense: the dense network's accuracy there.
        drop: from that.
        recovered: whether recovery helped.
    """

    trial: FrozenTrial
    network: nn.Module
    accuracy: float
    dense: float
    drop: float
    recovered: bool

    @property
    def choices(self) -> tuple[int, ...]:
        """Of the plan, one per layer."""
        return choices_of(self.trial)

    @property
    def said(self) -> dict[str, Any]:
        """What the result keeps of it."""
        searched = accuracy_of(self.trial)
        return {
            "trial": self.trial.number,
            "cost": cost_of(self.trial),
            "search_accuracy": searched,
            "accuracy": self.accuracy,
            "drop": self.drop,
            "recovered": self.recovered,
        }


@dataclass
class Confirmation:
    """Recovers plans of a study and measures them on all validation data, until one keeps the threshold.

    What the search saw may be luck, of few validation data or of many trials: then the next plan's turn comes.

    Args:
        candidates: makes their networks.
        recover: see `search_sparsity`.
        measure: the metric on all validation data.
        metric: its name.
        mode: "max" where higher is better, "min" where lower is.
        max_drop: the threshold.
        phases: is told what happens.
        dense: the dense network's metric, which is measured when it is needed if it is not known.
    """

    candidates: Candidates
    recover: Recover | None
    measure: Counted
    metric: str
    mode: str
    max_drop: float
    phases: Phases
    dense: float | None = None

    def first(self, trials: Sequence[FrozenTrial]) -> tuple[Proof, list[dict[str, Any]]]:
        """The first plan that is accurate enough, else the one that comes nearest, and what each came to.

        Args:
            trials: the cheapest first, at least one.
        """
        found: list[Proof] = []
        for trial in trials:
            again = f"next plan (trial {trial.number}): the drop was too large"
            found.append(self._proof(trial, again if found else "winner"))
            if found[-1].drop <= self.max_drop:
                break
        return min(found, key=lambda proof: proof.drop), [proof.said for proof in found]

    def _proof(self, trial: FrozenTrial, which: str) -> Proof:
        chosen = choices_of(trial)
        repaired, trained = inference_copy(self.candidates.repaired(chosen)), None
        if self.recover is not None:
            with self.phases.phase("recovery", f"Recovering the {which}"):
                plan, removed = self.candidates.space.plan(chosen), self.candidates.library.removed(chosen)
                trained = recovered(repaired, plan, removed, self.recover)
        with self.phases.phase("confirmation", f"Confirming {self.metric} of the {which}"):
            if self.dense is None:
                self.dense = self.measure(inference_copy(self.candidates.dense))
            network, value = better(
                repaired, trained, lambda it: self.measure(self.candidates.deployed(it, chosen)), self.dense, self.mode
            )
        drop = drop_of(value, self.dense, self.mode, self.max_drop)
        return Proof(trial, network, value, self.dense, drop, network is trained)


def front_point(trial: FrozenTrial) -> dict[str, Any]:
    """What the result of a search for a front keeps of one of its trials."""
    said = trial.user_attrs
    return {"trial": trial.number, "cost": cost_of(trial), **said["outcome"], "plan": said["plan"]}


def known(value: float | None) -> float:
    """A number that a trial keeps, where None stands for none."""
    return math.nan if value is None else float(value)
