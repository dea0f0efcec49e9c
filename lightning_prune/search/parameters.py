"""What a search proposes, as numbers that a study can store, and the way back: numbers that stand for a given plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lightning_prune.search.space import REACH, Candidate, Floats, SearchSpace

if TYPE_CHECKING:
    from optuna.trial import Trial

Choices: TypeAlias = tuple[int, ...]

Parameters: TypeAlias = tuple[float, tuple[float, ...], int]
"""Share, weights and move."""

LEAST, MOST = math.exp(-REACH), math.exp(REACH)
"""Of a coefficient."""

_STEPS = 16
_PROJECTIONS = 60
_MARGIN = 1e-3


@dataclass(frozen=True)
class Proposal:
    """Parameters and the plan that they stand for.

    Args:
        share: of the way from the dense cost to the least.
        weights: one coefficient per group.
        candidate: what the space allocates for them, after the move.
        move: 0 for none; see `moved`.
    """

    share: float
    weights: tuple[float, ...]
    candidate: Candidate
    move: int = 0


def moved(space: SearchSpace, candidate: Candidate | None, move: int) -> Candidate | None:
    """A candidate with one item changed: it reaches plans that no coefficients give.

    An allocator never takes a choice that has more error than another and is dearer. The network may still be more
    accurate with it, since errors of layers only foretell accuracy.

    Args:
        space: of the candidate.
        candidate: as allocated; None stays None.
        move: `1 + item * choices + choice` gives that item that choice; 0 changes nothing.

    Raises:
        ValueError: the space has no such item, or the choice is impossible.
    """
    if move == 0 or candidate is None:
        return candidate
    count = len(space.entries[0])
    item, choice = divmod(move - 1, count)
    if not 0 <= item < len(space.items) or not math.isfinite(space.errors[item, choice]):
        raise ValueError(f"move {move} is no possible choice of {len(space.items)} items with {count} choices each")
    choices = (*candidate.choices[:item], choice, *candidate.choices[item + 1 :])
    cost = float(space.cost(np.array([choices], dtype=np.int64))[0])
    if not math.isfinite(cost):
        raise ValueError(f"move {move} gives item {item} choice {choice}, which has no finite cost")
    return Candidate(choices, cost)


def proposed(space: SearchSpace, share: float, weights: Sequence[float] | Floats, move: int = 0) -> Proposal | None:
    """What parameters stand for; None where no plan meets the budget. Coefficients are first brought into range."""
    bounded = np.clip(weights, LEAST, MOST)
    candidate = moved(space, space.allocate(space.budget(share), bounded), move)
    return None if candidate is None else Proposal(float(share), tuple(bounded.tolist()), candidate, move)


def suggested(trial: Trial, space: SearchSpace, moves: bool = True) -> Candidate | None:
    """Ask a trial for the parameters and allocate: what an objective begins with.

    The trial's attribute `candidate` says what was allocated: `choices`, one per item, and `cost`.

    Args:
        trial: of a study with any sampler.
        space: of the plans.
        moves: whether to ask for a move, too: what is drawn at random or comes from a sampler that knows nothing of
            the space gains nothing by it.

    Returns:
        None where no plan meets the budget.

    Raises:
        ValueError: the move, enqueued by somebody, is none of this space; see `moved`.
    """
    share = trial.suggest_float("budget", 0.0, 1.0)
    weights = [trial.suggest_float(name, LEAST, MOST, log=True) for name in weight_names(space)]
    move = trial.suggest_int("move", 0, len(space.items) * len(space.entries[0])) if moves else 0
    candidate = moved(space, space.allocate(space.budget(share), weights), move)
    if candidate is not None:
        choices = [int(choice) for choice in candidate.choices]
        trial.set_user_attr("candidate", {"choices": choices, "cost": float(candidate.cost)})
    return candidate


def weight_names(space: SearchSpace) -> list[str]:
    """Parameters that are coefficients, one per group."""
    return [f"weight.{group}" for group in range(space.group_count)]


def useful_choices(space: SearchSpace) -> list[list[int]]:
    """Of each item the choices that no other one dominates in error and cost: those that are ever allocated."""
    found = []
    for item, errors in enumerate(space.errors):
        kept = set()
        for table in space.tables:
            costs = table.costs[item]
            for choice in np.flatnonzero(np.isfinite(errors) & np.isfinite(costs)):
                no_worse = (errors <= errors[choice]) & (costs <= costs[choice])
                better = no_worse & ((errors < errors[choice]) | (costs < costs[choice]))
                if not better.any() and not no_worse[:choice].any():
                    kept.add(int(choice))
        found.append(sorted(kept))
    return found


class Inverse:
    """Finds parameters that stand for a plan.

    Args:
        space: of the plans.
        moves: whether parameters may have a move.
        left: how many allocations may still be made; with none left nothing is found.
    """

    def __init__(self, space: SearchSpace, moves: bool, left: int = 100) -> None:
        self.space, self.moves, self.left = space, moves, left
        self.useful = useful_choices(space)
        self._rows = np.arange(len(space.items))
        self._groups = np.array(space.groups)

    def __call__(self, choices: Choices, weights: Floats) -> Proposal | None:
        """Parameters for which the space allocates these choices, or None where none are found.

        The budget is what they need. Coefficients are moved, from those given, until no plan within that budget has
        less weighted error: each plan q that the space prefers to the wanted p adds the half-space
        `sum_l c[l] (e[l, p_l] - e[l, q_l]) < 0`, onto whose inside the logarithms of c are projected. Where that
        fails, parameters are sought for a plan that one move takes there.

        Args:
            choices: wanted, each with a finite error and cost.
            weights: to start from, one per group.
        """
        found = self._supported(choices, weights)
        if found is not None or not self.moves:
            return found
        strange = [item for item, choice in enumerate(choices) if choice not in self.useful[item]]
        if len(strange) > 1:  # one move is too few
            return None
        count = len(self.space.entries[0])
        for item in strange or range(len(choices)):
            own = choices[item]
            others = sorted((c for c in self.useful[item] if c != own), key=lambda c, own=own: abs(c - own))  # type: ignore[misc]
            for other in others[:2]:
                base = self._supported((*choices[:item], other, *choices[item + 1 :]), weights)
                if base is not None:
                    return proposed(self.space, base.share, base.weights, 1 + item * count + own)
        return None

    def _supported(self, choices: Choices, weights: Floats) -> Proposal | None:
        space, wanted = self.space, np.array(choices)
        if any(choice not in useful for choice, useful in zip(choices, self.useful, strict=True)):
            return None
        totals = [table.costs[self._rows, wanted].sum() + table.fixed for table in space.tables]
        # A hair more: the way from cost to share and back rounds.
        share = space.share(float(min(totals)) * (1 + 1e-9))
        logs, rows = np.log(np.clip(weights, LEAST, MOST)), []
        errors = space.errors[self._rows, wanted]
        for _ in range(_STEPS):
            if self.left <= 0:
                return None
            self.left -= 1
            found = proposed(space, share, np.exp(logs))
            if found is None or found.candidate.choices == choices:
                return found
            more = errors - space.errors[self._rows, np.array(found.candidate.choices)]
            row = np.bincount(self._groups, more, minlength=len(logs))
            if not (row < 0).any():  # better in every group
                return None
            rows.append(row / np.abs(row).max())
            logs = _inside(logs, np.array(rows))
        return None


def _inside(logs: Floats, rows: Floats) -> Floats:
    """Logarithms of coefficients near those given for which `rows @ exp(logs)` is below 0, if that is soon found."""
    logs = logs.copy()
    for _ in range(_PROJECTIONS):
        weights = np.exp(logs)
        size = (np.abs(rows) * weights).sum(axis=1)
        above = (rows @ weights) / size + _MARGIN
        worst = int(above.argmax())
        if above[worst] <= 0:
            break
        slope = rows[worst] * weights / size[worst]
        step = np.clip(-1.2 * above[worst] / float(slope @ slope) * slope, -1.0, 1.0)
        logs = np.clip(logs + step, -REACH, REACH)
    return logs
