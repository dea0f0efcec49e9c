import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.granularities import Filter
from lightning_prune.plan import PlanEntry
from lightning_prune.search.space import CostTable, Floats, Ints, SearchSpace


def space(
    errors: Any,
    costs: Any,
    groups: tuple[int, ...] | None = None,
    fixed: tuple[float, ...] = (0.0,),
    cost: Any = None,
) -> SearchSpace:
    """Items with one parameter each; several cost tables where `costs` has three dimensions."""
    errors = np.asarray(errors, dtype=np.float64)
    tables = np.asarray(costs, dtype=np.float64).reshape(-1, *errors.shape)
    items, choices = errors.shape
    rows = np.arange(items)

    def least(plans: Ints) -> Floats:
        sums = [table[rows, plans].sum(axis=-1) + extra for table, extra in zip(tables, fixed, strict=True)]
        return np.asarray(np.min(sums, axis=0))

    return SearchSpace(
        items=tuple((f"layer{item}.weight",) for item in range(items)),
        entries=tuple(tuple(PlanEntry(level / choices) for level in range(choices)) for _ in range(items)),
        errors=errors,
        tables=tuple(CostTable(table, extra) for table, extra in zip(tables, fixed, strict=True)),
        cost=cost or least,
        groups=groups or tuple(range(items)),
    )


def test_costs_of_the_dense_and_of_the_cheapest_plan() -> None:
    found = space([[0, 1, 2], [0, 1, 2]], [[4, 2, 1], [8, 9, 3]], fixed=(5.0,))
    assert (found.dense_cost, found.least_cost, found.group_count) == (17.0, 9.0, 2)


def test_the_least_cost_is_that_of_the_best_table_and_never_above_dense() -> None:
    tables = [[[4, 2], [4, 4]], [[9, 1], [9, 1]]]
    assert space([[0, 1], [0, 1]], tables, fixed=(0.0, 1.0)).least_cost == 3.0
    # An estimate may lie below every table's sum.
    below = space([[0, 1], [0, 1]], [[4, 3], [4, 3]], cost=lambda plans: np.full(len(plans), 2.0))
    assert below.least_cost == below.dense_cost == 2.0


@given(share=st.floats(0.0, 1.0), dense=st.floats(1e-6, 1e3), ratio=st.floats(0.01, 0.99))
def test_a_share_stands_for_a_budget_on_a_logarithmic_scale(share: float, dense: float, ratio: float) -> None:
    found = space([[0, 1]], [[dense, dense * ratio]])
    assert found.budget(0.0) == dense
    assert found.budget(1.0) == pytest.approx(dense * ratio, rel=1e-12)
    assert found.budget(share) == pytest.approx(dense * ratio**share, rel=1e-12)
    assert found.share(found.budget(share)) == pytest.approx(share, abs=1e-9)


def test_shares_stay_within_their_range() -> None:
    found = space([[0, 1]], [[4.0, 1.0]])
    assert found.share(2.0) == pytest.approx(0.5)
    assert (found.share(9.0), found.share(0.1)) == (0.0, 1.0)
    assert space([[0, 1]], [[1.0, 2.0]]).share(1.0) == 0.0  # nothing is cheaper than dense


def test_a_free_plan_does_not_end_in_a_logarithm_of_zero() -> None:
    found = space([[0, 1]], [[4.0, 0.0]])
    assert math.isfinite(found.budget(1.0))
    assert found.allocate(found.budget(1.0)) is not None


