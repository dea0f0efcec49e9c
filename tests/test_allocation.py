"""Allocators: against exhaustive search, against bounds and definitions written otherwise, and on bad input."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_prune.allocation import (
    Allocation,
    BudgetAllocator,
    couple,
    erk,
    global_shares,
    lamp,
    sensitivity_threshold,
    uniform,
)
from lightning_prune.allocation.budget import _MANY
from lightning_prune.allocation.fronts import Fronts
from lightning_prune.allocation.programme import Effort, search
from lightning_prune.allocation.relaxation import Problem, Weighted, bounds_of, relax
from lightning_prune.granularities import NM
from lightning_prune.layers import LayerCall, LayerSpec, LayerTable
from lightning_prune.plan import SparsityPlan
from tests.benchmarks.bench_allocation import tables as bench_tables

Floats = npt.NDArray[np.float64]

KINDS = ("convex", "noisy", "staircase", "random", "linear")


def tables(kind: str, items: int, levels: int, seed: int) -> tuple[Floats, Floats]:
    """Errors and times of one kind, `[items, levels]`."""
    rng = np.random.default_rng(seed)
    level = np.linspace(0.0, 0.99, levels)
    error = rng.lognormal(0, 1, (items, 1)) * level ** rng.uniform(1.5, 6, (items, 1))
    time = rng.lognormal(0, 1, (items, 1)) * (1 - level * rng.uniform(0.5, 1, (items, 1)))
    if kind == "noisy":  # neither is monotone
        error, time = error * rng.lognormal(0, 0.3, error.shape), time * rng.lognormal(0, 0.3, time.shape)
    elif kind == "staircase":
        time = rng.lognormal(0, 1, (items, 1)) * np.ceil((1 - level) * rng.integers(2, 8, (items, 1)))
    elif kind == "random":
        error, time = rng.random(error.shape), rng.random(time.shape)
    elif kind == "linear":  # every point on one line: the multiplier tells none from another
        time = np.sort(rng.random(time.shape), axis=1)
        error = 2.0 - time
    return error, time


def budgets(times: Floats, shares: tuple[float, ...] = (0.0, 0.1, 0.5, 0.9)) -> list[float]:
    low, high = math.fsum(times.min(axis=1)), math.fsum(times.max(axis=1))
    return [low + share * (high - low) for share in shares]


def enumerated(errors: Floats, times: Floats, budget: float, scale: Floats) -> float:
    """The least weighted error of all plans within the budget, looked at one by one."""
    best = math.inf
    for choice in itertools.product(range(errors.shape[1]), repeat=len(errors)):
        rows = list(enumerate(choice))
        if math.fsum(times[row] for row in rows) <= budget:
            best = min(best, math.fsum(s * errors[row] for s, row in zip(scale, rows, strict=True)))
    return best


def check_sums(found: Allocation, errors: Floats, times: Floats, budget: float, scale: Floats) -> None:
    """What an allocation says of itself is so, and it keeps the budget, to the last bit."""
    assert found.choices.shape == (len(errors),)
    rows = list(enumerate(found.choices.tolist()))
    assert found.time == math.fsum(times[row] for row in rows) <= budget
    assert found.error == pytest.approx(math.fsum(s * errors[row] for s, row in zip(scale, rows, strict=True)))
    assert found.bound <= found.error


# Few whole numbers make ties, dominated choices and exactly met budgets likely; sums of them are exact.
few = st.integers(0, 6).map(float)
forbidden = st.one_of(few, few, few, few, st.just(math.inf))
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@st.composite
def whole_problems(draw: st.DrawFn) -> tuple[Floats, Floats, Floats, float]:
    shape = draw(shapes)
    errors = draw(arrays.arrays(np.float64, shape, elements=forbidden))
    times = draw(arrays.arrays(np.float64, shape, elements=forbidden))
    assume((np.isfinite(errors) & np.isfinite(times)).any(axis=1).all())
    scale = draw(arrays.arrays(np.float64, shape[:1], elements=st.integers(0, 3).map(float)))
    least = float(np.where(np.isfinite(errors), times, np.inf).min(axis=1).sum())
    return errors, times, scale, least + draw(st.integers(0, 15))


@settings(max_examples=80)
@given(whole_problems())
def test_exact_equals_enumeration_over_whole_numbers(problem: tuple[Floats, Floats, Floats, float]) -> None:
    errors, times, scale, budget = problem
    allocator = BudgetAllocator(errors, times)
    found = allocator.exact(budget, scale)
    usable = np.where(np.isfinite(errors), errors, 0.0), np.where(np.isfinite(errors), times, np.inf)
    check_sums(found, *usable, budget, scale)
    assert found.error == enumerated(*usable, budget, scale)
    assert found.proven
    fast = allocator.allocate(budget, scale)
    check_sums(fast, *usable, budget, scale)
    assert fast.bound <= found.error <= fast.error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("items", "levels"), [(1, 7), (3, 9), (4, 8), (6, 4)])
def test_exact_equals_enumeration_over_real_tables(kind: str, items: int, levels: int) -> None:
    for seed in range(3):
        errors, times = tables(kind, items, levels, seed)
        scale = np.random.default_rng(seed).uniform(0.5, 2, items)
        grid = np.meshgrid(*[np.arange(levels)] * items, indexing="ij")
        total_error = sum(scale[i] * errors[i][grid[i]] for i in range(items))
        total_time = sum(times[i][grid[i]] for i in range(items))
        allocator = BudgetAllocator(errors, times)
        for budget in budgets(times, (0.013, 0.1, 0.4, 0.8)):
            found = allocator.exact(budget, scale)
            check_sums(found, errors, times, budget, scale)
            assert found.error == pytest.approx(float(total_error[total_time <= budget].min()), rel=1e-9)
            assert found.proven


@pytest.mark.parametrize("kind", KINDS)
def test_exact_equals_a_programme_over_every_time(kind: str) -> None:
    """Twelve items, whole times: a programme over the table of all budgets, without fronts, hulls or bounds."""
    errors, times = tables(kind, 12, 10, seed=3)
    times = np.ceil(times * 20).astype(np.float64)
    limit = int(budgets(times, (0.3,))[0])
    best = np.zeros(limit + 1)
    for error, time in zip(errors, times.astype(int), strict=True):
        best = np.min(
            [
                np.concatenate([np.full(min(t, limit + 1), np.inf), best[: max(limit + 1 - t, 0)]]) + e
                for e, t in zip(error, time, strict=True)
            ],
            axis=0,
        )
    assert BudgetAllocator(errors, times).exact(float(limit)).error == pytest.approx(best[limit], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_is_near_the_exact_one_and_never_over_budget(kind: str) -> None:
    excess = []
    for seed, (items, levels) in itertools.product(range(4), [(4, 8), (10, 20), (54, 42)]):
        errors, times = tables(kind, items, levels, seed)
        scale = np.random.default_rng(seed).uniform(0.5, 2, items)
        allocator = BudgetAllocator(errors, times)
        for budget in budgets(times, (0.02, 0.1, 0.3, 0.6)):
            fast, exact = allocator.allocate(budget, scale), allocator.exact(budget, scale)
            check_sums(fast, errors, times, budget, scale)
            check_sums(exact, errors, times, budget, scale)
            assert exact.proven
            assert fast.bound <= exact.error * (1 + 1e-9)
            excess.append(fast.error / exact.error - 1 if exact.error > 0 else fast.error)
    assert np.median(excess) <= 0.002
    assert max(excess) <= 0.01
    assert min(excess) >= -1e-9


@pytest.mark.parametrize(("seed", "share"), [(42, 0.5), (48, 0.5), (387, 0.8)])
def test_no_more_than_a_hundredth_is_left_open_where_a_short_programme_leaves_more(seed: int, share: float) -> None:
    errors, times = bench_tables("noisy", 54, 42, seed)
    scale = np.random.default_rng(1000 + seed).uniform(0.5, 2.0, 54)
    allocator = BudgetAllocator(errors, times)
    slowest = allocator.allocate(math.inf, scale).time
    budget = allocator.least_time + share * (slowest - allocator.least_time)
    short = search(Problem(Weighted(Fronts.of(errors, times), scale), budget), replace(_MANY, open=math.inf))
    assert short.error > 1.02 * allocator.exact(budget, scale).error
    found = allocator.allocate(budget, scale)
    check_sums(found, errors, times, budget, scale)
    assert found.error - found.bound <= 0.01 * found.error


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_that_a_plan_just_meets_admits_that_plan(seed: int) -> None:
    """Tenths are not exact in binary: sums in another order differ in the last bit."""
    rng = np.random.default_rng(seed)
    times: Floats = np.asarray(rng.integers(1, 30, (9, 6)) * 0.1, dtype=np.float64)
    errors = rng.random((9, 6))
    choice = rng.integers(0, 6, 9)
    rows = np.arange(9), choice
    budget = math.fsum(times[rows])
    allocator = BudgetAllocator(errors, times)
    for found in (allocator.exact(budget), allocator.allocate(budget)):
        check_sums(found, errors, times, budget, np.ones(9))
        assert found.error <= errors[rows].sum() + 1e-12
    assert allocator.allocate(allocator.least_time).time == allocator.least_time


@settings(max_examples=60)
@given(
    arrays.arrays(np.float64, (7, 6), elements=st.floats(-5, 5, width=32)),
    arrays.arrays(np.float64, (7, 6), elements=st.floats(0, 3, width=32)),
    st.floats(0, 1),
)
def test_no_input_makes_it_exceed_the_budget(errors: Floats, times: Floats, share: float) -> None:
    low, high = math.fsum(times.min(axis=1)), math.fsum(times.max(axis=1))
    budget = max(low + share * (high - low), low)
    allocator = BudgetAllocator(errors, times)
    fast, exact = allocator.allocate(budget), allocator.exact(budget)
    for found in (fast, exact):
        check_sums(found, errors, times, budget, np.ones(7))
    assert exact.error <= fast.error + 1e-9
    assert fast.bound <= exact.error + 1e-9


@pytest.mark.parametrize("times", [[0.5, 0.9, 1.0, 1.0 + 2**-52], [0.5, 1.0 - 2**-40, 1.0 + 2**-52, 1.0 + 2**-51]])
def test_what_exceeds_the_budget_by_a_rounding_is_not_taken_and_the_next_best_is(times: list[float]) -> None:
    allocator = BudgetAllocator(np.array([[5.0, 2.0, 1.0, 0.0]]), np.array([times]))
    best = max(time for time in times if time <= 1.0)
    for found in (allocator.allocate(1.0), allocator.exact(1.0)):
        assert found.time == best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "branches", "near"), [(1, 1, 0.0), (2, 12, 0.0), (4096, 1, 0.0), (2, 1, 1.0)])
def test_a_search_cut_short_keeps_the_budget_and_claims_no_proof_that_it_lacks(
    kind: str, width: int, branches: int, near: float
) -> None:
    for seed in range(4):
        errors, times = tables(kind, 12, 12, seed)
        scale = np.random.default_rng(seed).uniform(0.5, 2, 12)
        allocator = BudgetAllocator(errors, times)
        for budget in budgets(times, (0.05, 0.15, 0.3)):
            exact = allocator.exact(budget, scale)
            problem = Problem(Weighted(Fronts.of(errors, times), scale), budget)
            for enough, items in ((0.0, 12), (0.05, 12), (0.0, 2)):
                found = search(
                    problem, Effort(items, items, width, branches, branches, near=near, enough=enough, again=enough)
                )
                assert problem.fronts.time[found.chosen].sum() <= budget
                assert found.bound <= exact.error * (1 + 1e-9)
                assert found.error >= exact.error * (1 - 1e-9)


def test_a_wide_budget_buys_the_least_error_and_the_least_budget_the_fastest_choices() -> None:
    errors, times = tables("noisy", 20, 15, seed=0)
    allocator = BudgetAllocator(errors, times)
    for found in (allocator.allocate(math.inf), allocator.exact(math.inf), allocator.exact(float(times.sum()))):
        assert found.choices.tolist() == errors.argmin(axis=1).tolist()
        assert found.proven
    for found in (allocator.allocate(allocator.least_time), allocator.exact(allocator.least_time)):
        assert found.choices.tolist() == times.argmin(axis=1).tolist()
    assert allocator.least_time == math.fsum(times.min(axis=1))


def test_items_without_weight_take_their_fastest_choice() -> None:
    errors, times = tables("convex", 6, 9, seed=1)
    scale = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    found = BudgetAllocator(errors, times).exact(float(times.sum()), scale)
    assert [found.choices[i] for i in (1, 3)] == [int(times[i].argmin()) for i in (1, 3)]
    assert BudgetAllocator(errors, times).allocate(float(times.sum()), np.zeros(6)).error == 0.0


def test_equal_choices_go_to_the_first_column_and_forbidden_ones_are_never_taken() -> None:
    errors = np.array([[1.0, 1.0, math.inf], [math.inf, 2.0, 2.0]])
    times = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    allocator = BudgetAllocator(errors, times)
    assert allocator.allocate(9.0).choices.tolist() == allocator.exact(9.0).choices.tolist() == [0, 1]
    assert BudgetAllocator(errors[:, :2], np.array([[math.inf, 3.0], [1.0, 1.0]])).exact(9.0).choices.tolist() == [1, 1]


def test_less_budget_or_less_effort_never_finds_less_error() -> None:
    errors, times = tables("noisy", 15, 12, seed=5)
    allocator = BudgetAllocator(errors, times)
    found = [allocator.exact(budget).error for budget in budgets(times, tuple(np.linspace(0, 0.6, 13)))]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 10


def test_scaling_errors_or_times_changes_no_choice() -> None:
    errors, times = tables("random", 12, 10, seed=2)
    budget = budgets(times, (0.2,))[0]
    plain = BudgetAllocator(errors, times).exact(budget)
    scaled = BudgetAllocator(errors * 2.0**-40, times * 2.0**-30).exact(budget * 2.0**-30)
    assert scaled.choices.tolist() == plain.choices.tolist()
    assert scaled.error == plain.error * 2.0**-40


def test_a_programme_that_runs_out_of_states_says_that_it_proved_nothing() -> None:
    errors = np.tile(10.0 - np.arange(12) * 0.1, (30, 1)) + np.random.default_rng(0).random((30, 12)) * 1e-9
    times = np.tile(np.arange(12) * 0.1, (30, 1)) * np.random.default_rng(1).uniform(1, 1.3, (30, 1))
    allocator = BudgetAllocator(errors, times)
    budget = budgets(times, (0.37,))[0]
    found = allocator.exact(budget, most_states=2)
    check_sums(found, errors, times, budget, np.ones(30))
    assert not found.proven
    assert found.bound < found.error


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_bounds(kind: str) -> None:
    """Of the relaxation, and with each point of one item held: never above the optimum found by enumeration."""
    errors, times = tables(kind, 4, 6, seed=7)
    scale = np.array([1.0, 0.5, 2.0, 1.5])
    for budget in budgets(times, (0.1, 0.3, 0.6)):
        problem = Problem(Weighted(Fronts.of(errors, times), scale), budget)
        assert relax(problem).bound <= enumerated(errors, times, budget, scale) + 1e-12
        for item in range(4):
            for point, bound in zip(*bounds_of(problem, item), strict=True):
                held_errors = errors.copy()
                held_errors[item] = np.inf
                held_errors[item, problem.fronts.choice[point]] = errors[item, problem.fronts.choice[point]]
                assert bound <= enumerated(held_errors, times, budget, scale) + 1e-12
                if math.isfinite(bound):
                    assert relax(problem, int(point)).bound == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize("near", [0.0, 1.0])
def test_holding_the_breaking_item_or_not_finds_the_same(near: float) -> None:
    errors, times = tables("noisy", 25, 12, seed=11)
    for budget in budgets(times, (0.05, 0.2, 0.5)):
        problem = Problem(Weighted(Fronts.of(errors, times), np.ones(25)), budget)
        found = search(problem, Effort(25, 25, 1 << 14, 12, 12, near=near, enough=0.0, again=0.0))
        assert found.bound == found.error == pytest.approx(BudgetAllocator(errors, times).exact(budget).error)


def test_fronts_hold_what_nothing_dominates_and_hulls_lie_below_them() -> None:
    errors, times = tables("noisy", 10, 20, seed=4)
    fronts = Fronts.of(errors, times)
    for item in range(10):
        kept = set(fronts.choice[fronts.item == item].tolist())
        for k in range(20):
            better = (errors[item] <= errors[item, k]) & (times[item] <= times[item, k])
            better[k] = False
            assert (k in kept) == (not better.any())
        mine = fronts.item[fronts.hull] == item
        assert (np.diff(fronts.slope[mine]) < 0).all()
        corners = np.concatenate([[fronts.start[item]], fronts.hull[mine]])
        on_hull = np.interp(times[item], fronts.time[corners], fronts.error[corners])
        assert (on_hull <= errors[item] + 1e-12).all()


def test_the_tables_are_kept_as_given() -> None:
    errors, times = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    allocator = BudgetAllocator(errors, times)
    errors[:] = 9.0
    assert allocator.allocate(1.0).error == 0.0
    with pytest.raises(ValueError, match="read-only"):
        allocator.errors[0, 0] = 1.0


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("errors", "times", "message"),
    [
        ([1.0], [[1.0]], "errors is a table [items, choices], neither empty, got shape [1]"),
        ([[1.0]], np.zeros((0, 3)), "times is a table [items, choices], neither empty, got shape [0, 3]"),
        ([[1.0, 2.0]], [[1.0], [2.0]], "got [1, 2] and [2, 1]"),
        ([[1.0, 2.0], [0.0, nan]], np.ones((2, 2)), "errors[1, 1] is nan; only +inf may stand"),
        ([[1.0, -inf]], np.ones((1, 2)), "errors[0, 1] is -inf"),
        (np.ones((1, 2)), [[1.0, nan]], "times[0, 1] is nan"),
        (np.ones((2, 2)), [[1.0, 1.0], [-0.5, 1.0]], "times[1, 0] is -0.5; a time is at least 0"),
        ([[1.0, 1.0], [inf, 1.0]], [[1.0, 1.0], [1.0, inf]], "item 1 has no choice with a finite error"),
        ([[1.0, 0.0]], [[0.0, 5e-324]], "times[0] by too little"),
    ],
)
def test_bad_tables_are_refused(errors: Any, times: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BudgetAllocator(errors, times)


def test_coefficients_of_one_call_do_not_stay_for_the_next() -> None:
    generator = np.random.default_rng(3)
    errors, times = generator.uniform(size=(2, 6, 8))
    used, weights = BudgetAllocator(errors, times), generator.uniform(size=(3, 6))
    budgets = np.linspace(used.least_time, times.max(axis=1).sum(), 4)
    for scale in (*weights, weights[0], None):
        for budget in budgets:
            found, fresh = used.allocate(budget, scale), BudgetAllocator(errors, times).allocate(budget, scale)
            assert (found.choices.tolist(), found.error) == (fresh.choices.tolist(), fresh.error)
    with pytest.raises(ValueError, match=re.escape("one per item, [6], got [1, 6]")):
        used.allocate(budgets[0], np.ones((1, 6)))


@pytest.mark.parametrize(
    ("budget", "coefficients", "message"),
    [
        (2.9, None, "budget 2.9 cannot be met: the fastest choices take 3.0; allow at least that"),
        (nan, None, "budget nan cannot be met: the fastest choices take 3.0"),
        (-inf, None, "budget -inf"),
        (3.0, [1.0], "coefficients are one per item, [2], got [1]"),
        (3.0, [1.0, -0.1], "coefficients[1] is -0.1; a coefficient is finite and at least 0"),
        (3.0, [nan, 1.0], "coefficients[0] is nan"),
        (3.0, [inf, 1.0], "coefficients[0] is inf"),
        (3.0, [1e308, 1.0], "exceeds float64"),
    ],
)
def test_bad_budgets_and_coefficients_are_refused(budget: float, coefficients: Any, message: str) -> None:
    allocator = BudgetAllocator(np.array([[5.0, 1.0], [4.0, 2.0]]), np.array([[1.0, 3.0], [2.0, 4.0]]))
    for method in (allocator.allocate, allocator.exact):
        with pytest.raises(ValueError, match=re.escape(message)):
            method(budget, coefficients)


def test_most_states_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BudgetAllocator(np.ones((1, 1)), np.ones((1, 1))).exact(1.0, most_states=0)


def test_coupled_layers_are_one_item() -> None:
    values = np.arange(12.0).reshape(4, 3)
    assert couple(values, [1, 0, 1, 1]).tolist() == [values[1].tolist(), values[[0, 2, 3]].sum(axis=0).tolist()]
    assert couple([[inf, 1.0], [2.0, 2.0]], [0, 0]).tolist() == [[inf, 3.0]]
    cases: list[tuple[Any, str]] = [
        ([0, 2], "got [0, 2]"),
        ([1, 1], "got [1]"),
        ([0], "got [2, 2] and [1]"),
        ([0.5, 0.5], "0.5"),
    ]
    for groups, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            couple(np.ones((2, 2)), groups)


def table_of(**weights: tuple[int, ...]) -> LayerTable:
    call = LayerCall((1, 1), (1, 1), macs=1)
    return LayerTable(tuple(LayerSpec(name, "conv2d", shape, (call,)) for name, shape in weights.items()))


def test_uniform_is_the_same_everywhere() -> None:
    table = table_of(a=(4, 8), b=(8, 2))
    assert dict(uniform(table, 0.75)) == {"a": 0.75, "b": 0.75}
    assert uniform(table, 0.5, NM(2, 4)).granularity("b") == NM(2, 4)
    assert uniform(table, 0.5).granularity("b") is None


def test_erk_by_hand() -> None:
    """One round makes the first layer dense: 27 + 432 + 2304 weights, of which 552.6 stay."""
    table = table_of(stem=(3, 1, 3, 3), mid=(16, 3, 3, 3), last=(16, 16, 3, 3))
    plan = erk(table, 0.8)
    scale = (0.2 * 2763 - 27) / ((16 + 3 + 6) + (16 + 16 + 6))
    assert plan["stem"] == 0.0
    assert plan["mid"] == pytest.approx(1 - scale * 25 / 432)
    assert plan["last"] == pytest.approx(1 - scale * 38 / 2304)
    assert erk(table, 0.8, NM(2, 4)).granularity("mid") == NM(2, 4)


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=0, max_size=4).map(tuple), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_erk_meets_the_sparsity_and_its_formula(weights: list[tuple[int, ...]], sparsity: float) -> None:
    table = table_of(**{f"w{i}": shape for i, shape in enumerate(weights)})
    plan = erk(table, sparsity)
    removed = sum(plan[layer.name] * layer.params for layer in table)
    assert removed == pytest.approx(sparsity * table.total_params, rel=1e-9, abs=1e-9 * table.total_params)
    raw = {layer.name: (sum(layer.weight_shape) or 1) / layer.params for layer in table}
    scales = {name: (1 - plan[name]) / raw[name] for name in plan if plan[name] > 1e-9}
    if scales and min(plan[name] for name in scales) < 1 - 1e-9:
        eps = max(scales.values())
        assert min(scales.values()) == pytest.approx(eps, rel=1e-5, abs=1e-6)
        # A layer is dense only because its density would exceed 1.
        assert all(eps * raw[name] >= 1 - 1e-5 for name in plan if plan[name] <= 1e-9)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, nan, True, "0.5"])
def test_sparsities_outside_the_unit_interval_are_refused(sparsity: Any) -> None:
    table = table_of(a=(4, 4, 3, 3))
    calls: list[Callable[[], SparsityPlan]] = [
        lambda: uniform(table, sparsity),
        lambda: erk(table, sparsity),
        lambda: global_shares({"a": torch.ones(3)}, sparsity),
        lambda: lamp({"a": torch.ones(3)}, sparsity),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(f"needs the fraction removed, in [0, 1], got {sparsity!r}")):
            call()


def test_empty_tables_and_scores_are_refused() -> None:
    for allocator in (uniform, erk):
        with pytest.raises(ValueError, match="got an empty table"):
            allocator(LayerTable(()), 0.5)
    with pytest.raises(ValueError, match="at least one weight"):
        global_shares({}, 0.5)
    with pytest.raises(ValueError, match="at least one weight"):
        lamp({"a": torch.ones(0)}, 0.5)


def test_sensitivity_takes_the_sparsest_level_that_the_drop_allows() -> None:
    drops = [[0.0, 0.01, 0.005, 0.2], [-0.1, inf, 0.3, 0.3], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    plan = sensitivity_threshold(["a", "b", "c", "d"], [0.5, 0.7, 0.8, 0.9], drops, max_drop=0.005)
    assert dict(plan) == {"a": 0.8, "b": 0.5, "c": 0.0, "d": 0.9}
    own = [[0.9, 0.1], [0.2, 0.3]]  # each layer's own levels, in any order
    assert dict(sensitivity_threshold(["a", "b"], own, [[0.0, 0.0], [0.0, 9.0]], 0)) == {"a": 0.9, "b": 0.2}
    assert sensitivity_threshold(["a"], [0.5], [[0.0]], 0.1, NM(2, 4)).granularity("a") == NM(2, 4)


@pytest.mark.parametrize(
    ("names", "levels", "drops", "max_drop", "message"),
    [
        (["a"], [0.5], [0.1], 0.1, "drops have a row for each of 1 layers"),
        (["a", "b"], [0.5], [[0.1]], 0.1, "drops have a row for each of 2 layers"),
        (["a"], [0.5, 0.6], [[0.1]], 0.1, "levels are [1] or [1, 1], as drops are; got (2,)"),
        (["a"], [1.5], [[0.1]], 0.1, "level 0 of 'a' is 1.5; it is a sparsity, in [0, 1]"),
        (["a"], [0.1, nan], [[0.1, 0.1]], 0.1, "level 1 of 'a' is nan"),
        (["a", "b"], [0.1, 0.2], [[0.1, 0.1], [0.1, nan]], 0.1, "drop 1 of 'b' is nan; it is a number, or +inf"),
        (["a"], [0.1], [[-inf]], 0.1, "drop 0 of 'a' is -inf"),
        (["a"], [0.5], [[0.1]], -0.1, "needs a finite max_drop >= 0, got -0.1"),
        (["a"], [0.5], [[0.1]], nan, "needs a finite max_drop >= 0, got nan"),
        (["a", "a"], [0.5], [[0.1], [0.1]], 0.1, "a layer is named once, got ['a', 'a']"),
    ],
)
def test_bad_sensitivities_are_refused(names: Any, levels: Any, drops: Any, max_drop: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sensitivity_threshold(names, levels, drops, max_drop)


def lamp_reference(weight: Floats) -> Floats:
    """The definition, one weight at a time: distinct magnitudes only."""
    square = weight.astype(np.float64) ** 2
    return np.array([s / square[square >= s].sum() for s in square])


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
def test_lamp_removes_the_globally_lowest_of_its_scores(sizes: list[int], sparsity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = {f"w{i}": rng.normal(0, 10.0 ** rng.integers(-3, 4), size) for i, size in enumerate(sizes)}
    plan = lamp({name: torch.from_numpy(weight) for name, weight in weights.items()}, sparsity)
    pairs = sorted((s, name) for name, weight in weights.items() for s in lamp_reference(weight))
    lowest = [name for _, name in pairs[: round(sparsity * len(pairs))]]
    assert {name: round(share * len(weights[name])) for name, share in plan.items()} == {
        name: lowest.count(name) for name in weights
    } or sum(lowest.count(n) for n in weights) > len(pairs) - len(weights)  # the last of each layer all score 1


def test_lamp_with_ties_zeros_and_float32() -> None:
    """Equal weights are taken in order, each sharing with those after it: 1/4, 1/3, 1/2, 1."""
    plan = lamp({"a": torch.ones(2, 2), "zero": torch.zeros(3), "b": torch.tensor([1e-30, 0.4])}, 5 / 9)
    assert {name: round(share * n) for (name, share), n in zip(plan.items(), (4, 3, 2), strict=True)} == {
        "a": 1,
        "zero": 3,
        "b": 1,
    }
    with pytest.raises(ValueError, match="scores of 'a' are NaN"):
        lamp({"a": torch.tensor([1.0, nan])}, 0.5)


def test_lamp_keeps_the_number_of_weights_that_was_asked_for() -> None:
    torch.manual_seed(0)
    weights = {"small": torch.randn(7, 3) * 0.01, "large": torch.randn(40, 30), "odd": torch.randn(13)}
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        plan = lamp(weights, sparsity)
        removed = [plan[name] * weight.numel() for name, weight in weights.items()]
        assert removed == pytest.approx([round(count) for count in removed])
        assert round(sum(removed)) == round(sparsity * (21 + 1200 + 13))
