"""What a search found, as a value and as a file."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.granularities import Block
from lightning_prune.plan import SparsityPlan
from lightning_prune.search.result import SearchResult, drop_of

KEYS = {
    "feasible",
    "metric",
    "max_drop",
    "dense_accuracy",
    "accuracy",
    "dense_latency_s",
    "latency_s",
    "measured_latency_s",
    "evaluations",
    "plan",
    "kernels",
}
"""Which whoever reads the file may count on."""


def result() -> SearchResult:
    return SearchResult(
        True,
        "val_acc",
        "max",
        0.01,
        SparsityPlan({"a.weight": 0.5, "b.weight": (0.75, Block(4, 4))}),
        0.95,
        0.955,
        latency_s=1e-3,
        dense_latency_s=2e-3,
        measured_latency_s=1.1e-3,
        dense_measured_latency_s=2.2e-3,
        evaluations=12,
        cost=1e-3,
        dense_cost=2e-3,
        kernels={"a.weight": "simd"},
        details={"seconds": {"search": 1.5}, "layers": [{"name": "a.weight", "estimated_s": 1.0}]},
        model=nn.Linear(2, 2),
    )


@pytest.mark.parametrize(
    ("dense_s", "said"),
    [
        (
            3e-3,
            "took 1.50 times its estimate: this machine was probably slower while the winner was executed than while",
        ),
        (1e-3, "took 0.50 times its estimate: this machine was probably slower while it was calibrated than while the"),
        (2.3e-3, None),
        (1.7e-3, None),
        (math.nan, None),
        (0.0, None),
    ],
)
def test_milliseconds_that_disagree_are_explained(dense_s: float, said: str | None) -> None:
    known = replace(result(), details={"network_calibrated": "yes"})
    sentence = replace(known, dense_measured_latency_s=dense_s).disagreement
    assert sentence is None if said is None else said in str(sentence)
    assert replace(known, dense_latency_s=math.nan, dense_measured_latency_s=dense_s).disagreement is None
    unknown = replace(result(), details={"network_calibrated": "no"}, dense_measured_latency_s=dense_s)
    assert unknown.disagreement is None


def test_saved_and_loaded_it_is_the_same_but_for_the_model(tmp_path: Path) -> None:
    path = tmp_path / "search_result.json"
    found = result()
    found.save(path)
    loaded = SearchResult.load(path)
    assert loaded == found  # the model is not compared
    assert loaded.model is None
    assert loaded.plan.granularity("b.weight") == Block(4, 4)
    content = json.loads(path.read_text())
    assert set(content) >= KEYS
    assert content["plan"]["a.weight"] == 0.5
    assert content["drop"] == pytest.approx(0.005)


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    path = tmp_path / "search_result.json"
    nothing = SearchResult.of_nothing("val_acc", "max", 0.01, 0.9)
    replace(nothing, accuracy=math.nan, details={"error": math.inf}).save(path)
    content = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert content["latency_s"] is None
    assert content["details"]["error"] is None
    loaded = SearchResult.load(path)
    for name in ("accuracy", "latency_s", "measured_latency_s", "dense_measured_latency_s", "cost", "search_accuracy"):
        assert math.isnan(getattr(loaded, name)), name
    assert loaded.drop == math.inf
    assert math.isnan(loaded.speedup)


def test_drop_and_speedup() -> None:
    assert result().drop == pytest.approx(0.005)
    assert result().speedup == pytest.approx(2.0)
    lower = replace(result(), mode="min", dense_accuracy=0.2, accuracy=0.25)
    assert lower.drop == pytest.approx(0.05)


@given(st.floats(0.2, 1.0), st.floats(0.0, 0.1), st.sampled_from(["max", "min"]))
def test_a_drop_of_just_the_threshold_is_within_it(dense: float, max_drop: float, mode: str) -> None:
    value = dense - max_drop if mode == "max" else dense + max_drop
    assert drop_of(value, dense, mode, max_drop) <= max_drop
    beyond = value + (-1e-4 if mode == "max" else 1e-4)
    assert drop_of(beyond, dense, mode, max_drop) > max_drop


def test_zero_is_a_threshold() -> None:
    assert drop_of(0.9, 0.9, "max", 0.0) == 0.0
    assert drop_of(0.91, 0.9, "max", 0.0) < 0.0
    assert drop_of(0.899, 0.9, "max", 0.0) > 0.0
    assert drop_of(math.nan, 0.9, "max", 0.0) == math.inf


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ("{}", "'schema'"),
        ('{"schema": "lightning-prune/search-result/0"}', "another schema"),
        ('{"schema": "lightning-prune/search-result/1", "drop": 0}', "'plan'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "search_result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no search result of schema .*; run the search again") as error:
        SearchResult.load(path)
    assert said in str(error.value)
    with pytest.raises(FileNotFoundError):
        SearchResult.load(tmp_path / "none.json")


def test_a_full_disk_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "search_result.json"
    result().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        replace(result(), evaluations=99).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["search_result.json"]
