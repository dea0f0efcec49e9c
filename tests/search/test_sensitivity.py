"""Sensitivities against networks pruned one by one, interrupted runs, files, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.criteria import Criterion, GradientMagnitude, Magnitude, MagnitudeChange
from lightning_prune.granularities import NM, Filter, Granularity, Unstructured
from lightning_prune.plan import SparsityPlan
from lightning_prune.pruner import Pruner
from lightning_prune.search import Sensitivity, accuracy_and_loss, sensitivity
from lightning_prune.search import partial as partial_module
from lightning_prune.targets import prunable
from tests.search.networks import (
    FLAT,
    IMAGES,
    Counting,
    Moody,
    Random,
    Residual,
    batch_for,
    build,
    mlp,
    small_cnn,
)

LEVELS = (0.0, 0.5, 0.9)


def batches_for(make: Any, number: int = 3, examples: int = 12) -> list[tuple[Tensor, Tensor]]:
    # The last one is smaller: averages are over examples, not batches.
    return [batch_for(make, examples - 5 * (seed == number - 1), seed) for seed in range(number)]


def one_by_one(
    make: Any,
    batches: list[tuple[Tensor, Tensor]],
    criterion: Criterion = Magnitude(),  # noqa: B008
    granularity: Granularity = Unstructured(),  # noqa: B008
    levels: tuple[float, ...] = LEVELS,
) -> dict[str, list[list[float]]]:
    """Accuracy and loss in NumPy, of networks built anew and pruned by a Pruner."""
    found: dict[str, list[list[float]]] = {"accuracy": [], "loss": []}
    for name in prunable(build(make)):
        rows: dict[str, list[float]] = {"accuracy": [], "loss": []}
        for level in levels:
            right, losses = [], []
            for x, y in batches:
                network = build(make)
                if level:
                    plan = SparsityPlan({name: level})
                    Pruner(network, plan, criterion=criterion, granularity=granularity, scope="local").update(1.0)
                with torch.no_grad():
                    logits = network(x.clone()).double().numpy()
                chosen = logits[np.arange(len(y)), y.numpy()]
                right += list(logits.argmax(axis=1) == y.numpy())
                losses += list(np.log(np.exp(logits).sum(axis=1)) - chosen)
            rows["accuracy"].append(float(np.mean(right)))
            rows["loss"].append(float(np.mean(losses)))
        for metric, row in rows.items():
            found[metric].append(row)
    return found


@pytest.fixture(autouse=True)
def no_fused_attention() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)  # for the reference
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("make", FLAT + IMAGES)
def test_metrics_are_those_of_networks_pruned_one_by_one(make: Any) -> None:
    batches = batches_for(make)
    result = sensitivity(build(make), batches, levels=LEVELS)
    expected = one_by_one(make, batches)
    assert result.names == tuple(prunable(build(make)))
    assert result.curves("accuracy").numpy() == pytest.approx(np.array(expected["accuracy"]), abs=1e-12)
    assert result.curves("loss").numpy() == pytest.approx(np.array(expected["loss"]), rel=1e-5)
    assert result.examples == 31
    assert set(result.curves("accuracy")[:, 0].tolist()) == {result.dense["accuracy"]}
    assert len(set(result.curves("loss").flatten().tolist())) > len(result.names)


@pytest.mark.parametrize(("criterion", "granularity"), [(Magnitude(p=2), Filter()), (Magnitude(), NM(2, 4))])
def test_criterion_and_granularity_are_used(criterion: Criterion, granularity: Granularity) -> None:
    batches, levels = batches_for(mlp), (0.0, 0.5)
    result = sensitivity(
        build(mlp), batches, levels=levels, names="[02].weight", criterion=criterion, granularity=granularity
    )
    expected = one_by_one(mlp, batches, criterion, granularity, levels)["loss"][:2]
    assert result.curves("loss").numpy() == pytest.approx(np.array(expected), rel=1e-5)
    assert result.values != sensitivity(build(mlp), batches, levels=levels, names="[02].weight").values
    assert (result.criterion, result.granularity) == (str(criterion), str(granularity))


@pytest.mark.parametrize("make", [mlp, small_cnn, Residual])
def test_reuse_changes_nothing_but_the_work(make: Any) -> None:
    batches = batches_for(make)
    fast, plain = (sensitivity(build(make), batches, levels=LEVELS, reuse=reuse) for reuse in (True, False))
    assert fast.values == plain.values
    assert fast.dense == plain.dense
    layers = len(plain.names)
    assert plain.forward_passes == plain.full_passes == plain.plain_passes == 3 * (1 + layers * 2)
    assert fast.plain_passes == plain.plain_passes
    assert fast.full_passes < fast.forward_passes
    assert fast.full_passes < plain.full_passes + 5  # what was recorded, counted and checked


def test_the_work_is_counted_in_flops() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    ran: list[int] = []
    batches = [(torch.randn(4, 8), torch.randint(8, (4,))) for _ in range(5)]

    def score(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        ran.append(1)
        return accuracy_and_loss(output, target)

    result = sensitivity(network, batches, score, levels=(0.5, 0.6, 0.7))
    recorded_counted_and_checked = 5 + 1 + (3 / 3 + 2 / 3 + 1 / 3)
    assert result.full_passes == pytest.approx(recorded_counted_and_checked + 5 * 3 * (3 / 3 + 2 / 3 + 1 / 3))
    assert result.forward_passes == len(ran) == 5 + 1 + 3 + 5 * 9
    assert result.plain_passes == 5 * 10


@pytest.mark.parametrize(("make", "reason"), [(Random, "random, or keeps state"), (Moody, "another order")])
def test_what_cannot_be_replayed_says_so_and_runs_whole(make: Any, reason: str) -> None:
    batches = batches_for(make)
    with pytest.warns(UserWarning, match=rf"{make.__name__} cannot be reused, every layer .* whole ones .*{reason}"):
        result = sensitivity(build(make), batches, levels=LEVELS)
    assert result.full_passes >= result.plain_passes
    assert all(math.isfinite(value) for row in result.values["loss"] for value in row)


def test_a_network_that_turns_moody_is_still_evaluated_right() -> None:
    class Turning(Moody):
        def forward(self, x: Tensor) -> Tensor:
            if self.turn < 12:
                self.turn += 2
                return self.head(self.two(self.one(x)))  # type: ignore[no-any-return]
            return self.head(self.two(self.one(self.two.bias + self.one(x))))  # type: ignore[no-any-return]

    batches = batches_for(mlp, number=1)
    with pytest.warns(UserWarning, match="Turning cannot be reused"):
        result = sensitivity(build(Turning), batches, names=["head.weight", "two.weight"], levels=(0.5, 0.7, 0.9))
    late = build(Turning)
    late.turn = 99  # type: ignore[assignment]
    Pruner(late, SparsityPlan({"head.weight": 0.9})).update(1.0)
    with torch.no_grad():
        expected = accuracy_and_loss(late(batches[0][0]), batches[0][1])["loss"].double().mean()
    assert result.values["loss"][1][2] == expected.item()


@pytest.mark.parametrize("make", [small_cnn, Counting, Random])
def test_model_and_generators_are_left_alone(make: Any) -> None:
    model = build(make).train()
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sensitivity(model, iter(batches_for(make)), levels=LEVELS)  # an iterator is read once
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is False
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_inference_mode_around_it_changes_nothing() -> None:
    model, batches = build(small_cnn), batches_for(small_cnn)
    with torch.inference_mode():
        inside = sensitivity(model, batches_for(small_cnn), levels=LEVELS)
    assert inside == sensitivity(model, batches, levels=LEVELS)


def test_inputs_may_be_tuples_and_mappings_and_scores_anything_per_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.layer(x.mul_(scale))  # type: ignore[no-any-return]

    x, target, scale = torch.randn(6, 8), torch.randn(6, 4), torch.rand(6, 1)
    before = x.clone()

    def score(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"mse": (output - target) ** 2}

    positional = sensitivity(build(Two), [((x, scale), target)], score, levels=LEVELS)
    named = sensitivity(build(Two), [({"x": x, "scale": scale}, target)], score, levels=LEVELS)
    assert positional.values == named.values
    assert torch.equal(x, before)
    assert positional.dense["mse"] == pytest.approx(((build(Two)(x.clone(), scale) - target) ** 2).mean().item())
    assert (positional.metrics, positional.examples) == (("mse",), 6)


class Stop(Exception):
    """Stands for Ctrl-C, or a crash."""


def counted(batches: Any, stop_at: int, ran: list[int]) -> Any:
    def score(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        ran.append(1)
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        return accuracy_and_loss(output, target)

    return score


@settings(max_examples=12)
@given(stop_at=st.integers(1, 30), every_s=st.sampled_from([0.0, 1e9]))
def test_an_interrupted_run_goes_on_where_it_stopped(stop_at: int, every_s: float, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("partial") / "kept.json"
    batches = batches_for(mlp)
    whole = sensitivity(build(mlp), batches, levels=LEVELS)
    ran: list[int] = []
    before, partial_module._EVERY_S = partial_module._EVERY_S, every_s
    try:
        stopped = whole.forward_passes >= stop_at
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                sensitivity(build(mlp), batches, counted(batches, stop_at, ran), levels=LEVELS, partial=path)
        again: list[int] = []
        resumed = sensitivity(build(mlp), batches, counted(batches, -1, again), levels=LEVELS, partial=path)
    finally:
        partial_module._EVERY_S = before
    assert (resumed.values, resumed.dense, resumed.examples) == (whole.values, whole.dense, whole.examples)
    assert not path.exists()
    # At most the layer at hand is run again, and what a batch begins with, with one more count and three checks.
    assert len(again) <= whole.forward_passes - (stop_at if stopped else 0) + 2 + 2 + 4 + 1
    assert resumed.plain_passes == whole.plain_passes


def interrupt(path: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        sensitivity(build(mlp), batches_for(mlp), counted(None, 14, []), levels=LEVELS, partial=path, **options)
    assert path.exists()


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("other levels", {"levels": (0.0, 0.5, 0.8)}),
        ("other layers", {"names": "0.weight"}),
        ("another criterion", {"criterion": Magnitude(p=2)}),
        ("another granularity", {"granularity": Filter()}),
        ("other weights", {"model": build(mlp, seed=9)}),
        ("another network", {"model": build(small_cnn)}),
        ("other data", {"batches": batches_for(mlp)[::-1]}),
        ("other data", {"batches": []}),
    ],
)
def test_the_beginning_of_something_else_is_refused(what: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    interrupt(path)
    kept = path.read_bytes()
    given = {"model": build(mlp), "batches": batches_for(mlp), "levels": LEVELS, **options}
    with pytest.raises(
        ValueError, match=rf"kept.json' holds .* for {what}; go on .* or remove this one|got none"
    ) as error:
        sensitivity(given.pop("model"), given.pop("batches"), partial=path, **given)
    assert what in str(error.value) or options.get("batches") == []
    assert path.read_bytes() == kept
    assert sensitivity(build(mlp), batches_for(mlp), levels=LEVELS, partial=path).examples == 31


def test_fewer_batches_than_before_are_other_data(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    with pytest.raises(KeyboardInterrupt):
        sensitivity(build(mlp), batches_for(mlp), counted(None, 26, []), levels=LEVELS, partial=path)
    assert json.loads(path.read_text())["begun"] > 1
    with pytest.raises(ValueError, match="for other data"):
        sensitivity(build(mlp), batches_for(mlp)[:1], levels=LEVELS, partial=path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": "lightning-prune/sensitivity-partial/1"}'])
def test_no_beginning_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"kept.json' is no beginning of sensitivities; name another file"):
        sensitivity(build(mlp), batches_for(mlp), partial=path)
    assert path.read_text() == content


def nan_score(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"loss": torch.where(output.abs().sum(dim=1) > 0, math.nan, 1.0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, r"levels are fractions removed, in \[0, 1\], rising, none twice; got \[\]"),
        ({"levels": [0.5, 0.5]}, r"got \[0.5, 0.5\]"),
        ({"levels": [0.9, 0.5]}, r"got \[0.9, 0.5\]"),
        ({"levels": [0.5, 1.1]}, r"got \[0.5, 1.1\]"),
        ({"levels": [-0.1]}, r"got \[-0.1\]"),
        ({"levels": [math.nan]}, r"got \[nan\]"),
        ({"batches": []}, "sensitivity needs at least one batch of data, got none"),
        ({"batches": [torch.ones(4, 8)]}, "pairs of input and target, got Tensor; put several"),
        ({"batches": [(1, 2, 3)]}, "got tuple of 3"),
        ({"names": "2.wieght"}, "'2.wieght', which matches no parameter of Sequential; closest: '2.weight'"),
        ({"names": []}, "needs at least one layer, names is empty"),
        ({"model": nn.Sequential(nn.BatchNorm1d(8))}, "Sequential has no conv or linear weights"),
        ({"criterion": GradientMagnitude()}, r"without training, and GradientMagnitude\(\) needs gradients; give"),
        ({"criterion": MagnitudeChange()}, r"MagnitudeChange\(\) needs the weights before training"),
        ({"granularity": NM(2, 4)}, r"removes exactly 0.5 of a weight, not 0.3"),
        ({"score": lambda output, target: {"loss": output.mean()}}, "return one value per example, .*reduction='none'"),
        ({"score": lambda output, target: {"loss": 1.0}}, "gave 'loss' as 1.0"),
        ({"score": lambda output, target: {}}, "score returns a map of metrics to tensors, got {}"),
        ({"score": lambda output, target: {"loss": output[:0, 0]}}, "'loss' of the dense network is NaN on batch 0"),
        ({"score": nan_score}, "'loss' of the dense network is NaN on batch 0; check weights and data"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"model": build(mlp), "batches": batches_for(mlp), "score": accuracy_and_loss, **options}
    with pytest.raises(ValueError, match=message):
        sensitivity(given.pop("model"), given.pop("batches"), given.pop("score"), **given)


def test_metrics_that_come_and_go_are_refused() -> None:
    def score(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        extra = {"more": output[:, 0]} if not output.any() else {}
        return {**accuracy_and_loss(output, target), **extra}

    network = nn.Sequential(nn.Linear(8, 3, bias=False))
    with pytest.raises(ValueError, match=r"gave \['accuracy', 'loss', 'more'\] with '0.weight' at 1, \['acc.*the same"):
        sensitivity(network, batches_for(mlp), score, levels=[1.0])


def test_a_network_that_dies_gives_nan_cells_and_their_names(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 3, bias=False))

    def score(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"ratio": output[:, 0] / output[:, 0], "inverse": 1 / output[:, 0].abs()}

    result = sensitivity(network, batches_for(mlp), score, levels=(0.2, 1.0))
    assert result.not_finite == [("ratio", "0.weight", 1.0), ("inverse", "0.weight", 1.0)]
    result.save(tmp_path / "nan.json")
    again = Sensitivity.load(tmp_path / "nan.json")
    assert repr(again) == repr(result)
    assert math.isnan(again.values["ratio"][0][1])
    assert again.values["inverse"][0][1] == math.inf
    assert "NaN" not in (tmp_path / "nan.json").read_text()
    assert len(again.figure().axes) == 2


EXAMPLE = Sensitivity(
    names=("a.weight", "b.weight"),
    levels=(0.5, 0.9),
    values={"accuracy": ((0.9, 0.4), (0.95, 0.7)), "loss": ((0.2, 0.9), (0.1, 0.5))},
    dense={"accuracy": 0.94, "loss": 0.15},
    examples=100,
    forward_passes=9,
    full_passes=6.5,
    plain_passes=5,
    criterion="Magnitude(p=1.0)",
    granularity="Unstructured()",
    weights="abc",
)


def test_drops_are_positive_where_things_get_worse() -> None:
    assert EXAMPLE.drops("accuracy").numpy() == pytest.approx(np.array([[0.04, 0.54], [-0.01, 0.24]]))
    assert EXAMPLE.drops("loss", "min").numpy() == pytest.approx(np.array([[0.05, 0.75], [-0.05, 0.35]]))
    with pytest.raises(ValueError, match=r"mode is 'max' where higher is better or 'min' .*, got 'best'"):
        EXAMPLE.drops("loss", "best")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no metric 'acuracy' among the sensitivities; closest: 'accuracy', 'loss'"):
        EXAMPLE.curves("acuracy")


def test_files_hold_everything(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == EXAMPLE
    EXAMPLE.to_csv(tmp_path / "s.csv")
    rows = list(csv.reader((tmp_path / "s.csv").read_text().splitlines()))
    assert rows[:3] == [
        ["layer", "sparsity", "accuracy", "loss"],
        ["", "0.0", "0.94", "0.15"],
        ["a.weight", "0.5", "0.9", "0.2"],
    ]
    assert rows[-1] == ["b.weight", "0.9", "0.7", "0.5"]
    assert len(rows) == 6


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    with pytest.raises(
        FileNotFoundError, match=r"there are no sensitivities at .*s.json'; write them with `lightning-"
    ):
        Sensitivity.load(path)
    EXAMPLE.save(path)
    content = json.loads(path.read_text())
    for damaged, message in [
        (path.read_text()[:-20], "is not a whole file of sensitivities: .*; write it anew"),
        ("[1]", "has schema None, this version reads 'lightning-prune/sensitivity/1'"),
        (
            json.dumps({**content, "schema": "lightning-prune/sensitivity/9"}),
            "has schema 'lightning-prune/sensitivity/9'",
        ),
        (json.dumps({key: value for key, value in content.items() if key != "dense"}), "is damaged .*'dense'"),
        (json.dumps({**content, "values": {"accuracy": [[0.1]]}}), "is damaged .*needs its dense value"),
        (json.dumps({**content, "levels": "half"}), "is damaged .*could not convert"),
    ]:
        path.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            Sensitivity.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ()}, "one or more layers, each once"),
        ({"names": ("a.weight", "a.weight")}, "each once, got"),
        ({"levels": (0.9, 0.5)}, "levels are fractions removed"),
        ({"dense": {"accuracy": 0.9}}, r"dense values of \['accuracy'\] and curves of \['accuracy', 'loss'\]"),
        ({"names": ("a.weight",)}, "'accuracy' needs 1 rows of 2 numbers, .* got 2 of"),
        ({"levels": (0.5,)}, r"'accuracy' needs 2 rows of 1 numbers, .* got 2 of \[2\]"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EXAMPLE, **changes)


def test_the_figure_shows_a_curve_per_layer_and_a_panel_per_metric() -> None:
    figure = EXAMPLE.figure()
    assert [axis.get_title("left") for axis in figure.axes] == ["accuracy", "loss"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"dense", "a.weight", "b.weight"}
    assert np.asarray(lines["b.weight"].get_ydata()).tolist() == [0.95, 0.7]
    assert np.asarray(lines["b.weight"].get_xdata()).tolist() == [0.5, 0.9]
    assert set(np.asarray(lines["dense"].get_ydata()).tolist()) == {0.94}
    assert len(EXAMPLE.figure("loss").axes) == 1


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    sensitivity(build(mlp), batches_for(mlp), levels=LEVELS, progress=True)
    assert "Sensitivity of Sequential" in (shown := capsys.readouterr().out)
    assert "27/27" in shown
    sensitivity(build(mlp), iter(batches_for(mlp)), levels=LEVELS, progress=True)
    assert "27/?" in capsys.readouterr().out
    sensitivity(build(mlp), batches_for(mlp), levels=LEVELS)
    assert not capsys.readouterr().out
