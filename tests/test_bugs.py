"""Bugs that users met in other pruning callbacks, Lightning's `ModelPruning` among them; none of them here."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_prune import Epochs, Iterative, Linear, OneShot, Pruning, Steps, WeightRewinding
from lightning_prune.masks import masks
from tests.support import BATCHES, EPOCHS, Tiny, Watch, fit, loader, sgd, share_of_zeros, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def test_01_half_over_many_updates_is_half_not_compounded() -> None:
    pruning = Pruning(0.5, Iterative(EPOCHS), every=Epochs(1), end=1.0)
    model = fit([pruning])
    assert pruning.updates == EPOCHS + 1
    assert share_of_zeros(model) == 0.5


def test_02_resume_does_not_return_to_dense(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="end")
    trainer([Pruning(0.5), keep], enable_checkpointing=True).fit(Tiny(), loader(), loader())
    seen = Watch(lambda _, module: share_of_zeros(module))
    model = Tiny(seed=1)
    loop = trainer([Pruning(0.5), seen], max_epochs=EPOCHS + 2)
    loop.fit(model, loader(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert seen.seen == [0.5] * 2 * BATCHES


def test_04_the_callback_can_be_reused_pickled_and_copied() -> None:
    pruning = Pruning(0.5)
    fit([pruning])
    fit([copy.deepcopy(pruning)], Tiny(seed=1))
    fit([pickle.loads(pickle.dumps(pruning))], Tiny(seed=2))
    model = Tiny(seed=3)
    loop = trainer([pruning])
    loop.fit(model, loader(), loader())
    assert share_of_zeros(model) == 0.5
    assert not loop.optimizers[0]._optimizer_step_post_hooks


def test_05_weight_rewinding_rewinds() -> None:
    initial: torch.Tensor = Tiny().net[0].weight.detach().clone()
    seen = Watch(lambda _, module: module.get_parameter("net.0.weight").detach().clone())
    pruning = Pruning(0.5, OneShot(), begin=Steps(16), end=1.0, rewind=WeightRewinding(to=Epochs(0)))
    fit([pruning, seen])
    assert torch.equal(seen.seen[15], initial * pruning.masks["net.0.weight"])


def test_06_saving_keeps_masks_in_training_and_plain_names_in_the_file(tmp_path: Path) -> None:
    class SaveOften(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "now.ckpt")

    pruning = Pruning(0.5, OneShot())
    model = fit([pruning, SaveOften()], enable_checkpointing=False)
    assert share_of_zeros(model) == 0.5
    assert not list(model.buffers())
    assert set(torch.load(tmp_path / "now.ckpt", weights_only=True)["state_dict"]) == set(model.state_dict())


def test_07_masks_tell_the_sparsity_of_the_weights() -> None:
    pruning = Pruning(0.37)

    def compare(_: Any, module: Any) -> bool:
        removed = sum(int((~mask).sum()) for mask in pruning.masks.values())
        return removed / 192 == share_of_zeros(module)

    seen = Watch(compare)
    fit([pruning, seen])
    assert all(seen.seen)


def test_09_removed_weights_are_zero_even_where_gradients_are_nan() -> None:
    class NaNGradient(Tiny):
        def on_after_backward(self) -> None:
            weight = self.net[0].weight
            if weight.grad is not None:
                weight.grad[weight == 0] = math.nan

    model = fit([Pruning({"net.0.weight": 0.5}, OneShot())], NaNGradient())
    assert share_of_zeros(model, "net.0.weight") == 0.5
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_10_momentum_and_decay_revive_nothing(momentum: float) -> None:
    def heavy(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=momentum, weight_decay=0.1)

    seen = Watch(lambda _, module: share_of_zeros(module))
    fit([Pruning(0.5, OneShot(), begin=Steps(10), end=1.0), seen], Tiny(heavy))
    assert seen.seen == [0.0] * 9 + [0.5] * (BATCHES * EPOCHS - 9)


def test_12_the_pruned_module_copies_and_saves(tmp_path: Path) -> None:
    model = fit([Pruning(0.5)])
    twin = copy.deepcopy(model)
    torch.save(model.net.state_dict(), tmp_path / "net.pt")
    twin.net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert share_of_zeros(twin) == 0.5


def test_13_accumulated_gradients_are_never_pruned_in_between() -> None:
    class InBetween(Callback):
        before = 0.0
        changed_without_step: list[int]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.before, self.step = share_of_zeros(pl_module), trainer.global_step

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == self.step and share_of_zeros(pl_module) != self.before:
                self.changed_without_step.append(self.step)

    between = InBetween()
    between.changed_without_step = []
    model = fit([Pruning(0.5, Linear(), every=Steps(1)), between], accumulate_grad_batches=4)
    assert between.changed_without_step == []
    assert share_of_zeros(model) == 0.5


def test_14_ties_are_counted_exactly() -> None:
    kept = masks({"w": torch.ones(10)}, {"w": 0.5})["w"]
    assert int(kept.sum()) == 5


@pytest.mark.parametrize("order", [1, -1])
def test_15_averaged_weights_are_sparse_in_validation_too(order: int) -> None:
    pruning = Pruning(0.5, Linear(), every=Steps(1))  # averages remember weights that are removed later

    class Revived(Callback):
        seen: list[int]

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gone = [pl_module.get_parameter(name)[~mask] for name, mask in pruning.masks.items()]
            self.seen.append(sum(int(weights.count_nonzero()) for weights in gone))

    note = Revived()
    note.seen = []
    model = fit([note, *[EMAWeightAveraging(decay=0.9), pruning][::order]], Tiny(sgd))
    assert set(note.seen) == {0}
    assert share_of_zeros(model) == 0.5
