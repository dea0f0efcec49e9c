"""The pruner on its own: what it refuses, remembers, and leaves alone."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Filter, GradientMagnitude, InitialMagnitude, Movement, Pruner, SparsityPlan, Unstructured
from lightning_prune.criteria import Criterion, Evidence


def network() -> Any:  # layers are looked at by number
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


@dataclass(frozen=True)
class Gradients(Criterion):
    """Keeps the weights whose gradients are largest."""

    uses_gradient: ClassVar[bool] = True

    def observe(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient

    def score(self, evidence: Evidence) -> Tensor:
        return evidence.require_observed()


@pytest.mark.parametrize("level", [-0.01, 1.01, math.nan, math.inf])
def test_levels_outside_the_way_are_refused(level: float) -> None:
    pruner = Pruner(network(), SparsityPlan({"*": 0.5}))
    with pytest.raises(ValueError, match=rf"level is how far .* in \[0, 1\], got {level}"):
        pruner.update(level)
    assert not pruner.masks


def test_a_plan_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SparsityPlan\(\{\}\) prunes nothing of Sequential"):
        Pruner(network(), SparsityPlan({}))


def test_pruning_may_start_at_its_target() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"*": 0.5}), initial=SparsityPlan({"*": 0.5}))
    pruner.update(0.0)
    assert not pruner.at_target
    kept = pruner.masks
    pruner.update(1.0)
    assert pruner.at_target
    assert all(torch.equal(mask, kept[name]) for name, mask in pruner.masks.items())
    assert sum(int((~mask).sum()) for mask in kept.values()) == 48


def test_an_initial_plan_of_other_parameters_does_not_prune_them() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}), initial=SparsityPlan({"*": 0.25}))
    assert dict(pruner.initial_plan) == {"0.weight": 0.25}
    pruner.update(1.0)
    assert (model[1].weight != 0).all()


def test_the_same_level_again_is_no_update_and_forgets_nothing() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"*": 0.5}))
    pruner.update(0.5)
    masks = pruner.masks
    pruner.update(0.5)
    assert pruner.updates == 1
    assert pruner.masks is masks


def test_every_update_makes_a_new_map_of_new_masks() -> None:
    pruner = Pruner(network(), SparsityPlan({"*": 0.5}))
    pruner.update(0.5)
    first = pruner.masks
    before = {name: mask.clone() for name, mask in first.items()}
    pruner.update(1.0)
    assert pruner.masks is not first
    assert all(torch.equal(mask, before[name]) for name, mask in first.items())


@pytest.mark.parametrize("scope", ["global", "local", "filter"])
def test_going_back_keeps_what_was_removed(scope: Any) -> None:
    pruner = Pruner(network(), SparsityPlan({"*": 0.5}), scope=scope)
    pruner.update(1.0)
    masks = pruner.masks
    pruner.update(0.25)
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())


def test_masks_are_those_that_the_ranks_agree_on() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}))
    agreed = torch.rand(8, 8) > 0.5
    pruner.update(1.0, synchronise=lambda mask: agreed)
    assert pruner.masks["0.weight"] is agreed
    assert torch.equal(model[0].weight != 0, agreed)


def test_a_plan_to_remove_everything_is_no_surprise() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(model, SparsityPlan({"0.weight": 1.0})).update(1.0)
    assert not model[0].weight.any()


def test_initial_weights_are_those_of_the_beginning() -> None:
    model = network()
    first = model[0].weight.detach().clone()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}), criterion=InitialMagnitude())
    pruner.begin()
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(8, 8))
    pruner.begin()  # a training that goes on begins once more
    pruner.update(1.0)
    assert first.abs()[pruner.masks["0.weight"]].min() >= first.abs()[~pruner.masks["0.weight"]].max()


def test_initial_weights_are_taken_at_the_first_update_at_the_latest() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}), criterion=InitialMagnitude())
    pruner.update(1.0)
    assert int((model[0].weight == 0).sum()) == 32


def step(model: nn.Module, pruner: Pruner, gradient: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.get_parameter("0.weight").grad = gradient.clone()
    pruner.observe(optimizer)


class RecentGradients(Gradients):
    """Those since the last update only."""

    forgets: ClassVar[bool] = True


@pytest.mark.parametrize("criterion", [Gradients(), RecentGradients()], ids=repr)
def test_criteria_see_the_gradients_of_removed_weights(criterion: Gradients) -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}), criterion=criterion, regrow=True)
    one, two = torch.rand(8, 8), torch.rand(8, 8) * 100
    step(model, pruner, one)
    assert torch.equal(pruner.state_dict()["observation"]["sums"]["0.weight"], one)
    pruner.update(1.0)
    step(model, pruner, two)
    assert torch.equal(model[0].weight.grad != 0, pruner.masks["0.weight"])  # but optimizers do not
    observed = pruner.state_dict()["observation"]["sums"]["0.weight"]
    assert torch.equal(observed, two if criterion.forgets else one + two)
    assert pruner.state_dict()["observation"]["steps"]["0.weight"] == (1 if criterion.forgets else 2)


def test_what_was_observed_is_a_copy() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}), criterion=Gradients())
    step(model, pruner, torch.ones(8, 8))
    model[0].weight.grad.zero_()
    assert pruner.state_dict()["observation"]["sums"]["0.weight"].all()


@pytest.mark.parametrize("regrow", [False, True])
def test_nothing_is_observed_once_nothing_can_change(regrow: bool) -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}), criterion=Movement(), regrow=regrow)
    step(model, pruner, torch.ones(8, 8))
    pruner.update(1.0)
    before = dict(pruner.state_dict()["observation"]["steps"])
    step(model, pruner, torch.ones(8, 8))
    assert (pruner.state_dict()["observation"]["steps"] != before) == regrow


def test_a_dense_start_needs_no_gradients() -> None:
    pruner = Pruner(network(), SparsityPlan({"*": 0.5}), criterion=GradientMagnitude())
    pruner.update(0.0)
    assert all(mask.all() for mask in pruner.masks.values())
    with pytest.raises(ValueError, match=r"no gradient of '0\.weight' was observed yet"):
        pruner.update(0.5)


def test_asking_whether_a_step_has_happened_forgets_it() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"*": 0.5}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach([optimizer])
    assert not pruner.stepped()
    optimizer.step()
    assert pruner.stepped()
    assert not pruner.stepped()


def test_diverged_parameters_are_named() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"*": 0.5}))
    assert pruner.diverged() == []
    with torch.no_grad():
        model[1].weight[0, 0] = math.inf
        model[0].bias[0] = math.nan  # not pruned
    assert pruner.diverged() == ["1.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": SparsityPlan({"*": 0.5, "0.bias": 0.5})}, r"another plan of 0\.bias: None then, 0 -> 0\.5"),
        ({"target": SparsityPlan({"0.weight": 0.5})}, r"another plan of 1\.weight: 0 -> 0\.5.* then, None now"),
        ({"granularity": Filter()}, r"plan of 0\.weight.*Unstructured\(\) then, .*Filter\(\) now"),
        ({"criterion": Movement()}, r"another criterion: Magnitude.* then, Movement\(\) now"),
        ({"scope": "local"}, "another scope: global then, local now"),
        ({"regrow": True}, "another regrow: False then, True now"),
        ({"initial": SparsityPlan({"*": 0.1})}, r"0 -> 0\.5.* then, 0\.1 -> 0\.5"),
    ],
)
def test_the_state_of_another_pruner_is_refused(options: dict[str, Any], message: str) -> None:
    state = Pruner(network(), SparsityPlan({"*": 0.5})).state_dict()
    other = Pruner(network(), **{"target": SparsityPlan({"*": 0.5}), "granularity": Unstructured(), **options})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


@pytest.mark.parametrize(("start", "target", "weights", "expected"), [(0.03, 0.3, 15, 4), (0.03, 0.45, 10, 4)])
def test_the_target_is_met_to_the_last_digit(start: float, target: float, weights: int, expected: int) -> None:
    assert round((start + (target - start) * 1.0) * weights) != expected  # what comes of adding the difference
    model = nn.Linear(weights, 1)
    pruner = Pruner(model, SparsityPlan({"weight": target}), initial=SparsityPlan({"weight": start}))
    pruner.update(1.0)
    assert int((model.weight == 0).sum()) == expected


def test_state_goes_round() -> None:
    model = network()
    pruner = Pruner(model, SparsityPlan({"0.weight": 0.5}), criterion=Gradients())
    step(model, pruner, torch.rand(8, 8))
    pruner.update(0.5)
    step(model, pruner, torch.rand(8, 8))
    state, again = pruner.state_dict(), Pruner(model, SparsityPlan({"0.weight": 0.5}), criterion=Gradients())
    again.load_state_dict(state)
    assert again.state_dict().keys() == state.keys()
    assert repr(again.state_dict()) == repr(state)
    again.update(1.0)  # what was observed before counts
    pruner.update(1.0)
    assert torch.equal(again.masks["0.weight"], pruner.masks["0.weight"])
