"""`trials.json`, and what is computed from it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.search.history import History, TrialRecord, load_trials, save_trials
from lightning_prune.search.importances import importances
from lightning_prune.search.joining import ATTRIBUTE
from lightning_prune.search.ranking import best_trial, front_trials
from lightning_prune.search.study import minimise
from tests.search import analytic
from tests.search.histories import DENSE, DENSE_COST, HOSTILE, history, study


@pytest.mark.parametrize("number", [0, 1, 40])
def test_what_is_written_is_read(tmp_path: Path, number: int) -> None:
    written = save_trials(tmp_path / "trials.json", history(number))
    assert load_trials(tmp_path / "trials.json") == written
    assert written.trials == history(number).trials
    assert bool(written.importances) is (number == 40)
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]


def test_a_study_is_written_as_its_history(tmp_path: Path) -> None:
    save_trials(tmp_path / "trials.json", study(history(40)), unit="s")
    read = load_trials(tmp_path / "trials.json")
    assert replace(read, importances={}) == history(40)
    content = json.loads((tmp_path / "trials.json").read_text())
    assert content["schema"] == "lightning-prune/trials/1"
    assert set(content["trials"][0]) == {
        *("number", "state", "choices", "plan", "cost", "accuracy"),
        *("drop", "evaluated", "reason", "seconds", "params"),
    }


def test_a_killed_trial_took_nobody_knows_how_long() -> None:
    done = study(history(6)).trials[0]
    assert TrialRecord.of(done).seconds is not None
    done.state = optuna.trial.TrialState.FAIL
    assert TrialRecord.of(done).evaluated
    assert TrialRecord.of(done).seconds is None


def test_a_search_that_really_ran(tmp_path: Path) -> None:
    space = analytic.space(items=3, levels=4)
    outcome = minimise(
        space,
        analytic.Network(space),
        metric="val_acc",
        mode="max",
        max_drop=0.02,
        dense_accuracy=0.95,
        n_trials=14,
        sampler=optuna.samplers.RandomSampler(seed=0),
        progress=False,
    )
    found = History.of_study(outcome.study, "s")
    trials = outcome.study.get_trials(deepcopy=False)
    assert len(found.evaluated) == outcome.evaluations - 1
    best = best_trial(trials, 0.02)
    assert best is not None
    assert found.best is not None
    assert found.best.number == best.number
    assert [t.number for t in found.front] == [t.number for t in front_trials(trials)]
    assert found.best_so_far()[-1] == found.best.cost
    assert load_trials(_saved(tmp_path, outcome.study)).trials == found.trials


def _saved(folder: Path, source: Any) -> Path:
    save_trials(folder / "trials.json", source)
    return folder / "trials.json"


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    strange = TrialRecord(0, cost=math.inf, accuracy=math.nan, evaluated=True, plan={HOSTILE: math.nan})
    save_trials(tmp_path / "trials.json", History((strange,), "val_acc", "max", dense_accuracy=math.nan))
    assert "NaN" not in (text := (tmp_path / "trials.json").read_text())
    assert "Infinity" not in text
    read = load_trials(tmp_path / "trials.json")
    assert read.dense_accuracy is None
    assert read.trials[0] == replace(strange, cost=None, accuracy=None, plan={HOSTILE: None})


def test_a_diverged_trial_has_neither_accuracy_nor_drop() -> None:
    (diverged,) = (t for t in History.of_study(study(history(7))).trials if t.number == 6)
    assert diverged.measured
    assert (diverged.accuracy, diverged.drop) == (None, None)
    assert not history(7).feasible(diverged)


@pytest.mark.parametrize(("mode", "sign"), [("max", -1), ("min", 1)])
def test_threshold(mode: str, sign: int) -> None:
    assert history(1, mode=mode).threshold == pytest.approx(DENSE + sign * 0.01)
    assert history(1, max_drop=None).threshold is None


def test_what_drops_by_as_much_as_is_allowed_is_feasible() -> None:
    of = history(0)
    at, beyond = (TrialRecord(0, cost=1e-3, accuracy=0.9, drop=drop, evaluated=True) for drop in (0.01, 0.0100001))
    assert (of.feasible(at), of.feasible(beyond)) == (True, False)
    assert replace(of, trials=(beyond, at)).best == at


drops = st.floats(-0.01, 0.05) | st.none()
records = st.lists(st.tuples(st.floats(0.1, 3.0), drops, st.booleans()), max_size=12)


@given(records)
@settings(max_examples=60)
def test_best_and_front_against_all_pairs(rows: list[tuple[float, float | None, bool]]) -> None:
    trials = tuple(
        TrialRecord(i, cost=cost, drop=drop, accuracy=None if drop is None else 0.9 - drop, evaluated=evaluated)
        for i, (cost, drop, evaluated) in enumerate(rows)
    )
    made = History(trials, "val_acc", "max", 0.01, 0.9, 2.0)
    known = [(t.cost or 0.0, t.drop) for t in trials if t.evaluated and t.drop is not None]
    enough = [cost for cost, drop in known if drop <= 0.01]
    assert (None if made.best is None else made.best.cost) == min(enough, default=None)
    ahead = {(c, d) for c, d in known if not any((a <= c and b <= d and (a, b) != (c, d)) for a, b in known)}
    assert {(t.cost, t.drop) for t in made.front} == ahead
    best = made.best_so_far()
    assert len(best) == 1 + sum(t.evaluated for t in trials)
    assert best[0] == 2.0
    assert best[-1] == min([2.0, *enough])
    assert all(a >= b for a, b in itertools.pairwise(best))


def test_importances_find_what_decided() -> None:
    found = importances(history(60))
    assert set(found) == {"cost", "drop"}
    for shares in found.values():
        assert sum(shares.values()) == pytest.approx(1.0)
        assert next(iter(shares)) == "budget"
        assert shares["budget"] > 0.9
    assert importances(history(60)) == found


def test_importances_are_left_out_where_they_say_nothing() -> None:
    assert importances(history(5)) == {}
    same = tuple(replace(t, drop=0.0) for t in history(20).trials if t.accuracy is not None)
    assert set(importances(replace(history(0), trials=same))) == {"cost"}
    mixed = replace(same[0], params={"budget": 0.5})
    assert importances(replace(history(0), trials=(*same, mixed))) == {}


def test_a_study_of_another_version_is_refused() -> None:
    made = study(history(3))
    made.set_user_attr(ATTRIBUTE, {**made.user_attrs[ATTRIBUTE], "schema": "lightning-prune/study/2"})
    with pytest.raises(ValueError, match=r"not made by this version of lightning-prune: its schema is '.*study/2'"):
        History.of_study(made)


def test_another_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"study 'other' is no sparsity search: it has no attribute 'lightning_prune'"):
        save_trials(tmp_path / "trials.json", optuna.create_study(study_name="other"))
    assert not list(tmp_path.iterdir())


def test_a_direction_that_is_none() -> None:
    with pytest.raises(ValueError, match="mode is 'max' where a higher val_acc is better, else 'min', got 'up'"):
        history(0, mode="up")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[]", "pop"),
        ('{"schema": "lightning-prune/trials/2"}', "schema 'lightning-prune/trials/2'"),
        ('{"schema": "lightning-prune/trials/1"}', "'trials'"),
        ('{"schema": "lightning-prune/trials/1", "trials": [], "metric": "a", "mode": "up"}', "got 'up'"),
        ('{"schema": "lightning-prune/trials/1", "trials": [{"colour": 1}], "metric": "a", "mode": "max"}', "colour"),
        ('{"schema": "lightning-prune/trials/1", "trials": [], "x": 1}', r"nobody knows \['x'\]"),
        (
            '{"schema": "lightning-prune/trials/1", "trials": [{"number": 0, "cost": "<b>"}], "metric": "a", '
            '"mode": "max"}',
            "cost of trial 0 is '<b>', no number",
        ),
    ],
)
def test_damaged(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "trials.json").write_text(text)
    with pytest.raises(ValueError, match=rf"trials.json' holds no trials of schema .*{why}.*write it anew"):
        load_trials(tmp_path / "trials.json")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_trials(tmp_path / "trials.json")


def test_costs_of_a_front_have_no_best() -> None:
    front = history(40, max_drop=None)
    assert front.best is None
    assert all(front.feasible(t) == (t.accuracy is not None) for t in front.evaluated)
    assert front.dense_cost == DENSE_COST
