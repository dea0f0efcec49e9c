"""What becomes of a proposed plan, given all trials: evaluated, known already, or left to another worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Terms:
    """What a study is after.

    Args:
        evaluations: that may be made, the dense network's included.
        dense_cost: beyond which nothing is worth a look.
        dense_accuracy: of the dense network.
        max_drop: the threshold; None where all plans are of interest, for a front.
    """

    evaluations: int
    dense_cost: float
    dense_accuracy: float
    max_drop: float | None


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a trial.

    Args:
        evaluate: whether its plan is to be evaluated, as soon as `waits` is False.
        reason: why not.
        accuracy: of the plan where it is known; None where that diverged, too.
        known: whether it is.
        excess: share by which the cost exceeds the incumbent's, where that is the reason.
        busy: whether another worker is about to know more.
        waits: whether a later trial of another worker has yet to give way.
    """

    evaluate: bool = False
    reason: str = ""
    accuracy: float | None = None
    known: bool = False
    excess: float = 0.0
    busy: bool = False
    waits: bool = False


def verdict(number: int, choices: Sequence[int], cost: float, trials: Sequence[FrozenTrial], terms: Terms) -> Verdict:
    """Decide about a trial after its choices have been written to the storage, so that others see them.

    A worker first writes its `candidate`, then reads all trials, then writes its `plan`, the claim to it. Of two that
    have written the same choices and read before either has decided, the earlier trial evaluates and the later gives
    way; the earlier waits until the later has decided, as that may have read before the earlier wrote. Hence no plan is
    evaluated twice, in any storage in which a worker reads what others have written before.

    Args:
        number: of the trial.
        choices: that it proposes.
        cost: of them.
        trials: all of the study, read after the choices were written.
        terms: what the study is after.

    Source: Lamport, "A New Solution of Dijkstra's Concurrent Programming Problem" (1974).
    """
    from optuna.trial import TrialState

    wanted = tuple(choices)
    others = [t for t in trials if t.number != number]
    done = evaluated(others)
    for trial in done:
        if choices_of(trial) == wanted:
            reason = f"trial {trial.number} evaluated the same plan"
            return Verdict(reason=reason, accuracy=accuracy_of(trial), known=True)
    if not any(wanted):
        return Verdict(reason="this is the dense network", accuracy=terms.dense_accuracy, known=True)
    if terms.max_drop is not None:
        limit = incumbent_cost(done, terms)
        if cost >= limit:
            reason = f"a cost of {cost:.6g} is not below the incumbent's {limit:.6g}"
            return Verdict(reason=reason, excess=cost / limit - 1.0 if limit > 0 else 0.0)
    proposed = [t for t in others if t.state == TrialState.RUNNING and "candidate" in t.user_attrs]
    running = [t for t in proposed if "reason" not in t.user_attrs]
    ahead = [t for t in running if claimed(t) or t.number < number]
    for trial in ahead:
        if choices_of(trial) == wanted:
            return Verdict(reason=f"trial {trial.number} is evaluating the same plan", busy=True)
    left = terms.evaluations - 1 - len(done) - len(ahead)
    if left <= 0:
        return Verdict(reason=f"all {terms.evaluations} evaluations are taken", busy=True)
    behind = [t for t in running if not claimed(t) and t.number > number]
    waits = len(behind) >= left or any(choices_of(t) == wanted for t in behind)
    return Verdict(evaluate=True, waits=waits)


def incumbent_cost(done: Sequence[FrozenTrial], terms: Terms) -> float:
    """Cost of the cheapest plan known to be accurate enough; the dense one's where there is no other."""
    limit = terms.max_drop
    costs = [cost_of(t) for t in done if limit is not None and feasible(t, limit)]
    return min([terms.dense_cost, *costs])


def feasible(trial: FrozenTrial, max_drop: float) -> bool:
    """Whether the accuracy of an evaluated plan drops by no more than a threshold."""
    return accuracy_of(trial) is not None and dropped(trial) <= max_drop


def choices_of(trial: FrozenTrial) -> tuple[int, ...]:
    """What a trial proposes."""
    return tuple(map(int, trial.user_attrs["candidate"]["choices"]))


def cost_of(trial: FrozenTrial) -> float:
    """The cost of what a trial proposes."""
    return float(trial.user_attrs["candidate"]["cost"])


def accuracy_of(trial: FrozenTrial) -> float | None:
    """What an evaluated plan was found to have; None where that is no number."""
    accuracy = trial.user_attrs["outcome"]["accuracy"]
    return None if accuracy is None else float(accuracy)


def dropped(trial: FrozenTrial) -> float:
    """By how much that is worse than the dense network's."""
    return float(trial.user_attrs["outcome"]["drop"])


def claimed(trial: FrozenTrial) -> bool:
    """Whether it is up to this trial, and no other, to evaluate its plan."""
    return "plan" in trial.user_attrs


def evaluated(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials whose plans were evaluated."""
    from optuna.trial import TrialState

    return [t for t in trials if t.state == TrialState.COMPLETE and claimed(t)]


def evaluating(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials whose plans are being evaluated."""
    from optuna.trial import TrialState

    return [t for t in trials if t.state == TrialState.RUNNING and claimed(t)]
