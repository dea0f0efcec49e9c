"""The latency-budget allocator: the least weighted error within a time, over a table of choices per item."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lightning_prune.allocation.fronts import Floats, Fronts, Ints
from lightning_prune.allocation.programme import EXACT, Effort, Found, search
from lightning_prune.allocation.relaxation import Problem, Weighted

__all__ = ["Allocation", "BudgetAllocator", "couple"]

_FEW_ITEMS = 24
_FEW = Effort(12, 12, 64, branches=6, programmes=6, near=0.005, enough=0.001, again=0.001, open=0.01, wide=512)
_MANY = Effort(14, 8, 48, branches=2, programmes=2, near=0.005, enough=0.002, again=0.008, open=0.01, wide=512)
"""Of few items each counts for more; of many, whole programmes are what takes time, and two of them are mostly enough:
in a few of a hundred tables more than one per cent of the error may still be gained, and the search goes on."""

_FIRST_WIDTH = 128
_GROWTH = 4


@dataclass(frozen=True, eq=False)
class Allocation:
    """One choice per item.

    Args:
        choices: columns of the tables, `[items]`.
        error: the sum of the chosen errors times coefficients.
        time: the sum of the chosen times, correctly rounded; never above the budget.
        bound: no choices within the budget have less error, but for a billionth of it; equals `error` if these are
            proven best.
    """

    choices: Ints
    error: float
    time: float
    bound: float

    @property
    def proven(self) -> bool:
        """Whether no other choices within the budget have less error."""
        return self.bound >= self.error


@dataclass(frozen=True, eq=False)
class BudgetAllocator:
    """Chooses for each item so that the error is least within a budget.

    minimise  sum_l c[l] * errors[l, j_l]   subject to   sum_l times[l, j_l] <= budget

    An item is a layer, or layers that must share one level (`couple` sums their rows). A choice is a level, or a level
    and a kernel, flattened. Neither errors nor times need to be monotone, convex or positive in any order: sparse may
    be slower than dense. Whatever adds up may stand for time: seconds, MACs, bytes, joules.

    What depends on neither budget nor coefficients, the Pareto front of each item and its lower convex hull, is found
    once, when the allocator is built; what depends on coefficients alone, once for several budgets in a row.

    Args:
        errors: `[items, choices]`; +inf forbids a choice.
        times: `[items, choices]`, in the unit of the budget, at least 0; +inf where a choice is impossible.

    Raises:
        ValueError: tables of other shapes, NaN, -inf or a negative time, or an item without a possible choice; the
            message names the place.

    >>> allocator = BudgetAllocator([[0.0, 1.0, 4.0], [0.0, 3.0, 9.0]], [[4.0, 2.0, 1.0], [8.0, 4.0, 2.0]])
    >>> found = allocator.exact(8.0)
    >>> found.choices.tolist(), found.error, found.time, found.proven
    ([0, 1], 3.0, 8.0, True)
    >>> allocator.allocate(6.0, coefficients=[1.0, 0.0]).choices.tolist()
    [0, 2]
    """

    errors: Floats
    times: Floats
    _fronts: Fronts = field(init=False, repr=False)
    _largest: float = field(init=False, repr=False)
    _last: dict[bytes, Weighted] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse tables that are none, and keep copies that cannot be written to."""
        errors, times = _table("errors", self.errors), _table("times", self.times)
        if errors.shape != times.shape:
            raise ValueError(
                f"errors and times have one row per item and one column per choice, both the same; "
                f"got {list(errors.shape)} and {list(times.shape)}"
            )
        if (times < 0.0).any():
            place = _first(times < 0.0)
            raise ValueError(f"times{place} is {times[tuple(place)]!s}; a time is at least 0")
        possible = (np.isfinite(errors) & np.isfinite(times)).any(axis=1)
        if not possible.all():
            item = int(np.argmin(possible))
            raise ValueError(
                f"item {item} has no choice with a finite error and a finite time; allow one, its dense level say"
            )
        object.__setattr__(self, "errors", errors)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "_fronts", Fronts.of(errors, times))
        object.__setattr__(self, "_largest", float(np.abs(self._fronts.error).max()))

    @cached_property
    def least_time(self) -> float:
        """The smallest budget that can be met: the time of each item's fastest choice, summed."""
        return _sum(self._fronts.time[self._fronts.start])

    def allocate(self, budget: float, coefficients: npt.ArrayLike | None = None) -> Allocation:
        """Good choices, at once: the relaxation, then a short programme over the items that it leaves open.

        Segments of the hulls are taken in order of error saved per time until one does not fit (what bisection for the
        Lagrange multiplier converges to); the time left is filled greedily; then a dynamic programme of few states
        looks at the items and points nearest to the multiplier. Where more than 1 % may still be gained, a longer one
        looks at all of them. `Allocation.bound` says what is left to gain.

        Args:
            budget: the time that the choices may take together.
            coefficients: c, at least 0, `[items]`; ones if None.

        Raises:
            ValueError: the budget is below `least_time`, or a coefficient is negative, infinite or NaN.

        Source: Sinha & Zoltners, "The Multiple-Choice Knapsack Problem" (1979); Frantar & Alistarh, SPDY (2022), for
        the problem.
        """
        effort = _FEW if len(self.errors) <= _FEW_ITEMS else _MANY
        return self._solve(budget, coefficients, lambda problem: search(problem, effort))

    def exact(self, budget: float, coefficients: npt.ArrayLike | None = None, most_states: int = 1 << 15) -> Allocation:
        """The best choices: a dynamic programme over undominated sums, cut by the relaxation's bound.

        Times are summed as they are, not in buckets. Exact means: no choices within the budget have an error that is
        lower by more than a billionth of it; only choices whose time comes within 1e-15 per item of the budget may be
        passed over. The programme is repeated with more states until none has to be left out. Tables exist (many
        items whose errors and times all lie on one line) for which that could take more than `most_states`: then
        `proven` is False, and `bound` says how much is open.

        Args:
            budget: as for `allocate`, and so are coefficients and errors raised.
            coefficients: c, at least 0, `[items]`; ones if None.
            most_states: how many sums to keep at once.

        Source: Pisinger, "A Minimal Algorithm for the Multiple-Choice Knapsack Problem" (1995), for the core.
        """
        if most_states < 1:
            raise ValueError(f"most_states is how many sums are kept, at least 1, got {most_states!r}")

        def proven(problem: Problem) -> Found:
            width, found = min(_FIRST_WIDTH, most_states), None
            while True:
                points = self.errors.shape[1]
                effort = Effort(
                    len(self.errors), len(self.errors), width, points, points, near=0.002, enough=EXACT, again=EXACT
                )
                found = search(problem, effort, None if found is None else found.chosen)
                if found.bound >= found.error or width >= most_states:
                    return found
                width = min(width * _GROWTH, most_states)

        return self._solve(budget, coefficients, proven)

    def _solve(self, budget: float, coefficients: npt.ArrayLike | None, run: Callable[[Problem], Found]) -> Allocation:
        fronts, points = self._fronts, self._weighted(coefficients)
        budget, least = float(budget), self.least_time
        if not budget >= least:
            raise ValueError(
                f"budget {budget!r} cannot be met: the fastest choices take {least!r}; allow at least that"
            )
        # Sums are rounded. A budget that some choices just meet is first given the room for it; what then turns out to
        # exceed the budget is sought again below it.
        rounding = 4 * fronts.items * float(np.finfo(np.float64).eps)
        for room in (rounding, 0.0, -rounding, -64 * rounding):
            found = run(Problem(points, budget * (1 + room)))
            time = _sum(fronts.time[found.chosen])
            if time <= budget:
                break
        chosen = found.chosen
        if time > budget:
            chosen, time = fronts.start, least
        error = _sum(fronts.error[chosen] * points.coefficients)
        # The search's sums are rounded otherwise than this one.
        bound = error if found.bound >= found.error else min(found.bound, error)
        return Allocation(fronts.choice[chosen], error, time, bound)

    def _weighted(self, given: npt.ArrayLike | None) -> Weighted:
        values = np.ones(self._fronts.items) if given is None else np.array(given, dtype=np.float64)
        key = values.tobytes()
        known = self._last.get(key)
        if known is None or values.shape != known.coefficients.shape:
            self._require(values)
            self._last.clear()
            self._last[key] = known = Weighted(self._fronts, values)
        return known

    def _require(self, values: Floats) -> None:
        items = self._fronts.items
        if values.shape != (items,):
            raise ValueError(f"coefficients are one per item, [{items}], got {list(values.shape)}")
        bad = ~((values >= 0.0) & (values < np.inf))
        if bad.any():
            place = _first(bad)
            raise ValueError(f"coefficients{place} is {values[tuple(place)]!s}; a coefficient is finite and at least 0")
        if not math.isfinite(float(values.max()) * self._largest * items):
            raise ValueError(f"the largest coefficient, {values.max()!s}, times errors exceeds float64: rescale them")


