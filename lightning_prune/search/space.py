"""What a search chooses from: for every item some levels, what each does to outputs, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lightning_prune.allocation import BudgetAllocator
from lightning_prune.plan import PlanEntry, SparsityPlan

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

REACH = 3.0
"""Coefficients lie between `exp(-REACH)` and `exp(REACH)`."""

_ROUNDING = 1e-9  # the least budget, by way of its logarithm, is the cheapest plan's cost up to this


@dataclass(frozen=True)
class CostTable:
    """An objective as a sum over items, true for networks of one kind (a memory layout, say).

    Args:
        costs: what each choice of an item adds, +inf where there is none, `[items, choices]`.
        fixed: what the rest of the network adds.
    """

    costs: Floats
    fixed: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """Where a search might look: `budget` and one coefficient per group, as proposed, and what follows from them.

    Args:
        choices: the chosen column of each item, `[items]`.
        cost: the objective's estimate for them.
    """

    choices: tuple[int, ...]
    cost: float


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The plans among which a search looks for the cheapest that is accurate enough.

    An item is a weight, or weights that share one level. Its choices are levels, each a sparsity and a granularity;
    the first choice of every item leaves it dense.

    Args:
        items: parameter names of each item.
        entries: the choices of each item, equally many.
        errors: how far each choice moves the outputs of its layer, at least 0, +inf forbids it, `[items, choices]`.
        tables: the objective as sums, of which the least counts when a budget is allocated.
        cost: the objective as it is estimated, for rows of choices, `[n, items]` -> `[n]`.
        groups: for each item the group whose coefficient multiplies its errors, 0 to groups - 1.

    Raises:
        ValueError: shapes differ, or an item has no dense first choice.
    """

    items: tuple[tuple[str, ...], ...]
    entries: tuple[tuple[PlanEntry, ...], ...]
    errors: Floats
    tables: tuple[CostTable, ...]
    cost: Callable[[Ints], Floats]
    groups: tuple[int, ...]
    _allocators: tuple[BudgetAllocator, ...] = field(init=False, repr=False)
    _owner: Ints = field(init=False, repr=False)
    dense_cost: float = field(init=False)
    least_cost: float = field(init=False)

    def __post_init__(self) -> None:
        """Refuse tables that do not fit together."""
        shape = (len(self.items), len(self.entries[0]) if self.entries else 0)
        for what, table in [("errors", self.errors), *((f"tables[{i}]", t.costs) for i, t in enumerate(self.tables))]:
            if table.shape != shape:
                raise ValueError(f"{what} has shape {list(table.shape)}, items and choices are {list(shape)}")
        if len(self.entries) != shape[0] or any(len(row) != shape[1] for row in self.entries):
            raise ValueError("every item needs entries, and equally many")
        if len(self.groups) != shape[0] or set(self.groups) != set(range(max(self.groups) + 1)):
            raise ValueError(f"groups are one per item, numbered from 0 without gaps, got {self.groups}")
        if any(row[0].sparsity != 0.0 for row in self.entries):
            raise ValueError("the first choice of every item is the dense one, sparsity 0")
        allocators = tuple(BudgetAllocator(self.errors, table.costs) for table in self.tables)
        object.__setattr__(self, "_allocators", allocators)
        object.__setattr__(self, "_owner", np.array(self.groups, dtype=np.int64))
        object.__setattr__(self, "dense_cost", float(self.cost(np.zeros((1, shape[0]), dtype=np.int64))[0]))
        least = min(a.least_time + t.fixed for a, t in zip(allocators, self.tables, strict=True))
        object.__setattr__(self, "least_cost", min(least, self.dense_cost))

    @property
    def group_count(self) -> int:
        """How many coefficients there are."""
        return max(self.groups) + 1

    def plan(self, choices: Sequence[int]) -> SparsityPlan:
        """The plan of one choice per item."""
        shares = {
            name: self.entries[item][choice]
            for item, choice in enumerate(choices)
            for name in self.items[item]
            if self.entries[item][choice].sparsity > 0
        }
        return SparsityPlan(shares)

    def budget(self, share: float) -> float:
        """The objective at a share of the way from the dense (0) to the cheapest (1) plan, on a logarithmic scale."""
        low = max(self.least_cost, 1e-12 * self.dense_cost)
        return self.dense_cost * math.pow(low / self.dense_cost, share)

    def share(self, cost: float) -> float:
        """The inverse of `budget`, within [0, 1]."""
        low = max(self.least_cost, 1e-12 * self.dense_cost)
        if low >= self.dense_cost:
            return 0.0
        return min(1.0, max(0.0, math.log(cost / self.dense_cost) / math.log(low / self.dense_cost)))

    def allocate(self, budget: float, coefficients: Sequence[float] | Floats | None = None) -> Candidate | None:
        """The plan with the least weighted error within a budget, or None where no plan meets it.

        Args:
            budget: of the objective.
            coefficients: one per group; ones if None.
        """
        weights = np.ones(self.group_count) if coefficients is None else np.asarray(coefficients, dtype=np.float64)
        found: list[tuple[float, Candidate]] = []
        for allocator, table in zip(self._allocators, self.tables, strict=True):
            room = budget - table.fixed
            if room < allocator.least_time * (1.0 - _ROUNDING):
                continue
            allocation = allocator.allocate(max(room, allocator.least_time), weights[self._owner])
            cost = float(self.cost(allocation.choices[None])[0])
            found.append((allocation.error, Candidate(tuple(allocation.choices.tolist()), cost)))
        return min(found, key=lambda pair: (pair[0], pair[1].cost))[1] if found else None
