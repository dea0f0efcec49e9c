"""Where a search looks next: a pure function of what was seen so far."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lightning_prune.search.parameters import Choices, Inverse, Parameters, Proposal, proposed
from lightning_prune.search.space import Candidate, Floats, Ints, SearchSpace
from lightning_prune.search.surrogate import CAP, Surrogate, probability_below, resolved, scale_of

_EVERY_PLAN = 20_000
"""Spaces of at most so many plans are looked at whole."""

_CLOSER = 2_000
"""Plans that the process is asked about, after the law has ranked them."""

_LAW_SPREAD = 0.7
"""Standard deviation of resolved drops around the law, for that ranking."""

_LEVEL_EVALUATIONS = 5
_BRACKET = 0.03
"""The level set counts as found when its bracket is that narrow in cost."""

_JITTER = 0.15
"""How far from the middle a bracket is divided, so that searches with other seeds see other plans."""

_ALLOCATIONS = 100
"""As many may be made to find parameters of the best plan."""

_DRAWS = 6
_CUTS = (0.01, 0.05)
"""By how much budgets lie below the incumbent's cost, in large spaces."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a search has evaluated, and what others are evaluating.

    Args:
        choices: evaluated, each once.
        drops: of accuracy; NaN where it was no number, `[evaluated]`.
        pending: being evaluated.
        spoiled: not to be tried again.
        parameters: with which plans were proposed, where that is known.
    """

    choices: tuple[Choices, ...]
    drops: Floats
    pending: tuple[Choices, ...] = ()
    spoiled: frozenset[Choices] = frozenset()
    parameters: Mapping[Choices, Parameters] = field(default_factory=dict)

    @cached_property
    def closed(self) -> frozenset[Choices]:
        """What need not be proposed."""
        return frozenset(self.choices) | frozenset(self.pending) | self.spoiled


@dataclass(frozen=True, eq=False)
class _Neighbours:
    """Plans that are one move from another.

    Args:
        base: the other.
        plans: `[moves, items]`.
        costs: of them, `[moves]`.
        moves: that lead there, `[moves]`.
    """

    base: Proposal
    plans: Ints
    costs: Floats
    moves: Ints

    def proposal(self, plan: Ints) -> Proposal:
        """Parameters of one of the plans."""
        row = int((self.plans == plan).all(axis=1).argmax())
        candidate = Candidate(tuple(plan.tolist()), float(self.costs[row]))
        return Proposal(self.base.share, self.base.weights, candidate, int(self.moves[row]))


class Proposer:
    """Proposes plans of one space, in two phases.

    First the level set: the budget at which, with coefficients 1, the drop crosses the threshold, by bisection between
    the cheapest plan known to be accurate enough and the dearest known not to be. Then plans that are cheaper than the
    incumbent, where the expected gain is largest:

        log(cost of the incumbent / cost) * P(drop <= max_drop)

    with the probability from a `Surrogate`. In a small space every plan is ranked, and parameters are sought for the
    best ones. In a large one the plans are those allocated for coefficients drawn from the surrogate's posterior, and
    the incumbent's neighbours. As long as no sparse plan is accurate enough, the one that most likely is comes next.

    Args:
        space: of the plans.
        max_drop: of accuracy.
        moves: whether proposals may have a move.
    """

    def __init__(self, space: SearchSpace, max_drop: float, moves: bool = True) -> None:
        self.space, self.max_drop, self.moves = space, max_drop, moves
        self.dense: Choices = (0,) * len(space.items)
        self.inverse = Inverse(space, moves)
        finite = np.isfinite(space.errors)
        # Forbidden choices may still have been evaluated by somebody.
        self._errors = np.where(finite, space.errors, 10.0 * space.errors[finite].max(initial=1.0))
        self._rows = np.arange(len(space.items))

    @property
    def looks_at_all(self) -> bool:
        """Whether every plan is ranked, so that with none proposed nothing is left."""
        return self._every is not None

    def propose(self, seen: Seen, rng: np.random.Generator) -> Proposal | None:
        """The next plan, or None where none was found that is new and cheaper than the incumbent."""
        known = self._with_dense(seen)
        costs = self._costs(known.choices)
        feasible = known.drops <= self.max_drop
        incumbent = float(costs[feasible].min()) if feasible.any() else math.inf
        found = None
        if len(seen.choices) + len(seen.pending) < _LEVEL_EVALUATIONS:
            found = self._level(known, costs, feasible, incumbent, 0.5 + _JITTER * rng.uniform(-1.0, 1.0))
        return found or self._improved(known, incumbent, rng)

    def incumbent(self, seen: Seen) -> Proposal | None:
        """Parameters of the cheapest plan that is accurate enough, or, if none are found, of one at its budget."""
        known = self._with_dense(seen)
        feasible = known.drops <= self.max_drop
        costs = np.where(feasible, self._costs(known.choices), math.inf)
        best = known.choices[int(costs.argmin())] if feasible.any() else self.dense
        if best in known.parameters:
            return proposed(self.space, *known.parameters[best])
        ones = np.ones(self.space.group_count)
        dense = proposed(self.space, 0.0, ones)
        if best == self.dense:
            return dense
        self.inverse.left = _ALLOCATIONS
        return self.inverse(best, ones) or dense

    def _with_dense(self, seen: Seen) -> Seen:
        if self.dense in seen.choices:
            return seen
        return replace(seen, choices=(self.dense, *seen.choices), drops=np.append(0.0, seen.drops))

    def _costs(self, choices: Collection[Choices]) -> Floats:
        return np.asarray(self.space.cost(np.array(list(choices), dtype=np.int64).reshape(-1, len(self.dense))))

    def _of(self, choices: npt.ArrayLike) -> Floats:
        return np.asarray(self._errors[self._rows, np.asarray(choices, dtype=np.int64)])

    def _level(
        self, known: Seen, costs: Floats, feasible: npt.NDArray[np.bool_], incumbent: float, part: float
    ) -> Proposal | None:
        space = self.space
        low = space.share(incumbent) if math.isfinite(incumbent) else 0.0
        shares = np.array([space.share(float(cost)) for cost in costs])
        beyond = shares[~feasible & (shares > low)]
        high = float(beyond.min()) if len(beyond) else 1.0
        if space.budget(low) <= space.budget(high) * (1 + _BRACKET):
            return None
        waiting = (space.share(float(cost)) for cost in self._costs(known.pending))
        marks = np.array(sorted({low, high, *(share for share in waiting if low < share < high)}))
        widest = int(np.diff(marks).argmax())
        share = (1 - part) * marks[widest] + part * marks[widest + 1]
        found = proposed(space, float(share), np.ones(space.group_count))
        if found is None or found.candidate.choices in known.closed or not found.candidate.cost < incumbent:
            return None
        return found

    def _improved(self, known: Seen, incumbent: float, rng: np.random.Generator) -> Proposal | None:
        scale = scale_of(known.drops, self.max_drop)
        target = float(resolved([self.max_drop], scale)[0])
        surrogate = self._learned(known, scale, target)
        self.inverse.left = _ALLOCATIONS
        if self._every is not None:
            ranked = self._ranked(self._every, self._every_cost, known, incumbent, surrogate, target)
            for choices in ranked.tolist():
                found = self.inverse(tuple(choices), surrogate.coefficients)
                if found is not None:
                    return found
                if self.inverse.left <= 0:
                    break
        offered = self._allocated(incumbent, surrogate, rng)
        near = self._neighbours(known, incumbent) if self.moves else None
        plans = np.array(list(offered), dtype=np.int64).reshape(-1, len(self.dense))
        costs = np.array([each.candidate.cost for each in offered.values()], dtype=np.float64)
        if near is not None:
            plans, costs = np.vstack([near.plans, plans]), np.append(near.costs, costs)
        ranked = self._ranked(plans, costs, known, incumbent, surrogate, target)
        if len(ranked) == 0:
            return None
        best = tuple(ranked[0].tolist())
        return offered[best] if best in offered or near is None else near.proposal(ranked[0])

    def _learned(self, known: Seen, scale: float, target: float) -> Surrogate:
        errors, values = self._of(known.choices), resolved(known.drops, scale)
        surrogate = Surrogate.fit(self.space.groups, errors, values, target)
        if not known.pending:
            return surrogate
        # What is under way is taken to come out as foreseen.
        waiting = self._of(known.pending)
        foreseen = np.clip(surrogate(waiting)[0], -CAP, CAP)
        return Surrogate.fit(
            self.space.groups, np.vstack([errors, waiting]), np.append(values, foreseen), target, like=surrogate
        )

    def _ranked(
        self, choices: Ints, costs: Floats, known: Seen, incumbent: float, surrogate: Surrogate, target: float
    ) -> Ints:
        """What is new and cheaper than the incumbent, the most promising first."""
        cheaper = costs < incumbent
        choices, costs = choices[cheaper], costs[cheaper]
        # As long as nothing sparse is accurate enough, what most likely is counts, not what it saves.
        late = len(known.choices) > _LEVEL_EVALUATIONS
        against = math.inf if late and incumbent >= self.space.dense_cost else incumbent
        most = _CLOSER + len(known.closed)
        if len(choices) > most:
            guess = _gain(costs, against, (target - surrogate.law(self._of(choices))) / _LAW_SPREAD)
            closer = np.argsort(-guess, kind="stable")[:most]
            choices, costs = choices[closer], costs[closer]
        fresh = np.array([tuple(row) not in known.closed for row in choices.tolist()], dtype=bool)
        choices, costs = choices[fresh], costs[fresh]
        if len(choices) == 0:
            return choices
        mean, spread = surrogate(self._of(choices))
        return np.asarray(choices[np.argsort(-_gain(costs, against, (target - mean) / spread), kind="stable")])

    def _allocated(self, incumbent: float, surrogate: Surrogate, rng: np.random.Generator) -> dict[Choices, Proposal]:
        """Plans for coefficients that are believable, some of them new."""
        space = self.space
        top = min(incumbent, space.dense_cost)
        found: dict[Choices, Proposal] = {}
        drawn = surrogate.draw(rng, _DRAWS)
        for weights in [np.ones(space.group_count), surrogate.coefficients, *drawn]:
            spread = np.exp(np.log(weights) - np.log(weights).mean())
            for cut in (*_CUTS, rng.uniform(0.0, 1.0)):
                budget = top * (1 - cut) if cut in _CUTS else space.budget(space.share(top) * (1 - cut) + cut)
                each = proposed(space, space.share(max(budget, space.least_cost)), spread)
                if each is not None:
                    found.setdefault(each.candidate.choices, each)
        return found

    def _neighbours(self, known: Seen, incumbent: float) -> _Neighbours | None:
        """What is one move from the incumbent, or from the plan that it is a move from, and cheaper."""
        best = self.incumbent(known) if math.isfinite(incumbent) else None
        base = best if best is None or not best.move else proposed(self.space, best.share, best.weights)
        if base is None:
            return None
        items, wanted = self._moves
        plans = np.repeat(np.array([base.candidate.choices], dtype=np.int64), len(items), axis=0)
        plans[np.arange(len(items)), items] = wanted
        costs = np.asarray(self.space.cost(plans))
        cheaper = costs < incumbent
        moves = 1 + items * len(self.space.entries[0]) + wanted
        return _Neighbours(base, plans[cheaper], costs[cheaper], moves[cheaper])

    @cached_property
    def _moves(self) -> tuple[Ints, Ints]:
        """Items and the choices that they may be given, `[moves]` each."""
        options = [(item, choice) for item, row in enumerate(self.inverse.useful) for choice in row]
        items, wanted = np.array(options, dtype=np.int64).T
        return items, wanted

    @cached_property
    def _every_cost(self) -> Floats:
        return np.asarray(self.space.cost(self._every))  # type: ignore[arg-type]

    @cached_property
    def _every(self) -> Ints | None:
        """Every plan that parameters may stand for, or None where they are too many."""
        possible = np.isfinite(self.space.errors)
        possible &= np.any([np.isfinite(table.costs) for table in self.space.tables], axis=0)
        options = [np.flatnonzero(row).tolist() for row in possible] if self.moves else self.inverse.useful
        if math.prod(len(choices) for choices in options) > _EVERY_PLAN:
            return None
        grids = np.meshgrid(*options, indexing="ij")
        plans = np.stack([grid.ravel() for grid in grids], axis=1).astype(np.int64)
        return np.asarray(plans[np.isfinite(self.space.cost(plans))])


def _gain(costs: Floats, incumbent: float, standard: Floats) -> Floats:
    if not math.isfinite(incumbent):
        return standard
    # A cost of 0 is worth as much as any tiny one.
    return np.asarray(np.log(incumbent / np.maximum(costs, 1e-12 * incumbent)) * probability_below(standard))
