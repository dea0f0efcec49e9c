"""Searches that quantise: what is measured, what it costs, and which width a layer gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.kernels import Int8
from lightning_prune.latency import DeviceProfile, LatencyEstimator
from lightning_prune.latency.fitted import FamilyFit, FittedCost
from lightning_prune.latency.machine import Machine
from lightning_prune.layers import layer_table
from lightning_prune.plan import PlanEntry
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import QuantizedLayer, quantized_layers, quantized_twin
from lightning_prune.search.layer_space import layer_rows
from lightning_prune.search.objectives import Latency, MACs
from lightning_prune.search.quantized import (
    QUANTIZATIONS,
    Quantization,
    QuantizedEntry,
    output_errors,
    quantization_of,
    quantized_costs,
    with_quantized,
)
from lightning_prune.search.result import SearchResult
from lightning_prune.search.schemes import entries_of
from lightning_prune.search.search import search_sparsity
from lightning_prune.tracing import call
from tests.latency.profiles import FAMILIES, hand_made, record
from tests.search.test_search import Accuracy, data, trained

LEVELS = (0.3, 0.6, 0.9)


@pytest.fixture(scope="module")
def dense() -> nn.Sequential:
    return trained()


def profile_of(model: nn.Module, int8_s: float | None) -> DeviceProfile:
    """Hand-made costs of this machine, where zeros pay; in 8 bits every layer takes as long."""
    _, networks = record(model, torch.zeros(1, 8), fixed_s=1e-7)
    made = hand_made(networks)
    costs: dict[str, Any] = {
        name: FittedCost(made.costs[name].kernel, {kind: FamilyFit(fit, None) for kind in FAMILIES}, [])  # type: ignore[union-attr]
        for name, fit in {"dense": {"calls": 1e-6, "macs": 1e-8}, "csr": {"calls": 1e-6, "macs": 1.5e-8}}.items()
    }
    if int8_s is not None:
        costs["int8"] = FittedCost(Int8(), {kind: FamilyFit({"calls": int8_s}, None) for kind in FAMILIES}, [])
    return DeviceProfile(Machine.here(torch.device("cpu"), torch.float32), costs, (), networks)


class Watching(Accuracy):
    """Notes which layers of the networks that it measures are quantised."""

    def __init__(self, penalty: float = 0.0) -> None:
        super().__init__()
        self.penalty = penalty
        self.seen: list[tuple[str, ...]] = []

    def __call__(self, network: nn.Module) -> float:
        self.seen.append(tuple(quantized_layers(network)))
        return super().__call__(network) - self.penalty * len(self.seen[-1])


def search(model: nn.Module, accuracy: Callable[[nn.Module], float], **options: Any) -> SearchResult:
    given = {
        "max_drop": 0.05,
        "objective": "macs",
        "levels": LEVELS,
        "n_trials": 8,
        "sampler": optuna.samplers.RandomSampler(seed=0),
        "quantize": "int8",
        **options,
    }
    return search_sparsity(model, torch.zeros(1, 8), [data()[0]], accuracy, **given)


ALL = ("0", "3", "5")


@pytest.mark.parametrize("name", ["int8", "int8_asymmetric", "int4"])
def test_the_threshold_is_for_the_twins(dense: nn.Sequential, name: str) -> None:
    watch = Watching()
    result = search(dense, watch, quantize=name)
    # The dense network as it is; candidates and the winner quantised; the winner as it is, the dense one quantised.
    count = len(watch.seen) - 4
    assert count >= 3
    assert watch.seen == [(), *[ALL] * (count + 1), (), ALL]
    assert result.evaluations == len(watch.seen)
    measure, batches = Accuracy(), [data()[0]]
    settings = QUANTIZATIONS[name].settings
    assert result.model is not None
    assert not quantized_layers(result.model)
    twin = quantized_twin(result.model, batches, settings, call)
    assert result.quantization == name
    assert result.accuracy == measure(twin)
    assert result.search_accuracy == result.accuracy
    assert result.float_accuracy == measure(result.model)
    assert result.dense_accuracy == measure(dense)
    assert result.quantized_dense_accuracy == measure(quantized_twin(dense, batches, settings, call))
    assert result.feasible == (result.dense_accuracy - result.accuracy <= 0.05)
    bits = settings.bits
    assert result.bits == {f"{layer}.weight": bits for layer in ALL}
    assert result.details["candidates"] == f"layerwise repair, quantised ({name})"


def test_what_only_floating_point_reaches_is_not_feasible(dense: nn.Sequential) -> None:
    assert search(dense, Watching(), quantize=None).feasible
    result = search(dense, Watching(penalty=0.02))  # three layers lose more than 0.05
    assert not result.feasible
    assert result.float_accuracy > result.accuracy


def test_settings_may_leave_layers_out(dense: nn.Sequential) -> None:
    watch = Watching()
    result = search(dense, watch, quantize=QuantizationSettings(bits=6, exclude="5"))
    assert set(watch.seen) == {(), ("0", "3")}
    assert result.bits == {"0.weight": 6, "3.weight": 6}
    assert result.quantization == "settings"


def test_results_are_kept(dense: nn.Sequential, tmp_path: Path) -> None:
    result = search(dense, Watching(), n_trials=3)
    result.save(tmp_path / "result.json")
    loaded = SearchResult.load(tmp_path / "result.json")
    assert (loaded.quantization, loaded.bits, loaded.float_accuracy, loaded.quantized_dense_accuracy) == (
        result.quantization,
        result.bits,
        result.float_accuracy,
        result.quantized_dense_accuracy,
    )
    nothing = SearchResult.of_nothing("accuracy", "max", 0.01, 0.5)
    nothing.save(tmp_path / "nothing.json")
    assert np.isnan(SearchResult.load(tmp_path / "nothing.json").float_accuracy)


def test_studies_of_other_widths_are_not_joined(dense: nn.Sequential, tmp_path: Path) -> None:
    options: dict[str, Any] = {"storage": tmp_path / "study.db", "study_name": "one", "n_trials": 3}
    search(dense, Watching(), **options)
    with pytest.raises(ValueError, match="the study 'one' is taken"):
        search(dense, Watching(), quantize="int4", **options)


class TestMixed:
    def found(self, dense: nn.Sequential, int8_s: float, penalty: float = 0.0, **options: Any) -> SearchResult:
        self.watch = Watching(penalty)
        given = {"quantize": "mixed", "objective": "latency", "profile": profile_of(dense, int8_s), **options}
        return search(dense, self.watch, **{"n_trials": 12, **given})

    def test_fast_integers_run_all_layers_dense(self, dense: nn.Sequential) -> None:
        result = self.found(dense, 1e-9)
        assert result.bits == dict.fromkeys(["0.weight", "3.weight", "5.weight"], 7)
        assert not result.plan
        assert result.feasible
        assert result.model is not None
        assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), dense.parameters(), strict=True))
        assert result.latency_s == pytest.approx(result.cost)
        assert result.dense_cost > result.cost
        assert np.isfinite(result.measured_latency_s)  # it was executed

    def test_slow_integers_run_none(self, dense: nn.Sequential) -> None:
        result = self.found(dense, 1.0)
        assert result.plan
        assert not result.bits
        assert set(self.watch.seen[:-1]) == {()}  # but the dense network's twin, at the end
        assert result.accuracy == result.float_accuracy

    def test_a_layer_is_pruned_or_quantised(self, dense: nn.Sequential) -> None:
        result = self.found(dense, 1.5e-6)
        assert len({*map(frozenset, self.watch.seen)}) > 2
        assert not set(result.bits) & set(result.plan)
        for seen in self.watch.seen:
            assert set(seen) <= set(ALL)

    def test_integers_that_cost_accuracy_are_left(self, dense: nn.Sequential) -> None:
        result = self.found(dense, 1.7e-6, penalty=1.0, max_drop=0.3, n_trials=25)
        assert len({*map(frozenset, self.watch.seen)}) > 2
        assert result.plan
        assert result.feasible
        assert not result.bits

    def test_needs_kernels_and_an_objective_of_time(self, dense: nn.Sequential) -> None:
        for profile in (profile_of(dense, None), None):
            with pytest.raises(ValueError, match=r"needs (kernels in integers|a device profile)"):
                search(dense, Watching(), quantize="mixed", objective="latency", profile=profile)
        with pytest.raises(ValueError, match="'macs' does not depend on it: give objective 'latency'"):
            search(dense, Watching(), quantize="mixed")


@pytest.mark.parametrize("mixed", [False, True])
def test_costs_of_choices(dense: nn.Sequential, mixed: bool) -> None:
    table = layer_table(dense, torch.zeros(1, 8))
    profile = profile_of(dense, 1e-9)
    choices = with_quantized(entries_of(dense, table, "unstructured", LEVELS))
    assert all(row[0] == PlanEntry(0.0) and row[-1] == QuantizedEntry(0.0) != row[0] for row in choices.values())
    exact, whole = LatencyEstimator(table, profile), LatencyEstimator(table, profile, quantized=True)
    costs = quantized_costs(Latency(), table, layer_rows(table, choices), exact, whole, mixed)
    shares = torch.tensor([[0.0] * 3, *[[level] * 3 for level in LEVELS]], dtype=torch.float64)
    plain, integer = exact.latency_s(shares).numpy(), whole.latency_s(shares).numpy()
    rows = [[column] * 3 for column in range(5)]
    expected = [plain[0], *(plain if mixed else integer)[1:], integer[0]]
    assert costs.total(np.array(rows)).tolist() == pytest.approx(expected)
    assert expected[-1] < expected[0]
    each = MACs().costs(table, layer_rows(table, choices), None)
    same = quantized_costs(MACs(), table, layer_rows(table, choices), None, None, False)
    assert np.array_equal(each.tables[0].costs, same.tables[0].costs)


def test_output_errors_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5, bias=False))
    model[1].running_var.uniform_(0.5, 2.0)  # type: ignore[operator]
    model.eval().requires_grad_(False)
    batches = [torch.randn(6, 2, 6, 6), torch.randn(3, 2, 6, 6)]
    twin = quantized_twin(model, batches, QuantizationSettings(bits=4, exclude=[]), call)
    found = output_errors(model, twin, ["4", "absent", "0"], batches)

    def both(
        name: str, before: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], bias: Tensor | None
    ) -> float:
        layer = twin.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        moved = power = 0.0
        for x in batches:
            y, rounded = plain(before(x)).double().numpy(), layer(before(x)).double().numpy()
            moved += float(((rounded - y) ** 2).sum())
            power += float(((y - (0.0 if bias is None else bias.view(-1, 1, 1).numpy())) ** 2).sum())
        return moved / power

    conv: Any = model[0]
    norm: Any = model[1]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias + (conv.bias - norm.running_mean) * scale
    expected = [both("4", model[:4], model[4], None), np.inf, both("0", lambda x: x, model[:2], shift)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert 0.0 < found[0] < 0.1


class TestRefused:
    @pytest.mark.parametrize(
        ("quantize", "message"),
        [
            ("int9", r"quantize is one of \['int4', 'int8', .*got quantize='int9'; closest: 'int8'"),
            (8, r"quantize is one of .*got quantize=8"),
            (QuantizationSettings(exclude="fc"), "exclude names 'fc', which matches none of the 3 layers"),
        ],
    )
    def test_before_any_work(self, dense: nn.Sequential, quantize: Any, message: str) -> None:
        watch = Watching()
        with pytest.raises(ValueError, match=message):
            search(dense, watch, quantize=quantize)
        assert not watch.seen

    def test_kept_as_it_is(self) -> None:
        given = Quantization("mine", QuantizationSettings(bits=5))
        assert quantization_of(given) is given


def test_names_say_what_they_are() -> None:
    kinds: Sequence[tuple[str, Any, str]] = [
        (name, one.settings.bits, one.settings.scheme_of_weights) for name, one in QUANTIZATIONS.items()
    ]
    assert kinds == [
        ("int8", 7, "symmetric"),
        ("int8_asymmetric", 8, "asymmetric"),
        ("int8_symmetric", 8, "symmetric"),
        ("int4", 4, "asymmetric"),
        ("mixed", 7, "symmetric"),
    ]
    assert all(one.settings.widths(["a"])["a"].activation == 8 for one in QUANTIZATIONS.values())
