"""Which trials of a study are the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_prune.search.claims import accuracy_of, choices_of, cost_of, dropped, evaluated, feasible

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def best_trial(trials: Sequence[FrozenTrial], max_drop: float) -> FrozenTrial | None:
    """The cheapest that is accurate enough; the more accurate of two, then the earlier."""
    enough = [t for t in evaluated(trials) if feasible(t, max_drop)]
    return min(enough, key=lambda t: (cost_of(t), dropped(t), t.number), default=None)


def feasible_trials(trials: Sequence[FrozenTrial], max_drop: float) -> list[FrozenTrial]:
    """Those that are accurate enough, as `best_trial` would choose among them, one of each plan."""
    enough = [t for t in evaluated(trials) if feasible(t, max_drop)]
    enough.sort(key=lambda t: (cost_of(t), dropped(t), t.number))
    first: dict[tuple[int, ...], FrozenTrial] = {}
    for trial in enough:
        first.setdefault(choices_of(trial), trial)
    return list(first.values())


def nearest_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The one that lost least, of those the cheapest."""
    return min(evaluated(trials), key=lambda t: (dropped(t), cost_of(t), t.number), default=None)


def front_trials(trials: Sequence[FrozenTrial]) -> tuple[FrozenTrial, ...]:
    """Trials of which none is both cheaper and more accurate than another, the cheapest first."""
    finite = [t for t in evaluated(trials) if accuracy_of(t) is not None]
    found: list[FrozenTrial] = []
    for trial in sorted(finite, key=lambda t: (cost_of(t), dropped(t), t.number)):
        if not found or dropped(trial) < dropped(found[-1]):
            found.append(trial)
    return tuple(found)