def couple(values: npt.ArrayLike, groups: npt.ArrayLike) -> Floats:
    """Sums the rows of layers that must share one choice: errors, or times already least over kernels.

    Args:
        values: `[layers, choices]`.
        groups: of each layer, the item it belongs to, 0 to items - 1, none left out, `[layers]`.

    Returns:
        `[items, choices]`.

    Raises:
        ValueError: groups are not one per layer, or skip an item.

    >>> couple([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], groups=[0, 1, 0]).tolist()
    [[6.0, 8.0], [3.0, 4.0]]
    """
    table, owners = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if table.ndim != 2 or owners.shape != table.shape[:1]:
        raise ValueError(
            f"couple needs values [layers, choices] and one group per layer, "
            f"got {list(table.shape)} and {list(owners.shape)}"
        )
    present = np.unique(owners)
    if len(present) == 0 or not np.array_equal(present, np.arange(len(present))):
        raise ValueError(f"groups are numbered 0 to items - 1 and none is left out, got {present.tolist()}")
    sums = np.zeros((len(present), table.shape[1]))
    np.add.at(sums, owners.astype(np.int64), table)
    return sums


def _table(name: str, given: npt.ArrayLike) -> Floats:
    values = np.array(given, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} is a table [items, choices], neither empty, got shape {list(values.shape)}")
    bad = np.isnan(values) | (values == -np.inf)
    if bad.any():
        place = _first(bad)
        raise ValueError(f"{name}{place} is {values[tuple(place)]!s}; only +inf may stand for an impossible choice")
    values.flags.writeable = False
    return values


def _sum(values: Floats) -> float:
    """Correctly rounded; a list is gone through faster than an array."""
    return math.fsum(values.tolist())


def _first(bad: npt.NDArray[np.bool_]) -> list[int]:
    return [int(index) for index in np.argwhere(bad)[0]]
