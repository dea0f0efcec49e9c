"""The choice problem under one budget, and its Lagrangian relaxation.

With `e` the weighted errors, `t` the times, `B` the budget and a multiplier m >= 0, a choice j costs

    sum_l e[l, j_l] = bound + sum_l r[l, j_l] + m * (B - sum_l t[l, j_l])
    r[l, k] = e[l, k] + m * t[l, k] - min_i(e[l, i] + m * t[l, i]) >= 0
    bound   = sum_l min_i(e[l, i] + m * t[l, i]) - m * B

so within the budget nothing costs less than the bound, and what beats a known choice uses only points whose `r` is
below the excess of that choice over the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_prune.allocation.fronts import Floats, Fronts, Ints


@dataclass(frozen=True, eq=False)
class Weighted:
    """The points with one set of coefficients: what does not depend on the budget.

    Args:
        fronts: the points.
        coefficients: by which each item's errors are multiplied, `[items]`.
    """

    fronts: Fronts
    coefficients: Floats

    @cached_property
    def errors(self) -> Floats:
        """Errors times coefficients, `[points]`."""
        weighted: Floats = self.fronts.error * self.coefficients[self.fronts.item]
        return weighted

    @cached_property
    def steps(self) -> tuple[Ints, Floats]:
        """The points at the ends of the hulls' segments, the steepest first, and their slopes.

        A segment that saves nothing is left out. Slopes fall along a hull, so an item's segments are in its order.
        """
        slope = self.fronts.slope * self.coefficients[self.fronts.owner]
        order = np.argsort(-slope, kind="stable")[: np.count_nonzero(slope > 0.0)]
        return order, slope[order]

    @cached_property
    def ordered(self) -> tuple[Ints, Floats, Ints]:
        """Of the steps, the item, the time that each takes, and the point that it leads to."""
        order, _ = self.steps
        return self.fronts.owner[order], self.fronts.pace[order], self.fronts.hull[order]


@dataclass(frozen=True, eq=False)
class Problem:
    """One budget and one set of coefficients.

    Args:
        points: weighted.
        budget: the time that a choice may take, at least that of the fastest.
    """

    points: Weighted
    budget: float

    @property
    def fronts(self) -> Fronts:
        """The points."""
        return self.points.fronts

    @property
    def weighted(self) -> Floats:
        """Errors times coefficients, `[points]`."""
        return self.points.errors

    def error(self, chosen: Ints) -> float:
        """The weighted error of a choice of points."""
        return float(self.weighted[chosen].sum())

    def spare(self, chosen: Ints) -> float:
        """The time that a choice of points leaves of the budget."""
        return self.budget - float(self.fronts.time[chosen].sum())


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The Lagrangian relaxation at the multiplier whose bound is highest.

    Args:
        base: the point of each item: on its hull, together within the budget, `[items]`.
        spare: the time that they leave, at least 0.
        multiplier: error per time where the budget runs out; 0 where it does not.
        bound: no choice within the budget has less error, but for rounding.
        broken: the item whose next segment no longer fits; None if the budget does not bind.
        fixed: the item that is held at one point; None if none is.
    """

    base: Ints
    spare: float
    multiplier: float
    bound: float
    broken: int | None
    fixed: int | None

    def moves(self, problem: Problem) -> tuple[Floats, Floats, Floats]:
        """Of each point, against the base's point of its item: weighted error, time, and `r`, infinite if forbidden."""
        item = problem.fronts.item
        error = problem.weighted - problem.weighted[self.base][item]
        time = problem.fronts.time - problem.fronts.time[self.base][item]
        excess = np.maximum(error + self.multiplier * time, 0.0)
        if self.fixed is not None:
            excess[item == self.fixed] = np.inf
        excess[self.base] = 0.0
        return error, time, excess


def relax(problem: Problem, held: int | None = None) -> Relaxation:
    """Takes segments of the hulls in order of error saved per time until one does not fit.

    This is what bisection for the multiplier converges to, in one sort.

    Args:
        problem: the choices.
        held: a point that its item must have.
    """
    fronts = problem.fronts
    base = fronts.start.copy()
    steps, slope = problem.points.steps
    owner, pace, hull = problem.points.ordered
    fixed = None
    if held is not None:
        fixed = int(fronts.item[held])
        base[fixed] = held
        others = owner != fixed
        pace = pace * others  # those of the item itself take no time, and lead nowhere below
    slack = problem.spare(base)
    spent = pace.cumsum()
    taken = int(spent.searchsorted(slack, side="right"))
    items, ends = owner[:taken], hull[:taken]
    if held is not None:
        items, ends = items[others[:taken]], ends[others[:taken]]
    np.maximum.at(base, items, ends)
    spare = max(problem.spare(base), 0.0)
    if taken == len(steps):
        return Relaxation(base, spare, 0.0, problem.error(base), None, fixed)
    multiplier = float(slope[taken])
    bound = problem.error(base) - multiplier * spare
    return Relaxation(base, spare, multiplier, bound, int(owner[taken]), fixed)


def bounds_of(problem: Problem, item: int) -> tuple[Ints, Floats]:
    """The points of one item and the bound if it is held there, infinite where that exceeds the budget."""
    fronts = problem.fronts
    points = np.flatnonzero(fronts.item == item)
    _, slope = problem.points.steps
    owner, pace, _ = problem.points.ordered
    rest = np.flatnonzero(owner != item)
    others = np.delete(fronts.start, item)
    slack = problem.budget - float(fronts.time[others].sum()) - fronts.time[points]
    spent, gained = np.zeros(len(rest) + 1), np.zeros(len(rest) + 1)
    np.cumsum(pace[rest], out=spent[1:])
    np.cumsum(slope[rest] * pace[rest], out=gained[1:])
    saved = np.interp(slack, spent, gained)
    bound = problem.weighted[points] + problem.error(others) - saved
    return points, np.where(slack >= 0.0, bound, np.inf)


def fill(problem: Problem, relaxed: Relaxation) -> Ints:
    """From the base, moves one item after another to where it saves most error in the time left, until nothing fits."""
    fronts, weighted = problem.fronts, problem.weighted
    chosen: Ints = relaxed.base.copy()
    while True:
        saved = weighted[chosen][fronts.item] - weighted
        taken = fronts.time - fronts.time[chosen][fronts.item]
        saved[taken > problem.spare(chosen)] = 0.0
        best = int(saved.argmax())
        if saved[best] <= 0.0:
            return chosen
        chosen[fronts.item[best]] = best
