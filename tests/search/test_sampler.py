import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from lightning_prune.allocation import BudgetAllocator
from lightning_prune.search.claims import choices_of
from lightning_prune.search.parameters import Inverse, moved, proposed, suggested, useful_choices
from lightning_prune.search.proposals import Proposer, Seen
from lightning_prune.search.sampler import ThresholdSampler
from lightning_prune.search.space import Floats, SearchSpace
from tests.benchmarks.bench_search import least_cost, searched
from tests.benchmarks.truth_tables import truth
from tests.search.test_space import space

Choices = tuple[int, ...]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def network(items: int = 4, choices: int = 6, seed: int = 0, groups: tuple[int, ...] | None = None) -> SearchSpace:
    """Errors that grow and costs that mostly fall with the choice; the first sparse choice costs more than dense."""
    rng = np.random.default_rng(seed)
    level = np.linspace(0.0, 0.95, choices)
    errors = rng.lognormal(-2, 1, (items, 1)) * level ** rng.uniform(1.5, 4, (items, 1))
    costs = rng.lognormal(0, 1, (items, 1)) * (1.3 - level)
    costs[:, 0] /= 1.3
    return space(errors, costs, groups)


def follows(found: SearchSpace, seed: int = 0, power: float = 1.5, noise: float = 0.0) -> Callable[[Choices], float]:
    """A drop that follows weighted errors; 0.01 lies well within reach."""
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 0.7, len(found.items))
    finite = np.where(np.isfinite(found.errors), found.errors, 0.0)
    rows, most = np.arange(len(found.items)), finite.max(axis=1) @ weights

    def drop(choices: Choices) -> float:
        luck = np.random.default_rng([seed, *choices]).normal()
        return float(0.8 * ((finite[rows, list(choices)] @ weights) / most) ** power * math.exp(noise * luck))

    return drop


def exhaustive(found: SearchSpace, drop: Callable[[Choices], float], max_drop: float) -> float:
    """The least cost of all plans that are accurate enough, by trying all."""
    plans = itertools.product(range(found.errors.shape[1]), repeat=len(found.items))
    enough = [plan for plan in plans if drop(plan) <= max_drop and np.isfinite(found.cost(np.array([plan]))[0])]
    return float(found.cost(np.array(enough)).min())


def plans_of(study: optuna.Study) -> list[Choices]:
    return [choices_of(t) or () for t in study.trials if "outcome" in t.user_attrs]


# Against exhaustive truth.


def test_the_optimum_of_all_4096_plans_is_found_within_60_evaluations() -> None:
    table = truth("cnn-0")
    drop, found = table.drop, table.space()
    within = []
    for seed in range(10):
        study, _ = searched(found, lambda choices: float(drop[choices]), 0.01, seed)
        plans = plans_of(study)
        assert len(set(plans)) == len(plans) <= 59
        within.append(least_cost(study, found, 0.01) <= 1.01 * table.best_s(0.01))
    assert sum(within) >= 9


@pytest.mark.parametrize(("name", "max_drop"), [("mlp-1", 0.005), ("wide-2", 0.02)])
def test_so_it_is_on_other_networks(name: str, max_drop: float) -> None:
    table = truth(name)
    drop, found = table.drop, table.space()
    study, _ = searched(found, lambda choices: float(drop[choices]), max_drop, seed=0)
    assert least_cost(study, found, max_drop) <= 1.01 * table.best_s(max_drop)


def test_without_moves_the_best_plan_that_coefficients_can_give_is_found() -> None:
    table = truth("cnn-0")
    drop, found = table.drop, table.space()
    study, _ = searched(found, lambda choices: float(drop[choices]), 0.01, 0, moves=False)
    assert all("move" not in trial.params for trial in study.trials)
    useful = itertools.product(*useful_choices(found))
    best = min(float(table.total_s[plan]) for plan in useful if drop[plan] <= 0.01)
    assert least_cost(study, found, 0.01) <= 1.01 * best


@pytest.mark.parametrize("seed", range(4))
def test_noisy_accuracies(seed: int) -> None:
    found = network(seed=seed)
    drop = follows(found, seed, noise=0.3)
    study, _ = searched(found, drop, 0.01, seed)
    assert least_cost(study, found, 0.01) <= 1.02 * exhaustive(found, drop, 0.01)


