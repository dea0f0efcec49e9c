"""A search space whose accuracy is a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lightning_prune.plan import PlanEntry
from lightning_prune.search.space import Candidate, CostTable, Floats, Ints, SearchSpace


def space(items: int = 4, levels: int = 8, seed: int = 0, fixed: float = 1.0) -> SearchSpace:
    """Layers of random cost and sensitivity, a coefficient for each."""
    generator = np.random.default_rng(seed)
    shares = np.linspace(0.0, 0.95, levels)
    size = generator.uniform(1.0, 4.0, items)[:, None]
    costs: Floats = size * (1.0 - shares) ** generator.uniform(0.8, 1.2, items)[:, None]
    errors: Floats = generator.uniform(0.5, 2.0, items)[:, None] * shares ** generator.uniform(2, 3, items)[:, None]

    def cost(choices: Ints) -> Floats:
        total: Floats = fixed + np.take_along_axis(costs, choices.T, axis=1).sum(axis=0)
        return total

    return SearchSpace(
        items=tuple((f"layer{item}.weight",) for item in range(items)),
        entries=tuple(tuple(PlanEntry(float(share)) for share in shares) for _ in range(items)),
        errors=errors,
        tables=(CostTable(costs, fixed),),
        cost=cost,
        groups=tuple(range(items)),
    )


@dataclass
class Network:
    """Counts what it is asked; layers matter otherwise than their errors say.

    Args:
        of: the space.
        dense: accuracy with nothing removed.
        before: is called with a number, from 1, and the candidate, before each evaluation.
    """

    of: SearchSpace
    dense: float = 0.95
    before: Callable[[int, Candidate], None] = lambda number, candidate: None
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, candidate: Candidate) -> float:
        self.asked.append(candidate.choices)
        self.before(len(self.asked), candidate)
        return self.true(candidate.choices)

    def true(self, choices: tuple[int, ...]) -> float:
        """The accuracy."""
        weights = np.linspace(0.5, 2.0, len(choices))
        error = sum(
            w * self.of.errors[item, choice] for item, (w, choice) in enumerate(zip(weights, choices, strict=True))
        )
        return self.dense - 0.02 * math.pow(error, 1.5)
