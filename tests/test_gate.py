"""Metrics at target, and who waits for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_prune import Epochs, OneShot, Pruning, Steps
from tests.support import BATCHES, EPOCHS, Tiny, fit, loader, share_of_zeros, trainer

TARGET = round(0.7 * 192) / 192


def best(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, monitor="val_acc_at_target", mode="max", filename="{epoch}-{step}", **options)


def sparsities(folder: Path) -> list[float]:
    found = []
    for path in sorted(folder.glob("*.ckpt")):
        model = Tiny()
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        found.append(share_of_zeros(model))
    return found


@pytest.mark.parametrize(
    "options", [{"save_top_k": 3}, {"save_top_k": -1}, {"save_top_k": 2, "every_n_train_steps": 5}]
)
@pytest.mark.parametrize("first", [True, False])
def test_best_checkpoints_are_at_full_sparsity_only(options: dict[str, Any], first: bool, tmp_path: Path) -> None:
    pruning, keep = Pruning(0.7, end=0.5), best(tmp_path, **options)
    fit([keep, pruning] if first else [pruning, keep], enable_checkpointing=True)
    found = sparsities(tmp_path)
    assert found
    assert set(found) == {TARGET}
    assert keep.save_top_k == options["save_top_k"]


@pytest.mark.filterwarnings("ignore:training stopped after")
def test_a_training_that_never_gets_there_keeps_none(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 2 * BATCHES

    keep = best(tmp_path)
    fit([Pruning(0.7), keep, Stop()], enable_checkpointing=True, min_epochs=0)
    assert sparsities(tmp_path) == []
    assert keep.save_top_k == 1


def test_settings_are_given_back_after_an_exception(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power cut")

    keep, stop = best(tmp_path, save_top_k=2), EarlyStopping("val_acc_at_target", patience=5, mode="max")
    with pytest.raises(RuntimeError, match="power cut"):
        fit([Pruning(0.7), keep, stop, Fail()], enable_checkpointing=True)
    assert (keep.save_top_k, stop.patience, stop.check_finite) == (2, 5, True)


def test_early_stopping_has_patience_until_the_target_is_reached() -> None:
    stop = EarlyStopping("val_acc_at_target", patience=1, mode="max", min_delta=2.0)  # nothing is ever good enough
    loop = trainer([Pruning(0.7, end=Epochs(4)), stop], max_epochs=10)
    loop.fit(Tiny(), loader(), loader())
    # Epoch 4 is the first at target and sets the mark, epoch 5 is no better.
    assert loop.current_epoch == 5
    assert stop.patience == 1


def test_early_stopping_listed_before_pruning_is_refused() -> None:
    with pytest.raises(ValueError, match="EarlyStopping on 'val_acc_at_target' comes before Pruning"):
        fit([EarlyStopping("val_acc_at_target"), Pruning(0.7)])


def test_a_metric_measured_below_the_target_never_counts() -> None:
    class Note(Callback):
        seen: list[float]

        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            self.seen.append(float(trainer.callback_metrics.get("val_acc_at_target", math.nan)))

    note = Note()
    note.seen = []
    # Validated after epochs 2 and 4; the target is reached in epoch 3.
    pruning = Pruning(0.7, OneShot(), begin=Steps(2 * BATCHES + 3), end=1.0)
    fit([pruning, note], check_val_every_n_epoch=2)
    assert [math.isnan(value) for value in note.seen] == [True] * (EPOCHS - 1) + [False]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_a_training_resumed_at_target_goes_on_saving_and_stopping(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "now.ckpt")

    fit([Pruning(0.7, end=0.5), Save()])
    keep = best(tmp_path / "again", save_top_k=-1)
    stop = EarlyStopping("val_acc_at_target", patience=1, mode="max", min_delta=2.0)
    loop = trainer([Pruning(0.7, end=Steps(16)), keep, stop], max_epochs=20, enable_checkpointing=True)
    loop.fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "now.ckpt", weights_only=True)
    assert loop.current_epoch == EPOCHS + 2
    assert set(sparsities(tmp_path / "again")) == {TARGET}


def test_an_unmonitored_checkpoint_saves_all_along(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == BATCHES + 2:
                raise RuntimeError("power cut")

    latest = ModelCheckpoint(tmp_path, filename="last")
    with pytest.raises(RuntimeError, match="power cut"):
        fit([Pruning(0.7), best(tmp_path), latest, Stop()], enable_checkpointing=True)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
