from __future__ import annotations

import itertools
import json
import logging
import math
import os
import pickle
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from lightning_prune.granularities import Filter
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.search import study as study_module
from lightning_prune.search.claims import accuracy_of, dropped
from lightning_prune.search.sampler import ThresholdSampler
from lightning_prune.search.space import Candidate, SearchSpace
from lightning_prune.search.storages import open_storage, release, shown, version
from lightning_prune.search.study import Outcome, front, minimise
from tests.search.analytic import Network, space

SPACE = space()


def search(of: SearchSpace = SPACE, accuracy: Any = None, **options: Any) -> Outcome:
    settings: dict[str, Any] = {
        "metric": "val_acc",
        "mode": "max",
        "max_drop": 0.01,
        "dense_accuracy": 0.95,
        "n_trials": 12,
        "progress": False,
    }
    return minimise(of, accuracy or Network(of), **{**settings, **options})


def random_sampler(seed: int = 0) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def plans(outcome: Outcome) -> list[tuple[int, ...]]:
    """Evaluated plans in their order."""
    return [
        tuple(t.user_attrs["candidate"]["choices"])
        for t in outcome.study.trials
        if t.state == TrialState.COMPLETE and "plan" in t.user_attrs
    ]


def test_trials_say_what_they_are() -> None:
    network = Network(SPACE)
    seen: list[int] = []
    outcome = search(accuracy=network, on_trial=lambda study, trial: seen.append(trial.number))
    trials = outcome.study.trials
    assert outcome.stopped in ("finished", "sampler")
    assert outcome.evaluations == len(network.asked) + 1 <= 12
    assert seen == list(range(len(trials)))
    assert plans(outcome) == network.asked
    assert len(set(network.asked)) == len(network.asked)
    for trial in trials:
        assert trial.state == TrialState.COMPLETE or trial.user_attrs["reason"]
        if "plan" not in trial.user_attrs:
            continue
        said, choices = trial.user_attrs, tuple(trial.user_attrs["candidate"]["choices"])
        cost = float(SPACE.cost(np.array([choices]))[0])
        assert trial.value == said["candidate"]["cost"] == cost
        assert accuracy_of(trial) == network.true(choices)
        assert dropped(trial) == 0.95 - network.true(choices)
        assert trial.constraints == {"drop": dropped(trial) - 0.01}
        assert SparsityPlan(said["plan"]) == SPACE.plan(choices)
        assert said["worker"]["pid"] == os.getpid()
        assert json.loads(json.dumps(said)) == said
    feasible = [t for t in trials if "outcome" in t.user_attrs and dropped(t) <= 0.01]
    assert outcome.best is not None
    assert outcome.nearest is None
    assert outcome.best.value == min(t.values[0] for t in feasible)
    assert outcome.study.best_value == outcome.best.value


def test_what_cannot_beat_the_incumbent_is_not_evaluated() -> None:
    evaluated: list[tuple[float, float]] = []

    def accuracy(candidate: Candidate) -> float:
        value = Network(SPACE).true(candidate.choices)
        best = min([SPACE.dense_cost, *(cost for cost, drop in evaluated if drop <= 0.01)])
        assert candidate.cost < best
        evaluated.append((candidate.cost, 0.95 - value))
        return value

    outcome = search(accuracy=accuracy, sampler=random_sampler(), n_trials=25)
    pruned = [t for t in outcome.study.trials if t.state == TrialState.PRUNED]
    dear = [t for t in pruned if "is not below the incumbent's" in t.user_attrs["reason"]]
    assert dear
    assert all(t.constraints["cost"] >= 0 and "plan" not in t.user_attrs for t in dear)
    assert len(evaluated) == 24


def test_a_plan_is_evaluated_once_however_often_it_is_proposed() -> None:
    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return 0.3 if name == "budget" else 1.0

    network = Network(SPACE)
    outcome = search(accuracy=network, sampler=Stubborn(), n_trials=30)
    assert outcome.stopped == "exhausted"
    # The four budgets that every sampler is shown, and this one's own; dear ones are left out.
    assert len(set(network.asked)) == len(network.asked) <= 5
    again = [t for t in outcome.study.trials if "evaluated the same plan" in t.user_attrs.get("reason", "")]
    assert again
    assert all(t.state == TrialState.COMPLETE and "plan" not in t.user_attrs for t in again)
    first = outcome.study.trials[int(again[0].user_attrs["reason"].split()[1])]
    assert again[0].values == first.values
    assert again[0].constraints == first.constraints


