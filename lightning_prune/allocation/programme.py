"""A dynamic programme over sums of choices that the relaxation's bound leaves, and the search that runs it.

The states of a set of items are the sums (time, error) of one choice each. A state goes if another is no slower and
no worse, if its time leaves too little for the fastest choice of the other items, or if its sum of `r` (see
`relaxation`) is not below the best known choice's excess over the bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lightning_prune.allocation.fronts import Floats, Ints
from lightning_prune.allocation.relaxation import Problem, Relaxation, bounds_of, fill, relax

_FEW = 48  # so many states cost less than sorting out the dominated ones among them
EXACT = 1e-9  # of the error: what could be gained less is not looked for, or equal items would take for ever
_LEAST_GRAIN = 1e-15  # of the largest error in sight: what float64 tells apart
_LEAST = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Effort:
    """How far a search goes. The shares are of the error, and of how far it may be above the optimum.

    Args:
        items: how many items may leave the base, those first that do so at the least `r`.
        later: likewise, in a second programme and those after it.
        width: how many states a set may have, those of the least `r`.
        branches: at how many points the item that breaks the budget is held in turn.
        programmes: for how many of them, the most promising first, a programme runs.
        near: the share from which on it is held so; below, one programme over all items does.
        enough: the share from which on a choice is taken as it is.
        again: likewise, once a programme has run.
        open: the share above which none of these numbers limits the search, and states are as many as `wide`.
        wide: see `open`.
    """

    items: int
    later: int
    width: int
    branches: int
    programmes: int
    near: float
    enough: float
    again: float
    open: float = np.inf
    wide: int = 0


@dataclass(frozen=True, eq=False)
class Found:
    """A choice of points, and what is known of it.

    Args:
        chosen: `[items]`.
        error: weighted.
        bound: no choice within the budget has less error, but for a share of `EXACT`.
    """

    chosen: Ints
    error: float
    bound: float


def search(problem: Problem, effort: Effort, known: Ints | None = None) -> Found:
    """The best choice that can be found with the effort; `bound` equals `error` if it is proven to be the best.

    Args:
        problem: the choices.
        effort: how far to go.
        known: a choice within the budget, if there is one.
    """
    relaxed = relax(problem)
    chosen = fill(problem, relaxed)
    if known is not None:
        chosen = min(known, chosen, key=problem.error)
    found = Found(chosen, problem.error(chosen), relaxed.bound)
    gap = found.error - found.bound
    if relaxed.broken is not None and gap > effort.near * abs(found.error):
        found = _branch(problem, relaxed.broken, found, effort)
    elif gap > effort.enough * abs(found.error):
        chosen, error, complete = _improve(problem, relaxed, chosen, found.error, effort.items, effort.width)
        found = Found(chosen, error, error)
        if not complete:
            found = _thorough(problem, found, [(relaxed.bound, relaxed)], effort)
    closed = found.error - found.bound <= EXACT * abs(found.error)
    return replace(found, bound=found.error) if closed else found


def _branch(problem: Problem, item: int, found: Found, effort: Effort) -> Found:
    """Holds the item that breaks the budget at one point after another, the most promising first.

    A large step of one item alone leaves much of the budget, and a multiplier that fits no other item.
    """
    points, bounds = bounds_of(problem, item)
    chosen, error, proven, left = found.chosen, found.error, np.inf, effort.programmes
    open_ends: list[tuple[float, Relaxation]] = []
    for rank, place in enumerate(np.argsort(bounds, kind="stable")):
        bound = float(bounds[place])
        if bound >= error:
            break
        most = effort.enough if rank < effort.branches else effort.open
        if error - bound <= most * abs(error):
            proven = min(proven, bound)
            break
        relaxed = relax(problem, int(points[place]))
        filled = fill(problem, relaxed)
        if (reached := problem.error(filled)) < error:
            chosen, error = filled, reached
        # After the first programme, another one is worth its time only where much may be gained.
        least, items = (effort.enough, effort.items) if left == effort.programmes else (effort.again, effort.later)
        complete = False
        if left > 0 and error - bound > least * abs(error):
            left -= 1
            chosen, error, complete = _improve(problem, relaxed, chosen, error, items, effort.width)
        if not complete:
            open_ends.append((bound, relaxed))
    return _thorough(problem, Found(chosen, error, proven), open_ends, effort)


def _thorough(problem: Problem, found: Found, ends: list[tuple[float, Relaxation]], effort: Effort) -> Found:
    """Once more with all items and more states, where so much is open that no number limits the effort.

    Args:
        problem: the choices.
        found: the best choice by now, and the bound of what is not among the ends.
        ends: what a programme has not, or not wholly, looked at, and the bounds there.
        effort: how far to go.
    """
    chosen, error, proven = found.chosen, found.error, found.bound
    for bound, relaxed in ends:
        complete = False
        if error - bound > effort.open * abs(error):
            chosen, error, complete = _improve(problem, relaxed, chosen, error, problem.fronts.items, effort.wide)
        if not complete:
            proven = min(proven, bound)
    return Found(chosen, error, min(proven, error))


@dataclass(frozen=True, eq=False)
class _States:
    """Sums of choices of some items, beyond those of the base.

    Args:
        time: `[states]`.
        error: `[states]`.
        parent: the state before the last item was added, `[states]`.
        point: the last item's point, `[states]`.
        before: the states without that item; None for those of no item.
    """

    time: Floats
    error: Floats
    parent: npt.NDArray[np.intp]
    point: Ints
    before: _States | None

    @classmethod
    def of_nothing(cls) -> _States:
        """The empty sum."""
        return cls(np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.intp), np.zeros(1, dtype=np.int64), None)

    def points(self, state: int) -> list[int]:
        """What a state is the sum of."""
        points, states = [], self
        while states.before is not None:
            points.append(int(states.point[state]))
            state, states = int(states.parent[state]), states.before
        return points


@dataclass(frozen=True)
class _Limits:
    """What a state must keep below: see `_improve`."""

    multiplier: float
    gap: float
    grain: float
    width: int

    def merge(self, states: _States, points: Ints, time: Floats, error: Floats, longest: float) -> tuple[_States, bool]:
        """The states with one more item, and whether none was left out for their number."""
        times = (time[:, None] + states.time).ravel()
        errors = (error[:, None] + states.error).ravel()
        excess = errors + self.multiplier * times
        index = ((excess < self.gap) & (times <= longest)).nonzero()[0]
        if len(index) > _FEW:
            index = index[_undominated(times[index], errors[index], self.grain)]
        complete = len(index) <= self.width
        if not complete:
            index = index[excess[index].argpartition(self.width)[: self.width]]
        column = index // len(states.time)
        parent = index - column * len(states.time)
        return _States(times[index], errors[index], parent, points[column], states), complete


def _undominated(time: Floats, error: Floats, grain: float) -> npt.NDArray[np.intp]:
    """Which sums are better than all that are faster, by growing time; errors count in whole grains."""
    order = time.argsort(kind="stable")
    # Without grains, sums that differ only in how they were rounded would all be kept.
    best = np.minimum.accumulate(np.floor(error[order] / grain))
    keep = np.empty(len(order), dtype=np.bool_)
    keep[0] = True
    np.less(best[1:], best[:-1], out=keep[1:])
    kept: npt.NDArray[np.intp] = order[keep]
    return kept


def _improve(
    problem: Problem, relaxed: Relaxation, chosen: Ints, reached: float, items: int, width: int
) -> tuple[Ints, float, bool]:
    """A better choice than the one given, if there is one among the sums looked at, its error, and whether all were.

    Items are added to the smaller of two sets of states. In the end each state of one finds the best of the other in
    the time that it leaves.
    """
    fronts = problem.fronts
    error, time, excess = relaxed.moves(problem)
    gap = reached - relaxed.bound - EXACT / 2 * abs(reached)
    live = (excess < gap).nonzero()[0]
    excess[relaxed.base] = np.inf
    cheapest = np.minimum.reduceat(excess, fronts.start)
    free = (cheapest < gap).nonzero()[0]
    if len(free) == 0:
        return chosen, reached, True
    taken = free[cheapest[free].argsort(kind="stable")][:items]
    complete = len(taken) == len(free)
    ends = [*live.searchsorted(fronts.start).tolist(), len(live)]
    groups = [slice(ends[item], ends[item + 1]) for item in taken.tolist()]
    time, error = time[live], error[live]
    fastest = [float(time[group.start]) for group in groups]  # a front's first point has the least time
    # Every merge may lose a grain, and the last step one more.
    told_apart = _LEAST_GRAIN * max(float(error.max()), -float(error.min()))
    grain = max(EXACT / 2 * abs(reached) / (fronts.items + 1), told_apart, _LEAST)
    limits = _Limits(relaxed.multiplier, gap, grain, width)
    sides = [_States.of_nothing(), _States.of_nothing()]
    longest = [relaxed.spare - sum(fastest)] * 2
    for group, least in zip(groups, fastest, strict=True):
        side = int(len(sides[1].time) < len(sides[0].time))
        longest[side] += least
        sides[side], whole = limits.merge(sides[side], live[group], time[group], error[group], longest[side])
        complete &= whole
    left, right = sides
    if len(left.time) == 0 or len(right.time) == 0:  # what was left out for its number may have been all that fits
        return chosen, reached, complete
    front = _undominated(right.time, right.error, grain)
    place = np.searchsorted(right.time[front], relaxed.spare - left.time, side="right") - 1
    total = np.where(place >= 0, left.error + right.error[front[place]], np.inf)
    best = int(total.argmin())
    if total[best] == np.inf:  # likewise
        return chosen, reached, complete
    points = np.array(left.points(best) + right.points(int(front[place[best]])), dtype=np.int64)
    candidate = relaxed.base.copy()
    candidate[fronts.item[points]] = points
    found = problem.error(candidate)
    return (candidate, found, complete) if found < reached else (chosen, reached, complete)