def test_a_space_too_large_to_be_looked_at_whole() -> None:
    found = network(items=14, choices=6, groups=tuple(i // 4 for i in range(14)))
    drop = follows(found)
    study, _ = searched(found, drop, 0.01, 0, evaluations=50)
    # As good as if it were known how much each of the 14 layers matters.
    weights = np.random.default_rng(0).lognormal(0, 0.7, 14)
    allocator = BudgetAllocator(found.errors, found.tables[0].costs)
    informed = [allocator.allocate(found.budget(share), weights) for share in np.linspace(0, 0.99, 500)]
    best = min(each.time for each in informed if drop(tuple(each.choices.tolist())) <= 0.01)
    assert best <= least_cost(study, found, 0.01) <= 1.01 * best
    assert len(plans_of(study)) == 49


# Parameters and back.


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), items=st.integers(1, 5), choices=st.integers(2, 6), tables=st.integers(1, 2))
def test_parameters_stand_for_the_plan_they_were_found_for(seed: int, items: int, choices: int, tables: int) -> None:
    rng = np.random.default_rng(seed)
    errors = rng.random((items, choices)) ** 2
    errors[:, 0] = 0.0
    groups = tuple(sorted(rng.integers(0, items, items)))
    groups = tuple(sorted(set(groups)).index(group) for group in groups)
    found = space(errors, rng.random((tables, items, choices)), groups, fixed=tuple(rng.random(tables)))
    inverse = Inverse(found, moves=True, left=10**6)
    for _ in range(5):
        wanted = tuple(rng.integers(0, choices, items).tolist())
        got = inverse(wanted, np.exp(rng.normal(0, 1, found.group_count)))
        if got is None:
            continue
        assert got.candidate.choices == wanted
        again = proposed(found, got.share, got.weights, got.move)
        assert again == got
        assert 0.0 <= got.share <= 1.0
        assert all(math.exp(-3) <= weight <= math.exp(3) for weight in got.weights)


def test_parameters_are_found_for_most_plans_worth_making() -> None:
    found = truth("mlp-1").space()
    inverse, rng = Inverse(found, moves=False, left=10**6), np.random.default_rng(0)
    wanted = [tuple(int(rng.choice(row)) for row in inverse.useful) for _ in range(60)]
    assert sum(inverse(plan, np.ones(4)) is not None for plan in wanted) >= 48


def test_no_more_allocations_are_made_than_allowed() -> None:
    found = network()
    inverse = Inverse(found, moves=True, left=3)
    assert inverse((5, 0, 5, 0), np.ones(4)) is None
    assert inverse.left == 0


def test_useful_choices_are_those_that_are_ever_allocated() -> None:
    errors = [[0.0, 0.1, 0.2, 0.2, np.inf, 0.5], [0.0, 0.0, 0.1, 0.3, 0.4, 0.5]]
    costs = [[4.0, 5.0, 3.0, 3.0, 1.0, np.inf], [4.0, 4.0, 5.0, 4.5, 2.0, 1.0]]
    assert useful_choices(space(errors, costs)) == [[0, 2], [0, 4, 5]]
    both = space(errors, [costs, [[4.0, 3.5, 3.0, 3.0, 1.0, 2.0], costs[1]]], fixed=(0.0, 0.0))
    assert useful_choices(both) == [[0, 1, 2, 5], [0, 4, 5]]


def test_a_move_changes_one_item() -> None:
    found = network(items=3, choices=4)
    base = found.allocate(found.budget(0.5))
    assert base is not None
    assert moved(found, base, 0) is base
    assert moved(found, None, 3) is None
    changed = moved(found, base, 1 + 2 * 4 + 3)
    assert changed is not None
    assert changed.choices == (*base.choices[:2], 3)
    assert changed.cost == float(found.cost(np.array([changed.choices]))[0])


@pytest.mark.parametrize("move", [-1, 1 + 2 * 3, 100])
def test_a_move_that_the_space_does_not_have_is_refused(move: int) -> None:
    found = space([[0, 1, 2], [0, 1, 2]], [[3, 2, 1], [3, 2, 1]])
    with pytest.raises(ValueError, match=f"move {move} is no possible choice of 2 items with 3 choices each"):
        moved(found, found.allocate(6.0), move)


def test_a_move_to_what_is_forbidden_is_refused() -> None:
    found = space([[0, np.inf, 2], [0, 1, 2]], [[3, 2, 1], [3, np.inf, 1]])
    with pytest.raises(ValueError, match="move 2 is no possible choice"):
        moved(found, found.allocate(6.0), 2)
    with pytest.raises(ValueError, match="move 5 gives item 1 choice 1, which has no finite cost"):
        moved(found, found.allocate(6.0), 5)


