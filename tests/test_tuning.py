"""Fine-tuning of a search's candidates: for so many steps, on the same batches, zeros kept."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import Filter, SparsityPlan
from lightning_prune.commands.recovery import Tuning
from lightning_prune.plan import PlanEntry
from lightning_prune.preparation import inference_copy
from lightning_prune.pruner import Pruner
from tests.support import Tiny, loader, sgd, trainer

PLAN = SparsityPlan({"net.0.weight": 0.5, "net.2.weight": 0.25})


class Shuffled(LightningDataModule):
    """Batches that depend on every global random generator there is."""

    def train_dataloader(self) -> DataLoader[Any]:
        def noisy(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            x, y = (torch.stack(part) for part in zip(*batch, strict=True))
            return x + 0.1 * random.random() + 0.1 * float(np.random.rand()), y  # noqa: NPY002

        return DataLoader(loader().dataset, batch_size=8, shuffle=True, collate_fn=noisy)

    def val_dataloader(self) -> DataLoader[Any]:
        pytest.fail("candidates are validated elsewhere")


class Noisy(Tiny):
    """Counts its steps, and drops values out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4))

    steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        Noisy.steps += 1
        return super().training_step(batch, batch_idx)


def pruned(model: nn.Module, plan: SparsityPlan) -> nn.Module:
    network = inference_copy(model)
    Pruner(network, plan, scope="local").update(1.0)
    return network


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def generators() -> list[Any]:
    """Where they stand."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return [random.getstate(), numpy["state"]["key"].tolist(), torch.get_rng_state().tolist()]


PATTERNS = [
    SparsityPlan({"net.0.weight": 0.5, "net.3.weight": 0.25}),
    SparsityPlan({"net.0.weight": PlanEntry(0.5, Filter())}),
]


@pytest.mark.parametrize("plan", PATTERNS, ids=["unstructured", "filter"])
def test_the_same_steps_for_all_and_the_same_zeros(plan: SparsityPlan, caplog: pytest.LogCaptureFixture) -> None:
    model = Noisy()
    before, first = weights(model), pruned(model, plan)
    second, longer, another = (inference_copy(first) for _ in range(3))
    start = weights(first)
    trainings = ((first, 5, 0), (second, 5, 0), (longer, 20, 0), (another, 5, 1))
    for place, (network, steps, seed) in enumerate(trainings):
        Noisy.steps = 0
        by = trainer([])
        caplog.clear()
        tune = Tuning(by, model, Shuffled(), steps=steps, seed=seed)
        for of in (torch.manual_seed, np.random.seed, random.seed):
            of(place)  # whatever came before
        there = generators()
        tune(network, plan)
        assert generators() == there
        assert not caplog.records  # or sixty candidates would say the same sixty times
        assert Noisy.steps == steps  # beyond the 8 batches of an epoch, too
        for name, weight in network.named_parameters():
            assert not torch.equal(weight, start[name]), name
            if name in plan:
                assert torch.equal(weight == 0, start[name] == 0), name
    same, farther, elsewhere = weights(second), weights(longer), weights(another)
    for name, value in weights(first).items():
        assert torch.equal(value, same[name]), name
    assert not torch.equal(farther["net.0.weight"], same["net.0.weight"])
    assert not torch.equal(elsewhere["net.0.weight"], same["net.0.weight"])
    # The model whose training it is stays as it was.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_the_training_of_the_model() -> None:
    """Against plain PyTorch: the model's optimizer, masks after each step, the batches in order."""
    model = Tiny()
    network, reference = pruned(model, PLAN), pruned(model, PLAN)

    class InOrder(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

    Tuning(trainer([]), model, InOrder(), steps=11)(network, PLAN)
    masks = {name: reference.get_parameter(name) != 0 for name in PLAN}
    reference.requires_grad_(True)
    optimizer = sgd(reference.parameters())
    for step in range(11):
        x, y = list(loader())[step % 8]
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                reference.get_parameter(name).mul_(mask)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)


def test_settings_of_the_trainer_count() -> None:
    model = Tiny()
    clipped, free = pruned(model, PLAN), pruned(model, PLAN)
    start = weights(free)

    def moved(network: nn.Module) -> float:
        return sum(float((value - start[name]).norm()) for name, value in network.state_dict().items())

    for network, clip in ((clipped, 1e-3), (free, None)):
        Tuning(trainer([], limit_train_batches=2, gradient_clip_val=clip), model, Shuffled(), steps=4)(network, PLAN)
    assert 0 < moved(clipped) < 0.1 * moved(free)


def test_ctrl_c_is_a_keyboard_interrupt() -> None:
    class Interrupted(Tiny):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            raise KeyboardInterrupt

    model = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        Tuning(trainer([]), model, Shuffled(), steps=4)(pruned(model, PLAN), PLAN)
