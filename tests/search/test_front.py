"""Searches without a threshold, from the call to the page."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from lightning_prune.plan import SparsityPlan
from lightning_prune.report import report
from lightning_prune.search.claims import accuracy_of, claimed, cost_of, dropped
from lightning_prune.search.history import load_trials, save_trials
from lightning_prune.search.result import SearchResult
from lightning_prune.search.search import search_sparsity
from tests.search.test_search import ANALYTIC, LEVELS, Accuracy, data, trained


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained()


def front(model: nn.Module, accuracy: Any, **options: Any) -> SearchResult:
    given = {"profile": ANALYTIC, "levels": LEVELS, "n_trials": 14, "max_drop": None, **options}
    return search_sparsity(model, torch.zeros(1, 8), [data()[0]], accuracy, **given)


def test_the_front_is_what_no_other_evaluation_is_better_than(network: nn.Module, tmp_path: Path) -> None:
    accuracy, trials = Accuracy(), list[Any]()
    storage = optuna.storages.InMemoryStorage()
    result = front(
        network,
        accuracy,
        storage=storage,
        study_name="front",
        on_trial=lambda study, trial: trials.append(trial),
        recover=lambda model, plan: pytest.fail("nobody has chosen a plan to recover"),
        confirm=lambda model: pytest.fail("nor one to confirm"),
    )
    assert accuracy.calls == result.evaluations == 14
    points = {(cost_of(t), dropped(t)) for t in trials if claimed(t)}
    best = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))
    assert [(point["cost"], point["drop"]) for point in result.front] == best
    assert len(best) > 2
    by_number = {t.number: t for t in trials}
    for point in result.front:
        said = by_number[point["trial"]]
        assert (point["accuracy"], point["plan"]) == (accuracy_of(said), said.user_attrs["plan"])
    # Nothing is chosen.
    assert not result.feasible
    assert len(result.plan) == 0
    assert math.isnan(result.measured_latency_s)
    assert result.accuracy == result.dense_accuracy
    # As a file, and as a page.
    result.save(tmp_path / "search_result.json")
    assert json.loads((tmp_path / "search_result.json").read_text())["max_drop"] is None
    loaded = SearchResult.load(tmp_path / "search_result.json")
    assert loaded.max_drop == math.inf
    assert [SparsityPlan(p["plan"]) for p in loaded.front] == [SparsityPlan(p["plan"]) for p in result.front]
    save_trials(tmp_path / "trials.json", optuna.load_study(study_name="front", storage=storage), unit=result.unit)
    assert load_trials(tmp_path / "trials.json").max_drop is None
    page = html.unescape(report(tmp_path).read_text())
    assert f"A front of {len(best)} plans:" in page
    assert "Its plans, the cheapest first" in page
    assert "The network that" not in page
    assert "What was found" not in page
    assert " inf" not in page
    assert "nan" not in page.lower().replace("finance", "")
    for point in result.front:
        assert f"{point['accuracy']:.4f}" in page


def test_a_front_and_a_threshold_are_two_studies(network: nn.Module) -> None:
    storage = optuna.storages.InMemoryStorage()
    where: dict[str, Any] = {"storage": storage, "study_name": "mine", "n_trials": 4}
    front(network, Accuracy(), **where)
    with pytest.raises(ValueError, match=r"the study 'mine' is taken"):
        front(network, Accuracy(), max_drop=0.1, **where)
    with pytest.raises(ValueError, match="another repair or fine-tuning of candidates"):
        front(network, Accuracy(), repair="sequential", **where)


def test_a_front_of_nothing(network: nn.Module) -> None:
    result = front(network, Accuracy(), timeout=0.0)
    assert (result.front, result.evaluations) == ((), 1)
