"""Snapshots: what they remember, that training does not change them, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, SequentialLR

from lightning_prune import LearningRateRewinding, WeightRewinding
from lightning_prune.rewinding import restore, take

KINDS = [WeightRewinding(), LearningRateRewinding()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: list[Any], steps: int) -> list[float]:
    """Learning rates of the steps."""
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: ExponentialLR(optimizer, 0.5),
        lambda optimizer: CosineAnnealingLR(optimizer, 8),
        lambda optimizer: SequentialLR(
            optimizer, [LinearLR(optimizer, total_iters=3), ExponentialLR(optimizer, 0.5)], [3]
        ),
    ],
    ids=["exponential", "cosine", "sequential"],
)
def test_learning_rates_go_back_as_often_as_asked(kind: Any, rate: Any, schedule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedulers = [schedule(optimizer)]
    train(model, optimizer, schedulers, steps=1)
    snapshot = take(kind, model, [optimizer], schedulers)
    first = train(model, optimizer, schedulers, steps=5)
    for _ in range(2):
        restore(snapshot, model, [optimizer], schedulers)
        assert train(model, optimizer, schedulers, steps=5) == pytest.approx(first)
    assert len(set(first)) > 1


class Counting:
    """A scheduler of one's own, whose state is the very list that it appends to."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self) -> None:
        self.seen.append(len(self.seen))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def test_snapshots_share_nothing_with_schedulers() -> None:
    model, scheduler = nn.Linear(4, 4), Counting()
    scheduler.step()
    snapshot = take(LearningRateRewinding(), model, [], [scheduler])
    for _ in range(3):
        scheduler.step()
        restore(snapshot, model, [], [scheduler])
        assert scheduler.seen == [0]


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_weights_statistics_and_optimizer_state(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    then = {name: value.clone() for name, value in model.state_dict().items()}
    snapshot = take(kind, model, [optimizer], [])
    train(model, optimizer, [], steps=3)
    now = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    restore(snapshot, model, [optimizer], [])
    expected = then if kind.weights else now
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not torch.equal(then["1.running_var"], now["1.running_var"])
    assert bool(optimizer.state) != kind.weights
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert bool(snapshot["weights"]) == kind.weights


def test_groups_that_joined_later_stay_as_they_are() -> None:
    model, late = nn.Linear(4, 4), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    snapshot = take(LearningRateRewinding(), model, [optimizer], [])
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    optimizer.param_groups[0].update(lr=0.001, weight_decay=1.0)
    restore(snapshot, model, [optimizer], [])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert optimizer.param_groups[0]["params"][0] is model.weight
    assert optimizer.param_groups[1]["params"][0] is late


def test_other_optimizers_or_schedulers_than_before_are_refused() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ExponentialLR(optimizer, 0.5)
    snapshot = take(WeightRewinding(), model, [optimizer], [scheduler])
    with torch.no_grad():
        model.weight.zero_()
    for optimizers, schedulers in (([optimizer, optimizer], [scheduler]), ([optimizer], []), ([], [scheduler])):
        with pytest.raises(ValueError, match="the snapshot holds 1 optimizers and 1 schedulers, training has"):
            restore(snapshot, model, optimizers, schedulers)
    assert not model.weight.any()  # refused before anything was touched


def test_snapshots_survive_a_checkpoint(tmp_path: Any) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    snapshot = take(WeightRewinding(), model, [optimizer], [ExponentialLR(optimizer, 0.5)])
    torch.save(snapshot, tmp_path / "snapshot.pt")
    assert torch.load(tmp_path / "snapshot.pt", weights_only=True).keys() == snapshot.keys()
