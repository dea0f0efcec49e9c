"""When exactly the callback acts: at the start, after real steps only, and at the end."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_prune import (
    Epochs,
    GradientMagnitude,
    InitialMagnitude,
    Iterative,
    Linear,
    OneShot,
    Pruning,
    Steps,
    WeightRewinding,
)
from tests.support import BATCHES, EPOCHS, Tiny, Watch, fit, loader, share_of_zeros, trainer
from tests.test_resume import Manual

TOTAL = BATCHES * EPOCHS
TARGET = round(0.7 * 192) / 192


def test_initial_weights_are_those_of_the_first_step_whenever_pruning_begins() -> None:
    initial = Tiny().state_dict()
    pruning = Pruning(0.7, OneShot(), InitialMagnitude(), begin=Steps(10), end=1.0)
    fit([pruning])
    kept = torch.cat([initial[name].abs()[mask] for name, mask in pruning.masks.items()])
    removed = torch.cat([initial[name].abs()[~mask] for name, mask in pruning.masks.items()])
    assert kept.min() >= removed.max()


def test_gradients_may_be_asked_for_once_there_are_some() -> None:
    watch = Watch(lambda _, module: share_of_zeros(module))
    fit([Pruning(0.7, OneShot(), GradientMagnitude(), begin=Steps(3), end=1.0), watch])
    assert watch.seen[1:4] == [0.0, TARGET, TARGET]


def test_manual_accumulation_prunes_after_real_steps_only() -> None:
    class Accumulating(Tiny):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            if batch_idx % 4 == 3:
                optimizer: Any = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()
            return loss

    model = Accumulating()
    model.automatic_optimization = False
    watch = Watch(lambda _, module: share_of_zeros(module))
    fit([Pruning(0.5, Linear(), every=Steps(1)), watch], model)
    changed = [batch for batch in range(1, TOTAL) if watch.seen[batch] != watch.seen[batch - 1]]
    assert changed == list(range(3, 24, 4))
    assert watch.seen[-1] == 0.5


def test_epochs_hold_the_steps_that_accumulation_leaves() -> None:
    # Eight batches, a step after every third and after the last: three steps an epoch.
    watch = Watch(lambda _, module: share_of_zeros(module))
    fit([Pruning(0.5, OneShot(), begin=Epochs(1), end=Epochs(2)), watch], accumulate_grad_batches=3)
    assert watch.seen == [0.0] * (BATCHES - 1) + [0.5] * (TOTAL - BATCHES + 1)


def test_max_steps_of_several_optimizers_are_shared_out_among_batches() -> None:
    class Both(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return loss

    watch = Watch(lambda _, module: share_of_zeros(module))
    fit([Pruning(0.5, Linear(), end=0.5), watch], Both(), max_epochs=-1, max_steps=40)
    assert len(watch.seen) == 20
    assert watch.seen[8] < watch.seen[9] == 0.5


def test_a_trial_run_rewinds_as_well() -> None:
    pruning = Pruning(0.5, OneShot(), begin=Epochs(2), end=1.0, rewind=WeightRewinding(to=Epochs(1)))
    fit([pruning])
    fit([pruning], Tiny(seed=1), fast_dev_run=2)
    assert pruning.state_dict()["snapshot"] is not None


def test_an_update_that_no_step_follows_is_made_up_for() -> None:
    """The gradient scaler skips the last step, which is when the target was due."""

    class Overflow(Tiny):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if self.trainer.global_step == TOTAL - 1 else loss

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    watch = Watch(lambda _, module: share_of_zeros(module))
    pruning = Pruning(0.7, Linear(), end=Steps(TOTAL), every=Steps(4))
    model = fit([pruning, watch], Overflow(), plugins=[plugin])
    assert watch.seen[-1] == watch.seen[-2] < TARGET
    assert pruning.at_target
    assert share_of_zeros(model) == TARGET


@pytest.mark.parametrize("order", [1, -1])
def test_rewinding_for_one_brings_nothing_back_that_another_has_removed(order: int) -> None:
    one = Pruning({"net.0.weight": 0.5}, OneShot(), begin=Steps(4), end=1.0)
    two = Pruning({"net.2.weight": 0.5}, Iterative(2), begin=Steps(8), end=Steps(24), rewind=WeightRewinding())
    watch = Watch(lambda _, module: share_of_zeros(module, "net.0.weight"))
    fit([*[one, two][::order], watch])
    assert watch.seen == [0.0] * 3 + [0.5] * (TOTAL - 3)


def test_metrics_count_once_all_have_reached_their_targets() -> None:
    early, late = Pruning({"net.0.weight": 0.5}, end=Epochs(1)), Pruning({"net.2.weight": 0.5}, end=Epochs(3))

    class Note(Callback):
        seen: list[bool]

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append(math.isfinite(trainer.callback_metrics["val_acc_at_target"]))

    for order in (1, -1):
        note = Note()
        note.seen = []
        fit([*[early, late][::order], note])
        assert note.seen == [False, False, True, True]


def test_a_divergence_is_reported_once() -> None:
    class Diverge(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = math.nan

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([Diverge(), Pruning({"net.0.weight": 0.5}, end=Steps(4))])
    assert len([warning for warning in caught if "training has diverged" in str(warning.message)]) == 1


class Remembering(Callback):
    """Averages weights in a dictionary, where nobody else would look for them, and writes them back at the end."""

    average: dict[str, Tensor]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.average[name] = self.average.get(name, value).lerp(value, 0.5)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.average)


class AtTrainEnd(Callback):
    seen = math.nan

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen = share_of_zeros(pl_module)


def test_whatever_is_written_into_the_model_at_the_end_is_masked() -> None:
    for order in (1, -1):
        averaging, pruning, last = Remembering(), Pruning(0.7, end=1.0), AtTrainEnd()
        averaging.average = {}
        model = fit([*[averaging, pruning][::order], last])
        assert share_of_zeros(model) == TARGET
        assert (last.seen == TARGET) == (order == 1)


class Names(Callback):
    """Which metrics there are after a validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, set[str]]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append((trainer.sanity_checking, {n for n in trainer.callback_metrics if n.endswith("_at_target")}))


def test_a_sanity_check_or_a_validation_of_its_own_has_no_metrics_at_target() -> None:
    names, pruning, model = Names(), Pruning(0.7), Tiny()
    loop = trainer([pruning, names], num_sanity_val_steps=1)
    loop.fit(model, loader(), loader())
    assert names.seen[0] == (True, set())
    assert names.seen[1] == (False, {"train_loss_at_target", "val_loss_at_target", "val_acc_at_target"})
    names.seen.clear()
    loop.validate(model, loader(), verbose=False)
    assert names.seen == [(False, set())]


def test_metrics_of_training_count_at_target_too(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="train_loss_at_target", mode="min", save_on_train_epoch_end=True)
    pruning = Pruning(0.7, end=Epochs(2))
    loop = trainer([best, pruning], enable_checkpointing=True, limit_val_batches=0)
    loop.fit(Tiny(), loader(), loader())
    assert best.best_model_score is not None
    assert math.isfinite(best.best_model_score)
    plain = Tiny()
    plain.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert share_of_zeros(plain) == TARGET
    assert not [name for name in loop.callback_metrics if name.endswith("_at_target_at_target")]
