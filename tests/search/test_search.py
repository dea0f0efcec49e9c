"""The search as a function: what it promises of its result, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import AGP, Iterative, Magnitude, Pruner, SparsityPlan
from lightning_prune.criteria import GradientMagnitude
from lightning_prune.granularities import Filter
from lightning_prune.kernels import CSR
from lightning_prune.latency import DeviceProfile, LatencyEstimator
from lightning_prune.latency.fitted import FamilyFit, FittedCost
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.roofline import RooflineCost
from lightning_prune.layers import layer_table
from lightning_prune.preparation import inference_copy
from lightning_prune.reconstruction import reconstruct
from lightning_prune.search.claims import accuracy_of, dropped
from lightning_prune.search.phases import Phases
from lightning_prune.search.result import SearchResult
from lightning_prune.search.search import search_sparsity
from tests.latency.profiles import FAMILIES, hand_made, record

LEVELS = (0.3, 0.6, 0.8, 0.9)
COSTS = {
    "dense": RooflineCost("dense", 1e6, 1e12),
    "skipping": RooflineCost("skipping", 1e6, 1e12, 1e-5, efficiency=0.6, skips="unstructured"),
    "blocks": RooflineCost("blocks", 1e6, 1e12, 1e-5, efficiency=0.8, skips="block4"),
    "halves": RooflineCost("halves", 1e6, 1e12, 1e-5, skips="2:4"),
    "shrunk": RooflineCost("shrunk", 1e6, 1e12, 1e-5, skips="filter"),
}
ANALYTIC = DeviceProfile(Machine("analytic", "by hand", 1, "float32"), COSTS)


def data(examples: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 8, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(dim=1)


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    train(model, 60)
    return model.eval()


def train(model: nn.Module, steps: int, after: Callable[[], None] = lambda: None) -> None:
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()
    model.eval()


class Accuracy:
    """Counts the networks that it measures."""

    def __init__(self, seed: int = 1) -> None:
        self.data, self.calls = data(200, seed), 0

    def __call__(self, network: nn.Module) -> float:
        self.calls += 1
        assert not network.training
        with torch.no_grad():
            return float((network(self.data[0]).argmax(dim=1) == self.data[1]).float().mean())


@pytest.fixture(scope="module")
def dense() -> nn.Sequential:
    return trained()


def search(model: nn.Module, accuracy: Callable[[nn.Module], float], **options: Any) -> SearchResult:
    given = {
        "max_drop": 0.05,
        "profile": ANALYTIC,
        "levels": LEVELS,
        "n_trials": 8,
        "sampler": optuna.samplers.RandomSampler(seed=0),
        **options,
    }
    return search_sparsity(model, torch.zeros(1, 8), [data()[0]], accuracy, **given)


def fine_tuned(network: nn.Module, plan: SparsityPlan) -> nn.Module:
    """Ordinary training that keeps the zeros."""
    network.requires_grad_(True)
    masks = {name: weight != 0 for name, weight in network.named_parameters() if name in plan}

    def keep() -> None:
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if name in masks:
                    weight.mul_(masks[name])

    train(network, 100, keep)
    return network


SCHEMES = ["unstructured", "block", "nm", "filter", "mixed", Filter()]


@pytest.mark.parametrize("profile", [ANALYTIC, None], ids=["latency", "macs"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme(dense: nn.Sequential, scheme: Any, profile: DeviceProfile | None) -> None:
    accuracy = Accuracy()
    objective = "macs" if profile is None else "latency"
    result = search(dense, accuracy, scheme=scheme, profile=profile, objective=objective, max_drop=0.2)
    assert result.feasible
    assert len(result.plan)
    assert result.cost < result.dense_cost
    assert result.evaluations == accuracy.calls <= 8 + 1
    assert result.drop <= 0.2
    # What the result says is true of the network it carries.
    assert result.model is not None
    assert result.accuracy == Accuracy()(result.model)
    table = layer_table(dense, torch.zeros(1, 8))
    expected = inference_copy(dense)
    pruner = Pruner(expected, result.plan, criterion=Magnitude(), scope="local")
    pruner.update(1.0)
    for name, mask in pruner.masks.items():
        assert torch.equal(result.model.get_parameter(name) != 0, mask), name
    zeros = sum(int((~mask).sum()) for mask in pruner.masks.values())
    assert result.sparsity == pytest.approx(zeros / sum(mask.numel() for mask in pruner.masks.values()))
    assert (result.params, result.dense_macs) == (table.total_params, table.total_macs)
    assert (result.nonzeros, result.macs) == (table.nonzeros(result.plan), table.macs(result.plan))
    if profile is None:
        assert result.cost == result.macs
        assert math.isnan(result.latency_s)
    else:
        assert result.latency_s == pytest.approx(result.cost, rel=1e-9)
        assert result.dense_latency_s == pytest.approx(result.dense_cost, rel=1e-9)
        assert result.details["device"] == "by hand"
    assert math.isnan(result.measured_latency_s)  # nothing was executed


def test_the_dense_network_is_left_as_it_was(dense: nn.Sequential) -> None:
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    dense.train()
    search(dense, Accuracy(), recover=fine_tuned)
    assert dense.training
    dense.eval()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_the_winner_is_executed(dense: nn.Sequential) -> None:
    example = torch.zeros(1, 8)
    table, networks = record(dense, example)
    machine = Machine.here(torch.device("cpu"), torch.float32)
    # Sparse products that cost next to nothing; when it is executed they may turn out not to.
    families = dict.fromkeys(FAMILIES, FamilyFit({"calls": 1e-6, "macs": 1e-9}, None))
    costs = {**hand_made().costs, "csr": FittedCost(CSR(), families, [])}
    device = replace(hand_made(networks), machine=machine, costs=costs)
    result = search(dense, Accuracy(), profile=device)
    assert 0 < result.measured_latency_s < 1
    assert 0 < result.dense_measured_latency_s < 1
    assert result.speedup == result.dense_measured_latency_s / result.measured_latency_s
    estimator = LatencyEstimator(table, device)
    shares = torch.tensor([result.plan.get(spec.name, 0.0) for spec in table], dtype=torch.float64)
    assert result.latency_s == pytest.approx(float(estimator.latency_s(shares)))
    assert set(result.kernels) == set(table.names)
    assert result.details["threads"] == machine.threads
    assert result.details["relative_error"] <= 1e-4
    assert [layer["name"] for layer in result.details["layers"]] == list(table.names)


def test_a_layer_may_stay_dense(dense: nn.Sequential) -> None:
    result = search(dense, Accuracy(), names=["3.weight"])
    assert set(result.plan) == {"3.weight"}
    assert result.latency_s == pytest.approx(result.cost, rel=1e-9)


def test_where_nothing_is_feasible_the_nearest_plan_is_carried(dense: nn.Sequential) -> None:
    seen: list[float] = []

    def worse(network: nn.Module) -> float:
        value = 1.0 if not seen else 0.5 - float((network[3].weight == 0).float().mean()) / 10  # type: ignore[index]
        seen.append(value)
        return value

    result = search(dense, worse, max_drop=0.0)
    assert not result.feasible
    assert len(result.plan)
    assert result.accuracy == max(seen[1:])
    assert result.drop == pytest.approx(1.0 - max(seen[1:]))


def test_where_everything_is_feasible_the_cheapest_wins(dense: nn.Sequential) -> None:
    result = search(dense, lambda network: 0.9, max_drop=0.0, objective="parameters", n_trials=30)
    assert result.feasible
    assert result.drop == 0.0
    table = layer_table(dense, torch.zeros(1, 8))
    # Nothing else was found: the least is every layer at its last level.
    assert result.cost <= 1.05 * sum(spec.nonzeros(LEVELS[-1]) for spec in table)


def test_where_no_plan_is_cheaper_the_dense_network_is_the_result(dense: nn.Sequential) -> None:
    costs = {"dense": COSTS["dense"]}
    result = search(dense, Accuracy(), profile=replace(ANALYTIC, costs=costs))
    assert not result.feasible
    assert len(result.plan) == 0
    assert result.evaluations == 1
    assert result.details["stopped"] == "exhausted"
    assert result.latency_s == result.dense_latency_s == pytest.approx(result.dense_cost)


def test_networks_that_diverge_are_not_feasible(dense: nn.Sequential) -> None:
    seen: list[float] = []

    def diverging(network: nn.Module) -> float:
        seen.append(0.9 if not seen else math.nan)
        return seen[-1]

    result = search(dense, diverging)
    assert not result.feasible
    assert math.isnan(result.accuracy)
    assert math.isnan(result.search_accuracy)
    assert result.drop == math.inf


def test_lower_may_be_better(dense: nn.Sequential) -> None:
    accuracy = Accuracy()
    result = search(dense, lambda network: 1 - accuracy(network), mode="min", metric="val_error", max_drop=0.1)
    assert result.feasible
    assert result.accuracy > result.dense_accuracy
    assert 0 < result.drop <= 0.1


def test_every_pass_of_the_whole_network_is_an_evaluation(dense: nn.Sequential) -> None:
    accuracy, confirm = Accuracy(), Accuracy(seed=2)
    trials: list[Any] = []
    result = search(
        dense, accuracy, recover=fine_tuned, confirm=confirm, on_trial=lambda study, trial: trials.append(trial)
    )
    assert confirm.calls == 3  # the dense network, the repaired and the recovered one
    assert result.evaluations == accuracy.calls + confirm.calls
    assert accuracy.calls == 1 + sum("plan" in t.user_attrs for t in trials)
    assert result.dense_accuracy == Accuracy(seed=2)(dense)
    assert result.model is not None
    assert result.accuracy == Accuracy(seed=2)(result.model)


class Spoiled:
    """Accuracy on all data that is far lower for the networks that it meets first; the dense one comes before them."""

    def __init__(self, count: int) -> None:
        self.count, self.calls = count, 0

    def __call__(self, network: nn.Module) -> float:
        self.calls += 1
        value = Accuracy()(network)
        return value - 0.5 if 1 < self.calls <= 1 + self.count else value


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_next_plan_is_tried_where_confirmation_fails(dense: nn.Sequential, failing: int) -> None:
    trials: list[Any] = []
    confirm = Spoiled(failing)
    result = search(
        dense, Accuracy(), confirm=confirm, max_drop=0.1, on_trial=lambda study, trial: trials.append(trial)
    )
    enough = [t for t in trials if "plan" in t.user_attrs and dropped(t) <= 0.1]
    by_cost = sorted(enough, key=lambda t: t.user_attrs["candidate"]["cost"])
    assert len(by_cost) > 2
    said = result.details["confirmations"]
    assert [each["trial"] for each in said] == [t.number for t in by_cost[: failing + 1]]
    assert [each["drop"] <= 0.1 for each in said] == [False] * failing + [True]
    assert result.feasible
    assert result.cost == by_cost[failing].user_attrs["candidate"]["cost"]
    assert result.plan == SparsityPlan(by_cost[failing].user_attrs["plan"])
    assert result.accuracy == said[-1]["accuracy"] == accuracy_of(by_cost[failing])
    assert result.search_accuracy == said[-1]["search_accuracy"]
    assert confirm.calls == 2 + failing
    assert result.evaluations == 1 + sum("plan" in t.user_attrs for t in trials) + confirm.calls


def test_where_no_plan_is_confirmed_the_nearest_of_them_is_carried(dense: nn.Sequential) -> None:
    calls: list[float] = []

    def confirm(network: nn.Module) -> float:
        calls.append({0: 0.9, 1: 0.3, 2: 0.5}.get(len(calls), 0.2))
        return calls[-1]

    recoveries: list[SparsityPlan] = []

    def recover(network: nn.Module, plan: SparsityPlan) -> nn.Module:
        recoveries.append(plan)
        return network

    result = search(dense, Accuracy(), confirm=confirm, max_drop=0.1, confirmations=2)
    assert not result.feasible
    assert (result.dense_accuracy, result.accuracy) == (0.9, 0.5)
    assert len(calls) == 3
    first, second = result.details["confirmations"]
    assert (first["drop"], second["drop"]) == pytest.approx((0.6, 0.4))
    assert result.cost == second["cost"] > first["cost"]
    calls.clear()
    once = search(dense, Accuracy(), confirm=confirm, recover=recover, max_drop=0.1, confirmations=1)
    assert (once.feasible, len(once.details["confirmations"]), len(recoveries)) == (False, 1, 1)


def test_recovery_counts_where_it_helps(dense: nn.Sequential) -> None:
    before = search(dense, Accuracy(), max_drop=0.4)
    after = search(dense, Accuracy(), recover=fine_tuned, max_drop=0.4)
    assert after.plan == before.plan
    assert after.search_accuracy == before.accuracy
    assert after.accuracy > before.accuracy
    assert after.details["recovered"]
    assert not before.details["recovered"]


def test_recovery_never_makes_it_worse(dense: nn.Sequential) -> None:
    def ruined(network: nn.Module, plan: SparsityPlan) -> nn.Module:
        with torch.no_grad():
            for weight in network.parameters():
                weight.zero_()
        return network

    result = search(dense, Accuracy(), recover=ruined)
    assert result.accuracy == result.search_accuracy
    assert not result.details["recovered"]
    assert result.feasible


def test_recovery_that_loses_zeros_is_an_error(dense: nn.Sequential) -> None:
    def careless(network: nn.Module, plan: SparsityPlan) -> nn.Module:
        with torch.no_grad():
            network.get_parameter("0.weight").add_(0.1)
        return network

    with pytest.raises(ValueError, match=r"brought removed weights back: '0\.weight' has 0 zeros, the plan wants \d+"):
        search(dense, Accuracy(), recover=careless, names=["0.weight"])
    with pytest.raises(ValueError, match="recover returns the network that it trained, got NoneType"):
        search(dense, Accuracy(), recover=lambda network, plan: None)


def test_candidates_may_be_tuned(dense: nn.Sequential) -> None:
    tuned: list[SparsityPlan] = []

    def tune(network: nn.Module, plan: SparsityPlan) -> None:
        tuned.append(plan)
        fine_tuned(network, plan)

    accuracy = Accuracy()
    result = search(dense, accuracy, tune=tune, max_drop=0.1)
    assert len(tuned) == accuracy.calls - 1
    # The network that is confirmed was tuned as the candidate was.
    assert result.model is not None
    assert result.accuracy == Accuracy()(result.model) == result.search_accuracy
    assert result.details["candidates"] == "layerwise repair, fine-tuned"
    for name in result.plan:
        assert int((result.model.get_parameter(name) == 0).sum()) > 0


def test_sequential_repair_fits_layers_on_what_the_repaired_ones_give(dense: nn.Sequential) -> None:
    result = search(dense, Accuracy(), repair="sequential", max_drop=0.1)
    assert result.model is not None
    assert len(result.plan) > 1
    assert result.details["candidates"] == "sequential repair"
    pruner = Pruner(inference_copy(dense), result.plan, criterion=Magnitude(), scope="local")
    pruner.update(1.0)
    expected = reconstruct(dense, pruner.masks, [data()[0]])
    for name, value in expected.tensors.items():
        torch.testing.assert_close(result.model.get_parameter(name), value)
    assert result.accuracy == result.search_accuracy
    independent = reconstruct(dense, pruner.masks, [data()[0]], sequential=False)
    assert any(not torch.allclose(independent.tensors[name], expected.tensors[name], atol=1e-3) for name in result.plan)


def test_phases_are_told_and_timed(dense: nn.Sequential) -> None:
    said: list[str] = []
    result = search(dense, Accuracy(), recover=fine_tuned, phases=Phases(said=said.append))
    assert [line.split()[0] for line in said] == [
        "Measuring",
        "Repairing",
        "Searching",
        "Recovering",
        "Confirming",
        "Running",
    ]
    assert "Repairing 3 layers at 4 levels each" in said
    assert set(result.details["seconds"]) == {"dense", "repair", "search", "recovery", "confirmation", "execution"}


def test_the_same_seed_finds_the_same(dense: nn.Sequential) -> None:
    first, second = (search(dense, Accuracy(), sampler=None, seed=3) for _ in range(2))
    assert first.plan == second.plan
    assert first.accuracy == second.accuracy


class TestStudies:
    def test_it_goes_on_by_name_and_shares_evaluations(self, dense: nn.Sequential, tmp_path: Path) -> None:
        where = {"storage": tmp_path / "study.db", "study_name": "mine"}
        first, second = Accuracy(), Accuracy()
        search(dense, first, n_trials=5, **where)
        result = search(dense, second, n_trials=9, **where)
        assert first.calls + second.calls == 9 + 1 + 2  # each measured the dense network and confirmed its winner
        assert result.evaluations == 9 + 1
        again = Accuracy()
        final = search(dense, again, n_trials=9, **where)
        assert again.calls == 2
        assert final.plan == result.plan

    def test_a_name_that_another_network_has(self, dense: nn.Sequential, tmp_path: Path) -> None:
        where = {"storage": tmp_path / "study.db", "study_name": "mine"}
        search(dense, Accuracy(), n_trials=2, **where)
        other = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
        with pytest.raises(ValueError, match=r"the study 'mine' is taken, .* another network"):
            search(other, Accuracy(), **where)
        with pytest.raises(ValueError, match=r"another threshold .*0\.05 there, 0\.02 here"):
            search(dense, Accuracy(), max_drop=0.02, **where)
        with pytest.raises(ValueError, match=r"another repair or fine-tuning of candidates \(None there, 'sequential"):
            search(dense, Accuracy(), repair="sequential", **where)

    def test_a_storage_that_cannot_be_reached(self, dense: nn.Sequential, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        accuracy = Accuracy()
        for storage in (tmp_path / "file" / "study.db", tmp_path):
            with pytest.raises((OSError, ValueError), match=str(tmp_path)):
                search(dense, accuracy, storage=storage)
        assert accuracy.calls == 0  # it was asked for before any work

    def test_ctrl_c_keeps_what_is_finished(self, dense: nn.Sequential, tmp_path: Path) -> None:
        where = {"storage": tmp_path / "study.db", "study_name": "mine"}
        accuracy = Accuracy()

        def interrupted(network: nn.Module) -> float:
            if accuracy.calls == 4:
                raise KeyboardInterrupt
            return accuracy(network)

        with pytest.raises(KeyboardInterrupt):
            search(dense, interrupted, **where)
        rest = Accuracy()
        result = search(dense, rest, **where)
        assert result.evaluations == 8 + 1
        assert accuracy.calls + rest.calls == 8 + 1 + 1

    def test_a_trials_plan_that_no_longer_fits_the_model(self, dense: nn.Sequential, tmp_path: Path) -> None:
        search(dense, Accuracy(), storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="mine")
        study = optuna.load_study(study_name="mine", storage=f"sqlite:///{tmp_path / 'study.db'}")
        plan = SparsityPlan(study.best_trial.user_attrs["plan"])
        assert plan.resolve(dense) == plan
        other = nn.ModuleDict({"head": nn.Linear(8, 4)})
        with pytest.raises(
            ValueError, match=r"the plan names '\d\.weight', which matches no parameter .* 'head.weight'"
        ):
            plan.resolve(other)

    def test_no_time_for_a_trial(self, dense: nn.Sequential) -> None:
        accuracy = Accuracy()
        result = search(dense, accuracy, timeout=0.0)
        assert not result.feasible
        assert len(result.plan) == 0
        assert (result.evaluations, accuracy.calls) == (1, 1)
        assert result.sparsity == 0.0
        assert result.nonzeros == result.params > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": -0.01}, "max_drop is how much accuracy may lose, absolute and at least 0 .*got -0.01"),
        ({"max_drop": math.nan}, "max_drop is how much accuracy may lose"),
        ({"max_drop": math.inf}, "max_drop is how much accuracy may lose"),
        ({"max_drop": True}, "max_drop is how much accuracy may lose"),
        ({"mode": "best"}, "mode is 'max' where a higher accuracy is better, .*got 'best'"),
        ({"repair": "none"}, "repair is 'layerwise' or 'sequential', got 'none'"),
        ({"n_trials": 1}, "the dense network is the first evaluation, so n_trials is at least 2, got 1"),
        ({"n_trials": 2.5}, "n_trials is at least 2, got 2.5"),
        ({"confirmations": 0}, "confirmations is how many plans may be confirmed, at least 1, got 0"),
        ({"confirmations": True}, "confirmations is how many plans may be confirmed, .*got True"),
        ({"timeout": -1.0}, "timeout is in seconds, at least 0, .*got -1.0"),
        ({"objective": "speed"}, r"objective is one of \['bytes', .*got 'speed'"),
        ({"scheme": "blocks"}, r"scheme is one of \['block', .*got 'blocks'"),
        ({"levels": (0.5, 1.0)}, r"levels are shares removed, in \(0, 1\)"),
        ({"names": ["3.wait"]}, r"'3\.wait', which matches no parameter .*closest: '3\.weight'"),
        ({"profile": None}, "objective 'latency' needs a device profile; give one that `calibrate` wrote"),
        ({"profile": "none.json"}, "none.json"),
        ({"profile": hand_made()}, "a processor"),
        ({"criterion": GradientMagnitude()}, "needs gradients"),
    ],
)
def test_refused_before_any_work(dense: nn.Sequential, options: dict[str, Any], message: str) -> None:
    accuracy = Accuracy()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        search(dense, accuracy, **options)
    assert accuracy.calls == 0


def test_a_dense_network_that_is_no_better_than_chance(dense: nn.Sequential) -> None:
    with pytest.raises(
        ValueError, match=r"accuracy of the dense network is 0\.25, no better than chance \(0\.25\): train"
    ):
        search(dense, lambda network: 0.25, chance=0.25)
    with pytest.raises(ValueError, match="no better than chance"):
        search(dense, lambda network: 0.7, mode="min", chance=0.5)
    with pytest.raises(ValueError, match="accuracy of the dense network is nan; look at its validation data"):
        search(dense, lambda network: math.nan)


def test_schedules_are_not_mistaken_for_schemes(dense: nn.Sequential) -> None:
    for wrong in ([AGP()], [Iterative(3)]):
        with pytest.raises(ValueError, match="scheme is one of"):
            search(dense, Accuracy(), scheme=wrong)
