"""The search space of a network's layers: each an item of its own, its levels repaired and costed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_prune.layers import LayerTable
from lightning_prune.plan import PlanEntry
from lightning_prune.search.objectives import Costs
from lightning_prune.search.space import CostTable, Floats, Ints, SearchSpace

_MOST_GROUPS = 6
"""Coefficients that Optuna proposes; neighbouring layers share one where there are more."""


def layer_rows(table: LayerTable, choices: Mapping[str, Sequence[PlanEntry]]) -> list[Sequence[PlanEntry]]:
    """The choices of every layer of a table, those that the search leaves alone being dense in all of them."""
    width = len(next(iter(choices.values())))
    return [choices.get(spec.name, (PlanEntry(0.0),) * width) for spec in table]


def layer_space(
    table: LayerTable,
    choices: Mapping[str, Sequence[PlanEntry]],
    names: Sequence[str],
    errors: Floats,
    costs: Costs,
) -> SearchSpace:
    """The layers that are searched, among those of a table.

    Args:
        table: all layers.
        choices: of those that are searched, equally many, the first one dense. A further dense one stands for a level
            that the layer cannot have, and is never chosen.
        names: of those that are searched, in the order of the rows of `errors`.
        errors: of their outputs, `[names, choices]`.
        costs: of `layer_rows`.
    """
    index = np.array([table.names.index(name) for name in names])
    others = np.setdiff1d(np.arange(len(table)), index)

    def total(chosen: Ints) -> Floats:
        whole = np.zeros((len(chosen), len(table)), dtype=np.int64)
        whole[:, index] = chosen
        return costs.total(whole)

    absent = np.array([[j > 0 and entry == PlanEntry(0.0) for j, entry in enumerate(choices[name])] for name in names])
    return SearchSpace(
        items=tuple((name,) for name in names),
        entries=tuple(tuple(choices[name]) for name in names),
        errors=np.where(absent, np.inf, errors),
        tables=tuple(CostTable(t.costs[index], t.fixed + float(t.costs[others, 0].sum())) for t in costs.tables),
        cost=total,
        groups=_groups(len(names)),
    )


def _groups(items: int) -> tuple[int, ...]:
    """Neighbouring items share a group, in equally many.

    >>> _groups(3), _groups(12)
    ((0, 1, 2), (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5))
    """
    groups = min(items, _MOST_GROUPS)
    return tuple(item * groups // items for item in range(items))