# Repeatable, and shared.


def test_the_same_seed_gives_the_same_proposals_and_another_one_others() -> None:
    found = network()
    drop = follows(found, noise=0.3)
    first, second, other = (plans_of(searched(found, drop, 0.01, seed, 20)[0]) for seed in (3, 3, 4))
    assert first == second != other


def test_a_study_goes_on_as_if_it_had_not_ended() -> None:
    found = network()
    drop = follows(found)
    whole, _ = searched(found, drop, 0.01, 0, 20)
    half, _ = searched(found, drop, 0.01, 0, 10)
    study = optuna.create_study(sampler=ThresholdSampler(found, 0.01, 0))
    study.add_trials(half.trials)
    trial = study.ask()
    candidate = suggested(trial, found)
    assert candidate is not None
    assert candidate.choices == plans_of(whole)[len(half.trials)]
    assert trial.params == whole.trials[len(half.trials)].params


@pytest.mark.parametrize("shown", ["candidate", "parameters"])
@pytest.mark.parametrize("before", [0, 12])
def test_what_others_evaluate_is_not_proposed_again(shown: str, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = network()
    drop = follows(found)
    study, _ = searched(found, drop, 0.01, 0, 1 + before)
    seen = set(plans_of(study))
    if shown == "parameters":
        monkeypatch.setattr(optuna.Trial, "set_user_attr", lambda *args: None)
    for _ in range(6):
        # Every worker has a sampler of its own, here even with the same seed.
        study.sampler = ThresholdSampler(found, 0.01, 0)
        trial = study.ask()
        candidate = suggested(trial, found)
        assert candidate is not None
        assert candidate.choices not in seen
        seen.add(candidate.choices)


def test_workers_that_begin_at_once_get_different_plans() -> None:
    found = network()
    study, _ = searched(found, follows(found), 0.01, 0, 10)
    samplers = [ThresholdSampler(found, 0.01, 0) for _ in range(4)]
    frozen = []
    for sampler in samplers:  # all are running before the first one has a plan
        number = study._storage.create_new_trial(study._study_id)
        frozen.append((sampler, study._storage.get_trial(number)))
    plans = []
    for sampler, trial in frozen:
        values = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        got = proposed(found, values["budget"], [values[f"weight.{g}"] for g in range(4)], values["move"])
        assert got is not None
        plans.append(got.candidate.choices)
    assert len(set(plans)) == 4
    assert not set(plans) & set(plans_of(study))


def test_a_plan_whose_trials_fail_is_given_up_after_two() -> None:
    found = network()
    study, _ = searched(found, follows(found), 0.01, 0, 10)
    plans = []
    for _ in range(4):
        trial = study.ask()
        candidate = suggested(trial, found)
        assert candidate is not None
        plans.append(candidate.choices)
        study.tell(trial, state=TrialState.FAIL)
    assert plans[0] == plans[1] != plans[2]


def test_a_proposal_reads_the_study_once_and_a_fixed_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    found, reads, read = network(), list[str](), optuna.Study.get_trials

    def counted(study: optuna.Study, *args: Any, **options: Any) -> Any:
        reads.append(study.study_name)
        return read(study, *args, **options)

    monkeypatch.setattr(optuna.Study, "get_trials", counted)
    study = optuna.create_study(sampler=ThresholdSampler(found, 0.01, seed=0))
    suggested(study.ask(), found)
    assert len(reads) == 1
    study.enqueue_trial({"budget": 0.25, **{f"weight.{group}": 1.0 for group in range(found.group_count)}})
    trial = study.ask()
    suggested(trial, found)
    assert len(reads) == 1
    assert trial.params["move"] == 0
    # Who has just read spares it, once; but not where another trial has begun since.
    for since, expected in ((0, 0), (1, 1)):
        study.sampler.just_read(read(study))  # type: ignore[union-attr]
        reads.clear()
        for _ in range(since):
            study._storage.create_new_trial(study._study_id)
        suggested(study.ask(), found)
        assert len(reads) == expected
    suggested(study.ask(), found)
    assert len(reads) == 2


def test_enqueued_parameters_are_kept() -> None:
    found = network()
    study = optuna.create_study(sampler=ThresholdSampler(found, 0.01, 0))
    enqueued = {"budget": 0.25, **{f"weight.{group}": 1.0 + group for group in range(4)}, "move": 2}
    study.enqueue_trial(enqueued)
    trial = study.ask()
    suggested(trial, found)
    assert trial.params == enqueued


def test_parameters_of_others_are_drawn() -> None:
    found = network()
    study = optuna.create_study(sampler=ThresholdSampler(found, 0.01, 0))
    trial = study.ask()
    assert 0.0 <= trial.suggest_float("learning_rate", 0.0, 0.1) <= 0.1
    study.sampler.reseed_rng()
    assert suggested(trial, found) is not None


def test_trials_of_another_space_and_odd_attributes_are_passed_over() -> None:
    found = network()
    study = optuna.create_study(sampler=ThresholdSampler(found, 0.01, 0))
    short, beyond, good = ({"choices": choices, "cost": 1.0} for choices in ([1, 2], [99] * 4, [5] * 4))
    said: dict[str, Any]
    for said in ({"candidate": short}, {"candidate": beyond}, {}):
        attributes = {**said, "outcome": {"drop": 0.0}}
        study.add_trial(optuna.trial.create_trial(value=0.0, user_attrs=attributes))
    study.add_trial(optuna.trial.create_trial(value=0.0))
    for odd in ({"drop": None}, {}, None, 0.0, "none"):
        study.add_trial(optuna.trial.create_trial(value=9.0, user_attrs={"candidate": good, "outcome": odd}))
    trial = study.ask()
    candidate = suggested(trial, found)
    assert candidate is not None
    assert candidate.choices != (5, 5, 5, 5)


@pytest.mark.parametrize("max_drop", [-0.01, float("nan"), math.inf, True])
def test_a_threshold_that_is_none_is_refused(max_drop: float) -> None:
    with pytest.raises(ValueError, match="max_drop is how much accuracy may drop, finite and at least 0, got"):
        ThresholdSampler(network(), max_drop)


# Degenerate searches.


def test_one_item() -> None:
    found = network(items=1, choices=8)
    drop = follows(found)
    study, _ = searched(found, drop, 0.01, 0)
    assert least_cost(study, found, 0.01) == exhaustive(found, drop, 0.01)


def test_a_space_with_one_plan_stops_at_once() -> None:
    found = space([[0.0], [0.0]], [[2.0], [3.0]])
    study = optuna.create_study(sampler=ThresholdSampler(found, 0.01, 0))

    def objective(trial: optuna.Trial) -> float:
        candidate = suggested(trial, found)
        assert candidate is not None
        assert candidate.choices == (0, 0)
        return candidate.cost

    study.optimize(objective, n_trials=50)
    assert len(study.trials) == 1


def test_when_nothing_cheaper_is_left_the_incumbent_comes_again() -> None:
    found = network(items=2, choices=3)
    drop = follows(found)
    study, _ = searched(found, drop, 0.05, 0)
    trial = study.ask()
    candidate = suggested(trial, found)
    assert candidate is not None
    assert candidate.cost == least_cost(study, found, 0.05) == exhaustive(found, drop, 0.05)
    assert len(set(plans_of(study))) < 9


def test_where_nothing_is_accurate_enough_drops_get_smaller() -> None:
    found = network()
    drop = follows(found)
    study, _ = searched(found, lambda choices: 0.02 + drop(choices), 0.0, 0, 40)
    drops = [drop(plan) for plan in plans_of(study)]
    assert least_cost(study, found, 0.0) == found.dense_cost
    plans = list(itertools.product(range(6), repeat=4))
    cheaper = [plan for plan, cost in zip(plans, found.cost(np.array(plans)), strict=True) if cost < found.dense_cost]
    least = sorted(drop(plan) for plan in cheaper)
    assert len(least) > 1000
    # Not what would save most, but what loses least, as soon as the level set is known to lie near dense.
    assert max(drops[5:9]) <= least[4]


def test_where_even_the_dense_network_fails_its_neighbourhood_is_searched() -> None:
    found = network()
    drop = follows(found)
    proposer = Proposer(found, 0.01)
    plans: list[Choices] = [(0, 0, 0, 0)]
    for number in range(25):
        drops = np.array([0.02 + drop(plan) for plan in plans])
        got = proposer.propose(Seen(tuple(plans), drops), np.random.default_rng(number))
        assert got is not None
        plans.append(got.candidate.choices)
    later = [drop(plan) for plan in plans[10:]]
    assert np.median(later) < 0.02
    found_again = proposer.incumbent(Seen(tuple(plans), np.full(len(plans), 0.5)))
    assert found_again is not None
    assert found_again.candidate.choices == (0, 0, 0, 0)


def test_where_everything_is_accurate_enough_the_cheapest_plan_is_soon_found() -> None:
    found = network()
    study, _ = searched(found, lambda choices: 0.0, 0.0, 0)
    assert least_cost(study, found, 0.0) == pytest.approx(found.least_cost)
    assert len(plans_of(study)) <= 8


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_networks_that_diverge_are_avoided(bad: float) -> None:
    found = network()
    drop = follows(found)

    def diverging(choices: Choices) -> float:
        return bad if choices[0] >= 3 else drop(choices)

    study, _ = searched(found, diverging, 0.01, 0)
    assert least_cost(study, found, 0.01) <= 1.01 * exhaustive(found, diverging, 0.01)


def test_equal_errors() -> None:
    found = space(np.tile([0.0, 1.0, 1.0, 1.0], (3, 1)), np.tile([4.0, 3.0, 2.0, 1.0], (3, 1)))
    study, _ = searched(found, lambda choices: 0.004 * sum(choice > 0 for choice in choices), 0.01, 0)
    assert least_cost(study, found, 0.01) == 4.0 + 1.0 + 1.0


@pytest.mark.parametrize(("value", "best"), [(0.0, 6.0), (1e-300, 5.0), (1e200, 5.0)])
def test_errors_of_any_size(value: float, best: float) -> None:
    found = space(np.tile([0.0, value, 2 * value], (3, 1)), np.tile([4.0, 2.0, 1.0], (3, 1)))
    study, _ = searched(found, lambda choices: 0.002 * sum(choices), 0.0081, 0)
    # Where errors say nothing, only plans one move from the cheapest can be reached.
    assert least_cost(study, found, 0.0081) == best


def test_forbidden_choices_are_never_proposed() -> None:
    base = network()
    errors, costs = base.errors.copy(), base.tables[0].costs.copy()
    errors[1, 4:] = np.inf
    costs[2, 5] = np.inf
    found = space(errors, costs)
    with np.errstate(invalid="raise"):
        study, _ = searched(found, follows(base), 0.01, 0)
    assert all(plan[1] < 4 and plan[2] != 5 for plan in plans_of(study))
    assert len(plans_of(study)) > 10


def test_sparse_slower_than_dense_everywhere_leaves_dense() -> None:
    found = space([[0.0, 0.1], [0.0, 0.1]], [[1.0, 2.0], [1.0, 3.0]])
    study, _ = searched(found, lambda choices: 0.0, 0.01, 0, 5)
    assert not plans_of(study)


def test_several_tables_of_which_the_least_counts() -> None:
    base = network()
    costs = base.tables[0].costs
    other = np.roll(costs, 1, axis=0)
    found = space(base.errors, [costs, other], fixed=(0.5, 0.2))
    drop = follows(found)
    study, _ = searched(found, drop, 0.01, 0)
    assert least_cost(study, found, 0.01) <= 1.01 * exhaustive(found, drop, 0.01)


def test_a_cost_that_the_tables_only_approach() -> None:
    base = network()
    sums = base.cost

    def cost(plans: Any) -> Floats:
        return np.asarray(sums(plans) * (1.0 + 0.1 * (plans[:, 0] > 2)))

    found = space(base.errors, base.tables[0].costs, cost=cost)
    drop = follows(found)
    study, _ = searched(found, drop, 0.01, 0)
    assert least_cost(study, found, 0.01) <= 1.01 * exhaustive(found, drop, 0.01)


# In a database.


def test_parameters_survive_a_database(tmp_path: Any) -> None:
    found = network()
    drop = follows(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")
        study = optuna.create_study(storage=storage, sampler=ThresholdSampler(found, 0.01, 0))
        plans = []
        for _ in range(10):
            trial = study.ask()
            candidate = suggested(trial, found)
            assert candidate is not None
            trial.set_user_attr("outcome", {"drop": drop(candidate.choices)})
            study.tell(trial, candidate.cost)
            plans.append(candidate.choices)
        stored = optuna.load_study(study_name=study.study_name, storage=storage).trials
        storage.engine.dispose()
    for frozen, plan in zip(stored, plans, strict=True):
        weights = [frozen.params[f"weight.{group}"] for group in range(4)]
        again = proposed(found, frozen.params["budget"], weights, frozen.params["move"])
        assert again is not None
        assert again.candidate.choices == plan
    assert len(set(plans)) == 10