def test_default_sampler_finds_the_best_plan() -> None:
    of = space(items=3, levels=6)
    network = Network(of)
    every = list(itertools.product(range(6), repeat=3))
    best = min(float(of.cost(np.array([c]))[0]) for c in every if 0.95 - network.true(c) <= 0.02)
    outcome = search(of, network, max_drop=0.02, n_trials=40)
    assert outcome.best is not None
    assert outcome.best.user_attrs["candidate"]["cost"] <= 1.01 * best


@pytest.mark.parametrize("diverged", [math.nan, math.inf, -math.inf])
def test_diverged_networks_are_infeasible(diverged: float) -> None:
    outcome = search(accuracy=lambda candidate: diverged, sampler=random_sampler(), n_trials=5)
    assert outcome.evaluations == 5
    assert outcome.best is None
    assert outcome.nearest is not None
    assert outcome.front == ()
    for trial in outcome.study.trials:
        assert trial.state == TrialState.COMPLETE
        assert accuracy_of(trial) is None
        assert trial.constraints["drop"] > 1e3


def test_nothing_feasible_carries_the_nearest() -> None:
    network = Network(SPACE, dense=0.9)  # 0.05 are lost at once
    outcome = search(accuracy=network)
    assert outcome.best is None
    assert outcome.nearest is not None
    assert dropped(outcome.nearest) == min(0.95 - network.true(choices) for choices in network.asked)


def test_lower_may_be_better() -> None:
    outcome = search(accuracy=lambda c: 0.3 + 0.1 * sum(c.choices), mode="min", dense_accuracy=0.3, max_drop=0.25)
    assert outcome.best is not None
    assert sum(outcome.best.user_attrs["candidate"]["choices"]) == 2
    assert dropped(outcome.best) == pytest.approx(0.2)


def test_a_drop_of_exactly_the_threshold_is_feasible() -> None:
    """As metrics are in float32, 0.91 - 0.9 is a little above 0.01."""
    dense, pruned = float(np.float32(0.91)), float(np.float32(0.9))
    assert dense - pruned > 0.01
    outcome = search(accuracy=lambda candidate: pruned, dense_accuracy=dense)
    assert outcome.best is not None
    assert dropped(outcome.best) == 0.01
    assert search(accuracy=lambda candidate: pruned - 2e-6, dense_accuracy=dense, n_trials=3).best is None


def test_no_loss_at_all_may_be_asked_for() -> None:
    network = Network(SPACE)
    outcome = search(
        accuracy=lambda c: 0.95 if max(c.choices) <= 2 else network.true(c.choices), max_drop=0, n_trials=15
    )
    assert outcome.best is not None
    assert dropped(outcome.best) == 0.0


class Grid(optuna.samplers.GridSampler):
    """Stops the study by itself, after some budgets."""

    def __init__(self) -> None:
        weights = {f"weight.{group}": [1.0] for group in range(SPACE.group_count)}
        super().__init__({"budget": [0.2, 0.4, 0.6], **weights}, seed=0)


def test_a_sampler_may_stop_the_study() -> None:
    outcome = search(sampler=Grid(), n_trials=50)
    assert outcome.stopped == "sampler"
    assert {t.params["budget"] for t in outcome.study.trials} >= {0.2, 0.4, 0.6}
    assert len(outcome.study.trials) < 20
    assert "stop" not in vars(outcome.study)


