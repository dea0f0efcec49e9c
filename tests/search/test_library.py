"""Layers repaired once at all their levels, against least squares by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.criteria import Magnitude
from lightning_prune.granularities import Filter
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.pruner import Pruner
from lightning_prune.search.library import Library

ROW = (PlanEntry(0.0), PlanEntry(0.5), PlanEntry(0.75))


def network(seed: int = 0) -> Any:  # tests look at layers by number
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # The inputs hang together, so that kept weights can do the work of removed ones, and are not centred.
    mixing = torch.randn(8, 8, generator=generator)
    return [torch.randn(64, 8, generator=generator) @ mixing + 0.5 for _ in range(2)]


def library(model: nn.Module) -> Library:
    return Library(model, {"0.weight": ROW, "2.weight": ROW}, inputs(), Magnitude())


def test_kept_weights_are_fitted_on_the_layers_own_inputs() -> None:
    model, target = network(), network()
    made = library(model)
    made.put(target, [1, 0])
    weight, bias = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    x = torch.cat(inputs()).double().numpy()
    y = x @ weight.T.astype(float) + bias
    pruned = network()
    Pruner(pruned, SparsityPlan({"0.weight": 0.5})).update(1.0)
    mask = pruned[0].weight.detach().numpy() != 0
    found = target[0].weight.detach().numpy()
    assert ((found != 0) == mask).all()
    residual = power = 0.0
    for out in range(6):
        kept = np.append(x[:, mask[out]], np.ones((len(x), 1)), axis=1)
        solution = np.linalg.lstsq(kept, y[:, out], rcond=None)[0]
        np.testing.assert_allclose(found[out][mask[out]], solution[:-1], rtol=0.05, atol=0.02)  # it is damped
        np.testing.assert_allclose(target[0].bias[out].item(), solution[-1], rtol=0.05, atol=0.02)
        residual += float(((kept @ solution - y[:, out]) ** 2).sum())
        power += float(((y[:, out] - y[:, out].mean()) ** 2).sum())
    assert made.errors[0, 1] == pytest.approx(residual / power, rel=0.05)


def test_errors_rise_with_the_level() -> None:
    made = library(network())
    assert made.errors.shape == (2, 3)
    np.testing.assert_allclose(made.errors[:, 0], 0.0, atol=1e-9)
    assert (np.diff(made.errors, axis=1) > 0).all()
    assert (made.errors < 1).all()


def test_choices_are_put_and_taken_back() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = library(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    target = network(seed=5)
    made.put(target, [2, 1])
    assert [int((layer.weight == 0).sum()) for layer in (target[0], target[2])] == [36, 9]
    assert made.removed([2, 1]) == {"0.weight": 36, "2.weight": 9}
    made.put(target, [0, 0])
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
    assert made.removed([0, 0]) == {"0.weight": 0, "2.weight": 0}


def test_a_bias_that_two_layers_share_is_left_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].bias = model[0].bias
    before = model[0].bias.clone()
    made = Library(model, {"0.weight": ROW, "1.weight": ROW}, inputs(), Magnitude())
    made.put(model, [2, 2])
    assert torch.equal(model[0].bias, before)


def test_groups_go_together_and_layers_are_told() -> None:
    told: list[str] = []
    row = (PlanEntry(0.0), PlanEntry(0.5, Filter()))
    model = network()
    made = Library(model, {"0.weight": row}, inputs(), Magnitude(), progress=told.append)
    made.put(model, [1])
    assert int((model[0].weight == 0).all(dim=1).sum()) == 3
    assert told == ["0.weight"]


def test_there_have_to_be_batches() -> None:
    with pytest.raises(ValueError, match="there are no calibration batches"):
        Library(network(), {"0.weight": ROW}, [], Magnitude())
