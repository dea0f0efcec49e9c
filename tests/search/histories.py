"""Searches that are over, of any size, without a network."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from lightning_prune.plan import SparsityPlan
from lightning_prune.search.history import History, TrialRecord
from lightning_prune.search.joining import ATTRIBUTE, SCHEMA
from lightning_prune.search.result import SearchResult

DENSE, DENSE_COST, MAX_DROP = 0.96, 2e-3, 0.01
HOSTILE = "<script>alert('$x$')</script>&\"net\".weight"


def history(number: int, seed: int = 0, groups: int = 3, **options: Any) -> History:
    """Trials of which every fifth was not evaluated and every seventh of the others diverged."""
    generator = random.Random(seed)
    trials = []
    for place in range(number):
        budget = generator.random()
        params = {"budget": budget, **{f"weight.{g}": math.exp(generator.uniform(-3, 3)) for g in range(groups)}}
        cost = DENSE_COST * math.exp(-2 * budget)
        record = TrialRecord(place, choices=(place, 1), plan={"net.0.weight": budget}, cost=cost, params=params)
        if place % 5 == 4:
            record = replace(record, state="PRUNED", plan=None, reason="a cost of 1 is not below the incumbent's 0.5")
        elif place % 7 == 6:
            record = replace(record, evaluated=True, seconds=0.5)
        else:
            drop = 0.04 * budget**2
            record = replace(record, evaluated=True, seconds=0.5, accuracy=DENSE - drop, drop=drop)
        trials.append(record)
    about = {"metric": "val_acc", "mode": "max", "max_drop": MAX_DROP, "dense_accuracy": DENSE}
    about |= {"dense_cost": DENSE_COST, "objective": "latency", "unit": "s"}
    return History(tuple(trials), **{**about, **options})


def study(of: History) -> optuna.Study:
    """The same as Optuna keeps it."""
    made = optuna.create_study()
    about = {"schema": SCHEMA, "metric": of.metric, "mode": of.mode, "max_drop": of.max_drop}
    about |= {"dense_accuracy": of.dense_accuracy, "dense_cost": of.dense_cost, "objective": of.objective}
    made.set_user_attr(ATTRIBUTE, about)
    for trial in of.trials:
        add(made, trial)
    return made


def add(made: optuna.Study, trial: TrialRecord) -> None:
    pruned = trial.state == "PRUNED"
    diverged = trial.evaluated and trial.accuracy is None
    candidate = {"choices": list(trial.choices or ()), "cost": trial.cost}
    attributes: dict[str, Any] = {"candidate": candidate, "plan": trial.plan, "worker": "1-2-3", "reason": trial.reason}
    if trial.evaluated or trial.accuracy is not None:
        attributes["outcome"] = {"accuracy": trial.accuracy, "drop": 1e6 if diverged else trial.drop}
    ranges: dict[str, BaseDistribution] = {
        name: FloatDistribution(0, 1) if name == "budget" else FloatDistribution(math.exp(-3), math.exp(3), log=True)
        for name in trial.params
    }
    ended = optuna.trial.create_trial(
        state=optuna.trial.TrialState[trial.state],
        params=dict(trial.params),
        distributions=ranges,
        value=None if pruned else trial.cost,
        user_attrs={key: value for key, value in attributes.items() if value is not None},
    )
    assert ended.datetime_start is not None
    ended.datetime_complete = ended.datetime_start + timedelta(seconds=trial.seconds or 0.0)
    made.add_trial(ended)


def result(name: str = "net.0.weight", **options: Any) -> SearchResult:
    rows = [
        {"name": name, "params": 1000, "nonzeros": 200, "estimated_s": 4e-4, "measured_s": 5e-4, "dense_s": 1e-3},
        {"name": "net.2.weight", "params": 500, "nonzeros": 500, "estimated_s": 3e-4, "measured_s": 3e-4},
    ]
    known: dict[str, Any] = {
        "feasible": True,
        "metric": "val_acc",
        "mode": "max",
        "max_drop": MAX_DROP,
        "plan": SparsityPlan({name: 0.8}),
        "accuracy": 0.955,
        "dense_accuracy": DENSE,
        "latency_s": 9e-4,
        "dense_latency_s": 1.9e-3,
        "measured_latency_s": 1e-3,
        "dense_measured_latency_s": 2e-3,
        "evaluations": 33,
        "cost": 9e-4,
        "dense_cost": DENSE_COST,
        "kernels": {name: "csr", "net.2.weight": "dense"},
        "search_accuracy": 0.951,
        "sparsity": 0.8,
        "nonzeros": 700,
        "params": 1500,
        "macs": 700,
        "dense_macs": 1500,
        "details": {"layers": rows, "seconds": {"search": 12.5}, "device": "a machine", "threads": 1},
    }
    return SearchResult(**{**known, **options})