def test_so_may_who_looks_on() -> None:
    def look(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        assert pickle.loads(pickle.dumps(study)).study_name == study.study_name
        if trial.number == 2:
            study.stop()

    outcome = search(sampler=optuna.samplers.RandomSampler(seed=0), n_trials=50, on_trial=look)
    assert outcome.stopped == "sampler"
    assert sum(t.state.is_finished() for t in outcome.study.trials) == 3


def test_results_that_come_in_while_somebody_looks_on_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(ThresholdSampler, "just_read", lambda sampler, trials: read.append(len(trials)))

    def look(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
        time.sleep(0.05)

    outcome = search(n_trials=4, on_trial=look)
    assert read == [0, 2, 4]
    assert len(outcome.study.trials) == 6


@pytest.mark.parametrize("place", ["before_trial", "sample_relative", "sample_independent"])
def test_errors_of_a_sampler_are_its_own(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    sampler = optuna.samplers.RandomSampler(seed=0)

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("no such parameter")

    monkeypatch.setattr(sampler, place, fails)
    monkeypatch.setattr(study_module, "_introduce", lambda *_: None)
    with pytest.raises(ValueError, match="no such parameter"):
        search(sampler=sampler, timeout=20)


def test_the_front() -> None:
    network = Network(SPACE)
    outcome = front(
        SPACE, network, metric="val_acc", mode="max", dense_accuracy=0.95, n_trials=40, progress=False, seed=1
    )
    assert outcome.best is None
    assert outcome.evaluations == 40
    assert outcome.study.directions == [optuna.study.StudyDirection.MINIMIZE] * 2
    points = [(float(SPACE.cost(np.array([c]))[0]), 0.95 - network.true(c)) for c in network.asked]
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert [tuple(t.values) for t in outcome.front] == sorted(best)
    assert len(best) > 5
    assert not any(t.constraints for t in outcome.study.trials)


@pytest.mark.parametrize(
    "sampler",
    [optuna.samplers.TPESampler(seed=0, n_startup_trials=5), optuna.samplers.NSGAIISampler(population_size=6, seed=0)],
)
def test_samplers_of_others_learn_budgets_first(sampler: optuna.samplers.BaseSampler) -> None:
    outcome = search(sampler=sampler, n_trials=20)
    assert outcome.evaluations == 20
    first = outcome.study.trials[:4]
    assert [t.params["budget"] for t in first] == [0.2, 0.4, 0.6, 0.8]
    assert {t.params["weight.2"] for t in first} == {1.0}
    assert "move" not in first[0].params


def test_granularities_survive() -> None:
    entries = tuple((row[0], *(PlanEntry(e.sparsity, Filter()) for e in row[1:])) for row in SPACE.entries)
    outcome = search(replace_entries(SPACE, entries), n_trials=4)
    trial = outcome.study.trials[0]
    plan = SparsityPlan(trial.user_attrs["plan"])
    assert plan
    assert all(plan.granularity(name) == Filter() for name in plan)


def replace_entries(of: SearchSpace, entries: Any) -> SearchSpace:
    return SearchSpace(of.items, entries, of.errors, of.tables, of.cost, of.groups)


# Resuming, joining, stopping


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = search(n_trials=14)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    for n_trials in (4, 9):
        part = search(n_trials=n_trials, storage=storage, study_name="mine")
        assert (part.stopped, part.evaluations) == ("finished", n_trials)
    rest = search(n_trials=14, storage=storage, study_name="mine")
    assert plans(rest) == plans(whole)
    assert [t.params for t in rest.study.trials] == [t.params for t in whole.study.trials]
    network = Network(SPACE)
    assert search(accuracy=network, n_trials=14, storage=storage, study_name="mine").evaluations == 14
    assert network.asked == []
    release(open_storage(storage))


@pytest.mark.parametrize("storage", [None, "study.db", "study.journal"])
def test_ctrl_c_in_an_evaluation_keeps_everything(tmp_path: Path, storage: str | None) -> None:
    """With a sampler that goes by what was evaluated, a resumed study evaluates what an uninterrupted one does."""
    opened = open_storage(tmp_path / storage if storage else None)

    class ByHistory(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            count = sum(t.state.is_finished() and t.state != TrialState.FAIL for t in study.get_trials(deepcopy=False))
            generator = np.random.default_rng([count, *name.encode()])
            return float(generator.uniform(0.1, 1.0))

    def interrupt(number: int, candidate: Candidate) -> None:
        if number == 6:
            raise KeyboardInterrupt

    whole = search(sampler=ByHistory(), n_trials=12)
    part = search(
        accuracy=Network(SPACE, before=interrupt), sampler=ByHistory(), n_trials=12, storage=opened, study_name="mine"
    )
    assert part.interrupted
    assert part.evaluations == 6
    assert part.best is not None
    states = [t.state for t in part.study.trials]
    assert states.count(TrialState.FAIL) == states.count(TrialState.WAITING) == 1
    assert TrialState.RUNNING not in states
    rest = search(sampler=ByHistory(), n_trials=12, storage=opened, study_name="mine")
    assert not rest.interrupted
    assert plans(rest) == plans(whole)
    (failed,) = (t for t in rest.study.trials if t.state == TrialState.FAIL)
    (again,) = (t for t in rest.study.trials if "retry_of" in t.user_attrs)
    assert again.user_attrs["retry_of"] == failed.number
    assert again.params == failed.params
    release(opened)


def test_a_real_ctrl_c_waits_for_the_storage_but_not_for_the_accuracy() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # In a callback, as between trials: the search ends, no trial is hurt.
        outcome = search(on_trial=lambda study, trial: os.kill(os.getpid(), signal.SIGINT))
        assert outcome.interrupted
        assert [t.state for t in outcome.study.trials] == [TrialState.COMPLETE]

        def slow(candidate: Candidate) -> float:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
            return 0.0

        began = time.monotonic()
        outcome = search(accuracy=slow)
        assert outcome.interrupted
        assert time.monotonic() - began < 15
        assert [t.state for t in outcome.study.trials] == [TrialState.FAIL, TrialState.WAITING]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_storage_that_fails_later_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    """As when its disk is full, or its server gone."""
    opened = open_storage(tmp_path / "study.db")
    assert isinstance(opened, optuna.storages.RDBStorage)

    def refuse(number: int, candidate: Candidate) -> None:
        if number == 3:
            with opened.engine.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE trial_user_attributes RENAME TO elsewhere")

    with pytest.raises(ConnectionError, match=r"failed during the search: .*; see to its .*finished trials are kept"):
        search(accuracy=Network(SPACE, before=refuse), storage=opened, study_name="mine")
    with opened.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO trial_user_attributes")
    # The process lives, so that this trial would be waited for.
    optuna.load_study(storage=opened, study_name="mine").tell(2, state=TrialState.FAIL)
    network = Network(SPACE)
    rest = search(accuracy=network, storage=opened, study_name="mine")
    assert rest.evaluations == 12
    assert len(network.asked) == 12 - 1 - 2
    release(opened)


@pytest.mark.parametrize("storage", [None, "study.db"])
def test_a_worker_that_was_taken_for_dead_goes_on(tmp_path: Path, storage: str | None) -> None:
    """Its heartbeat was missed while it evaluated; the plan may be evaluated again, by whoever is next."""
    opened = open_storage(tmp_path / storage if storage else None)

    def buried(number: int, candidate: Candidate) -> None:
        if number == 3:
            study = optuna.load_study(storage=opened, study_name="mine")
            (running,) = (t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING)
            opened.set_trial_state_values(running._trial_id, TrialState.FAIL)

    network = Network(SPACE, before=buried)
    outcome = search(accuracy=network, storage=opened, study_name="mine", n_trials=8)
    assert outcome.evaluations == 8
    assert len(network.asked) == 8
    assert [t.state for t in outcome.study.trials].count(TrialState.FAIL) == 1
    release(opened)


def test_timeout() -> None:
    slow = Network(SPACE, before=lambda number, candidate: time.sleep(0.05))
    outcome = search(accuracy=slow, sampler=random_sampler(), max_drop=1e-6, n_trials=1000, timeout=0.3)
    assert outcome.stopped == "timeout"
    assert 1 < outcome.evaluations < 20


def test_an_error_in_the_accuracy_is_not_run_again() -> None:
    storage = optuna.storages.InMemoryStorage()

    def broken(candidate: Candidate) -> float:
        raise ValueError("no validation data")

    with pytest.raises(ValueError, match="no validation data"):
        search(accuracy=broken, storage=storage, study_name="mine")
    (trial,) = optuna.load_study(study_name="mine", storage=storage).trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["reason"] == "ValueError: no validation data"
    rest = search(storage=storage, study_name="mine")
    assert not any("retry_of" in t.user_attrs for t in rest.study.trials)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "val_loss"}, "another metric .'val_acc' there, 'val_loss' here."),
        ({"mode": "min"}, "another mode"),
        ({"max_drop": 0.02}, "another threshold .0.01 there, 0.02 here."),
        ({"objective": "macs"}, "another objective .'cost' there, 'macs' here."),
        ({"dense_accuracy": 0.94}, "another accuracy of the dense network, so other weights or validation data"),
        (
            {"of": space(seed=1)},
            "other errors per level, so other weights or calibration data; .*other costs per level",
        ),
        ({"of": space(items=5)}, "another network, or other layers"),
        ({"of": space(levels=7)}, "other levels, granularities or groups"),
        ({"of": space(fixed=2.0)}, "another cost of the dense network, so another device profile .*; other costs"),
    ],
)
def test_a_name_taken_by_another_search(options: dict[str, Any], message: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    search(n_trials=3, storage=storage, study_name="mine")
    network = Network(SPACE)
    with pytest.raises(ValueError, match=rf"the study 'mine' is taken, .*{message}.*Choose another study_name"):
        search(**{"accuracy": network, "storage": storage, "study_name": "mine", **options})
    assert network.asked == []
    search(**{"n_trials": 4, "storage": storage, "study_name": "another", **options})


def test_a_name_taken_by_a_front_or_by_anything_else() -> None:
    storage = optuna.storages.InMemoryStorage()
    about: dict[str, Any] = {"metric": "val_acc", "mode": "max", "dense_accuracy": 0.95, "progress": False}
    front(SPACE, Network(SPACE), n_trials=3, storage=storage, study_name="mine", **about)
    with pytest.raises(ValueError, match=r"another kind of search .'front' there, 'minimise' here."):
        search(storage=storage, study_name="mine")
    optuna.create_study(storage=storage, study_name="users").enqueue_trial({"x": 1})
    with pytest.raises(ValueError, match=r"'users' was not made by .* .its schema is None"):
        search(storage=storage, study_name="users")


def test_rounding_on_another_machine_is_no_other_search() -> None:
    storage = optuna.storages.InMemoryStorage()
    search(n_trials=3, storage=storage, study_name="mine")
    near = SearchSpace(SPACE.items, SPACE.entries, SPACE.errors * (1 + 1e-5), SPACE.tables, SPACE.cost, SPACE.groups)
    outcome = search(near, n_trials=5, storage=storage, study_name="mine", dense_accuracy=0.95 + 1e-5)
    # Drops are against one accuracy, whoever measures them.
    assert all(dropped(t) == 0.95 - (accuracy_of(t) or 0.0) for t in outcome.study.trials)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": -0.01}, "max_drop is how much val_acc may lose, absolute, finite and at least 0, got -0.01"),
        ({"max_drop": math.nan}, "max_drop"),
        ({"max_drop": math.inf}, "max_drop"),
        ({"max_drop": True}, "max_drop"),
        ({"mode": "higher"}, "mode is 'max' where a higher val_acc is better, 'min' where a lower is, got 'higher'"),
        ({"dense_accuracy": math.nan}, "val_acc of the dense network is nan, so no drop can be measured"),
        ({"n_trials": 0}, "n_trials counts evaluations, the dense network's included, at least 1, got 0"),
        ({"n_trials": 2.5}, "n_trials"),
        ({"timeout": -1.0}, "timeout is in seconds, at least 0"),
        ({"of": space(levels=1)}, "the search space is empty: no item has a choice beside the dense one"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    network = Network(SPACE)
    with pytest.raises(ValueError, match=message):
        search(**{"accuracy": network, **options})
    assert network.asked == []


# Storages


@pytest.mark.parametrize(
    ("storage", "error", "message"),
    [
        ("postgresql://ann:secret@127.0.0.1:1/search", ConnectionError, "ann:.*@127.0.0.1:1/search cannot be reached"),
        ("nonsense://ann:secret@host/search", ValueError, "nonsense://ann:.*@host/search is no storage; give a path"),
        ("redis://:secret@host", ValueError, "is a Redis server; build optuna.storages.JournalStorage"),
        ("journal://", ValueError, "names no file; write journal:///"),
        ("  ", ValueError, "a storage is a path, an URL"),
        (7, ValueError, "a storage is a path, an URL"),
    ],
)
def test_storages_that_are_none(storage: Any, error: type[Exception], message: str) -> None:
    network = Network(SPACE)
    with pytest.raises(error, match=message) as caught:
        search(accuracy=network, storage=storage, study_name="mine")
    assert "secret" not in str(caught.value)
    assert network.asked == []
    assert caught.value.__cause__ is None


def test_files_that_are_no_storage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; name a file in it, such as .*study.db"):
        open_storage(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("nothing of this kind, but long enough")
    with pytest.raises(ValueError, match="is not an SQLite file; give another --storage"):
        open_storage(text)
    journal = tmp_path / "notes.journal"
    journal.write_text("nothing\nof this kind\n")
    with pytest.raises(ValueError, match="is no journal of Optuna"):
        open_storage(journal)
    with pytest.raises(ConnectionError, match=r"folder .*notes.txt cannot be made"):
        open_storage(text / "study.db")


def test_storages_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = {
        "a/one.db": (optuna.storages.RDBStorage, "a/one.db"),
        "sqlite:///a/two.db": (optuna.storages.RDBStorage, "a/two.db"),
        f"sqlite:///{tmp_path}/three.db": (optuna.storages.RDBStorage, "three.db"),
        "a/four.journal": (optuna.storages.JournalStorage, "a/four.journal"),
        "five.log": (optuna.storages.JournalStorage, "five.log"),
        "journal:///six": (optuna.storages.JournalStorage, "six"),
        f"journal:///{tmp_path}/seven": (optuna.storages.JournalStorage, "seven"),
        "sqlite:///:memory:": (optuna.storages.RDBStorage, None),
    }
    for name, (kind, file) in kinds.items():
        opened = open_storage(name)
        assert type(opened) is kind
        optuna.create_study(storage=opened, study_name="mine")
        if isinstance(opened, optuna.storages.RDBStorage):  # there are locks beside files
            assert opened.get_heartbeat_interval() == (30 if file is None else None)
        release(opened)
        assert file is None or (tmp_path / file).is_file()
    own = optuna.storages.InMemoryStorage()
    assert open_storage(own) is own


def test_what_others_write_changes_the_version(tmp_path: Path) -> None:
    one, other = open_storage(tmp_path / "study.db"), open_storage(tmp_path / "study.db")
    study = optuna.create_study(storage=one, study_name="mine")
    before = version(one)
    assert before is not None
    assert version(one) == before
    study.set_user_attr("by", "itself")
    study.ask().set_user_attr("by", "itself")
    assert version(one) == before
    optuna.load_study(storage=other, study_name="mine").set_user_attr("by", "another")
    assert version(one) != before
    assert version(one) == version(one)
    release(one)
    release(other)
    for storage in (open_storage(None), open_storage(tmp_path / "study.journal")):
        assert version(storage) is None


def test_a_storage_object_that_others_may_share_is_always_read(tmp_path: Path) -> None:
    opened = open_storage(tmp_path / "study.db")
    assert study_module._watched(opened, opened)() is None
    assert study_module._watched(opened, "study.db")() == version(opened)
    release(opened)


def test_trials_are_read_once_a_trial_unless_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, reads, counts = space(items=3, levels=6), [0], [0]
    get_trials = optuna.Study.get_trials

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        reads[0] += 1
        return get_trials(self, *args, **options)

    def ended(study: Any, trial: Any) -> None:
        counts.append(reads[0])
        if len(counts) == 4:
            other = open_storage(tmp_path / "study.db")
            optuna.load_study(storage=other, study_name="mine").set_user_attr("by", "another")
            release(other)

    monkeypatch.setattr(optuna.Study, "get_trials", counted)
    monkeypatch.setattr("lightning_prune.search.trials._STALE_S", math.inf)
    search(
        of,
        Network(of),
        n_trials=7,
        sampler=optuna.samplers.RandomSampler(seed=0),
        storage=tmp_path / "study.db",
        study_name="mine",
        on_trial=ended,
    )
    assert len(counts) > 6
    assert set(np.diff(counts[1:4])) == {1}
    assert counts[4] == counts[3] + 2
    assert set(np.diff(counts[4:])) == {1}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://a:b@h:3306/d", "mysql://a:***@h:3306/d"),
        ("postgresql://a:p:q%40r@h/d?sslmode=off", "postgresql://a:***@h/d?sslmode=off"),
        ("postgresql://a:p@q@h/d", "postgresql://a:***@h/d"),
        ("postgresql://h/d?user=a&PASSWORD=b&x=1", "postgresql://h/d?user=a&PASSWORD=***&x=1"),
        ("postgresql://a@h/d", "postgresql://a@h/d"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
    ],
)
def test_passwords_are_hidden(url: str, expected: str) -> None:
    assert shown(url) == expected


def test_optuna_is_quiet_and_as_loud_as_before_afterwards(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before, filters = optuna.logging.get_verbosity(), list(warnings.filters)
    assert before == logging.INFO
    search(n_trials=4)
    assert optuna.logging.get_verbosity() == before
    assert list(warnings.filters) == filters
    assert capsys.readouterr() == ("", "")


def test_the_progress_bar_shows_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = search(n_trials=6, progress=True)
    assert outcome.best is not None
    said = capsys.readouterr().out
    assert "Search for the least cost" in said
    assert f"{outcome.evaluations}/6" in said
    assert f"best {outcome.best.user_attrs['candidate']['cost']:.4g}, " in " ".join(said.split())
