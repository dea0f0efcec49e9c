"""A search in TensorBoard's event files, read back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_prune.plan import SparsityPlan
from lightning_prune.search.events import SearchEvents
from lightning_prune.search.history import History
from lightning_prune.search.result import SearchResult
from tests.search.histories import DENSE, DENSE_COST, HOSTILE, MAX_DROP, add, history, result, study

SIZES = {"scalars": 0, "images": 0, "tensors": 0}


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance=SIZES)
    accumulator.Reload()
    return accumulator


def curve(accumulator: EventAccumulator, tag: str) -> list[tuple[int, Any]]:
    return [(each.step, pytest.approx(each.value)) for each in accumulator.Scalars(tag)]


def events(folder: Path, **options: Any) -> SearchEvents:
    return SearchEvents(folder, "val_acc", "max", MAX_DROP, unit="s", **options)


def follow(writer: SearchEvents, of: History) -> optuna.Study:
    """Tell of each trial as it ends."""
    made = study(replace(of, trials=()))
    for trial in of.trials:
        add(made, trial)
        writer.on_trial(made, made.get_trials(deepcopy=False)[-1])
    return made


def test_curves(tmp_path: Path) -> None:
    writer, of = events(tmp_path), history(30)
    follow(writer, of)
    writer.finish(result())
    found = read(tmp_path)
    done = of.evaluated
    assert curve(found, "search/cost") == [(1, DENSE_COST), *((i, t.cost) for i, t in enumerate(done, start=2))]
    accuracies = [(i, t.accuracy) for i, t in enumerate(done, start=2) if t.accuracy is not None]
    assert len(accuracies) < len(done), "none diverged"
    assert curve(found, "search/accuracy") == [(1, DENSE), *accuracies]
    assert curve(found, "search/best_cost") == list(enumerate(of.best_so_far(), start=1))
    assert curve(found, "search/sparsity/net.0.weight") == [(33, 0.8)]
    assert curve(found, "search/sparsity/net.2.weight") == [(33, 0.0)]
    images = {"trials", "progress", "layers", "importance", "estimate"}
    assert set(found.Tags()["images"]) == {f"search/{name}" for name in images}
    assert all(found.Images(f"search/{name}")[0].width > 300 for name in images)


def test_every_evaluation_is_a_line_of_hyperparameters(tmp_path: Path) -> None:
    of = history(12)
    writer = events(tmp_path)
    follow(writer, of)
    writer.close()
    folders = sorted((tmp_path / "trials").iterdir())
    assert [folder.name for folder in folders] == [f"{t.number:04d}" for t in of.evaluated]
    for folder, trial in zip(folders, of.evaluated, strict=True):
        found = read(folder)
        content = found.PluginTagToContent("hparams")
        start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
        params = {name: value.number_value for name, value in start.session_start_info.hparams.items()}
        assert params == pytest.approx(dict(trial.params))
        experiment = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
        assert {each.name.tag for each in experiment.metric_infos} == {"search/cost", "search/accuracy", "search/drop"}
        ended = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_end_info"])
        assert ended.session_end_info.status
        known = {"search/cost": trial.cost, "search/accuracy": trial.accuracy, "search/drop": trial.drop}
        assert {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]} == {
            tag: pytest.approx(value) for tag, value in known.items() if value is not None
        }


def test_a_resumed_study_goes_on(tmp_path: Path) -> None:
    of = history(20)
    first = events(tmp_path)
    follow(first, replace(of, trials=of.trials[:10]))
    first.close()
    second = events(tmp_path)
    made = study(replace(of, trials=of.trials[:10]))
    for trial in of.trials[10:]:
        add(made, trial)
        second.on_trial(made, made.get_trials(deepcopy=False)[-1])
    second.close()
    steps = [each.step for each in read(tmp_path).Scalars("search/cost")]
    assert steps == list(range(1, 2 + len(of.evaluated)))


def test_a_trial_that_is_told_twice_is_written_once(tmp_path: Path) -> None:
    writer = events(tmp_path)
    made = follow(writer, history(3))
    writer.on_trial(made, made.trials[2])
    writer.close()
    assert [each.step for each in read(tmp_path).Scalars("search/cost")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "found",
    [
        SearchResult.of_nothing("val_acc", "max", MAX_DROP, DENSE),
        result(feasible=False, accuracy=math.nan, measured_latency_s=math.nan, latency_s=math.nan),
        result(HOSTILE, details={}),
        result(plan=SparsityPlan({}), kernels={}, details={}),
    ],
    ids=["nothing", "diverged", "hostile", "empty"],
)
def test_any_result_without_a_trial(tmp_path: Path, found: SearchResult) -> None:
    events(tmp_path).finish(found)
    images = set(read(tmp_path).Tags()["images"])
    assert images == {
        *(["search/layers"] if found.plan or found.kernels else []),
        *(["search/estimate"] if math.isfinite(found.measured_latency_s) else []),
    }


def test_what_the_study_does_not_say_is_given(tmp_path: Path) -> None:
    writer = events(tmp_path, dense_accuracy=0.5, dense_cost=7.0, objective="macs")
    follow(writer, history(2))
    assert (writer.history.dense_accuracy, writer.history.dense_cost, writer.history.objective) == (0.5, 7.0, "macs")
    writer.close()
    told = events(tmp_path / "told")
    follow(told, history(2))
    assert (told.history.dense_accuracy, told.history.dense_cost, told.history.objective) == (
        DENSE,
        DENSE_COST,
        "latency",
    )
    told.close()


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    writer = events(tmp_path, dense_accuracy=math.nan, dense_cost=math.inf)
    follow(writer, history(1))
    writer.close()
    found = read(tmp_path)
    assert [each.step for each in found.Scalars("search/accuracy")] == [2]
    assert [each.step for each in found.Scalars("search/cost")] == [2]


def test_nothing_is_opened_before_there_is_something(tmp_path: Path) -> None:
    events(tmp_path / "never").close()
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="mode is 'max'"):
        SearchEvents(tmp_path, "val_acc", "up", 0.1)