@settings(max_examples=60)
@given(data=st.data())
def test_allocation_is_the_least_weighted_error_within_the_budget_of_any_table(data: st.DataObject) -> None:
    items, choices, tables = data.draw(st.tuples(st.integers(1, 4), st.integers(2, 4), st.integers(1, 3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    errors = rng.random((items, choices))
    errors[:, 0] = 0.0
    costs = rng.random((tables, items, choices))
    groups = tuple(min(item, data.draw(st.integers(0, 2)) + item // 2) for item in range(items))
    groups = tuple(sorted(set(groups)).index(group) for group in groups)
    fixed = tuple(rng.random(tables))
    found = space(errors, costs, groups, fixed)
    weights = np.exp(rng.uniform(-3, 3, found.group_count))
    budget = float(rng.uniform(found.least_cost, found.dense_cost * 1.2))
    rows = np.arange(items)
    within = [
        float((errors[rows, plan] * weights[list(groups)]).sum())
        for plan in itertools.product(range(choices), repeat=items)
        if min(table[rows, plan].sum() + extra for table, extra in zip(costs, fixed, strict=True)) <= budget
    ]
    got = found.allocate(budget, weights)
    assert got is not None
    assert got.cost <= budget * (1 + 1e-12)
    error = float((errors[rows, list(got.choices)] * weights[list(groups)]).sum())
    # The fast allocator is allowed a little above the exact one on larger tables.
    assert error == pytest.approx(min(within), rel=0.01, abs=1e-12)


def test_no_plan_meets_a_budget_below_the_least() -> None:
    found = space([[0, 1]], [[4.0, 1.0]], fixed=(2.0,))
    assert found.allocate(2.9) is None
    got = found.allocate(3.0)
    assert got is not None
    assert (got.choices, got.cost) == ((1,), 3.0)


def test_coefficients_belong_to_groups_and_are_ones_by_default() -> None:
    found = space([[0, 1.0], [0, 1.1], [0, 1.2]], [[4, 1]] * 3, groups=(0, 1, 1))
    default = found.allocate(9.0)
    assert default == found.allocate(9.0, [1.0, 1.0])
    assert default is not None
    assert default.choices == (1, 0, 0)
    weighted = found.allocate(9.0, [2.0, 1.0])
    assert weighted is not None
    assert weighted.choices == (0, 1, 0)


def test_a_plan_names_what_is_removed_of_every_parameter_of_an_item() -> None:
    entries = ((PlanEntry(0.0), PlanEntry(0.5), PlanEntry(0.25, Filter())), (PlanEntry(0.0),) * 3)
    costs = np.ones((2, 3))
    found = SearchSpace(
        (("a.weight", "b.weight"), ("c.weight",)),
        entries,
        np.zeros((2, 3)),
        (CostTable(costs),),
        lambda plans: np.ones(len(plans)),
        (0, 0),
    )
    assert dict(found.plan((1, 0))) == {"a.weight": 0.5, "b.weight": 0.5}
    structured = found.plan((2, 1))
    assert (structured["a.weight"], structured.granularity("b.weight")) == (0.25, Filter())
    assert not dict(found.plan((0, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": np.zeros((2, 3))}, r"errors has shape \[2, 3\], items and choices are \[2, 2\]"),
        ({"tables": (CostTable(np.ones((2, 2))), CostTable(np.ones((1, 2))))}, r"tables\[1\] has shape \[1, 2\]"),
        ({"entries": ((PlanEntry(0.0),) * 2,)}, "every item needs entries, and equally many"),
        ({"entries": ((PlanEntry(0.0),) * 2, (PlanEntry(0.0),))}, "every item needs entries, and equally many"),
        ({"groups": (0, 2)}, r"groups are one per item, numbered from 0 without gaps, got \(0, 2\)"),
        ({"groups": (0,)}, "groups are one per item"),
        ({"entries": ((PlanEntry(0.5), PlanEntry(0.9)),) * 2}, "the first choice of every item is the dense one"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {
        "items": (("a",), ("b",)),
        "entries": ((PlanEntry(0.0), PlanEntry(0.5)),) * 2,
        "errors": np.zeros((2, 2)),
        "tables": (CostTable(np.ones((2, 2))),),
        "cost": lambda plans: np.ones(len(plans)),
        "groups": (0, 1),
    }
    SearchSpace(**whole)
    with pytest.raises(ValueError, match=message):
        SearchSpace(**{**whole, **change})
