"""A training that is interrupted and resumed ends bit for bit where it would have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_prune import (
    NM,
    Epochs,
    Filter,
    Iterative,
    LearningRateRewinding,
    Magnitude,
    OneShot,
    Pruning,
    Random,
    Steps,
    WeightRewinding,
)
from tests.contracts.tables import CRITERIA
from tests.support import BATCHES, EPOCHS, Tiny, fit, loader, sgd, share_of_zeros, trainer

# The checkpoints of these tests were written with a ModelCheckpoint, which resumed trainings do without.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


class Scheduled(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Manual(Tiny):
    """Two optimizers under manual optimization, the second steps on every other batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizers: Any = self.optimizers()
        first, second = optimizers
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [sgd(self.net[0].parameters()), adam(self.net[2].parameters())]


def prunings() -> list[Any]:
    by_criterion = [pytest.param(lambda c=c: Pruning(0.7, criterion=c), id=repr(c)) for c in CRITERIA]
    return [
        *by_criterion,
        pytest.param(lambda: Pruning(0.5, granularity=NM(2, 4), scope="local"), id="NM"),
        pytest.param(lambda: Pruning(0.5, granularity=Filter(), scope="local", initial=0.1), id="Filter"),
        pytest.param(lambda: Pruning(0.6, Iterative(3), rewind=WeightRewinding(Steps(1)), begin=Steps(2)), id="rewind"),
        pytest.param(lambda: Pruning(0.6, Iterative(3), rewind=LearningRateRewinding()), id="rewind-lr"),
        pytest.param(lambda: Pruning(0.6, criterion=Random(), regrow=True), id="regrow"),
    ]


def interrupted(
    build: Any, module: Any, tmp_path: Path, after: int, every: dict[str, int]
) -> tuple[Tiny, Pruning, Tiny, Pruning]:
    """The same training once straight through and once from the checkpoint written `after` so many steps."""
    keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **every)  # type: ignore[arg-type]
    straight, pruning = module(), build()
    trainer([pruning, keep], enable_checkpointing=True).fit(straight, loader(), loader())
    path = next(path for path in tmp_path.glob("*.ckpt") if f"step={after}." in path.name)
    again, resumed = module(seed=1), build()
    trainer([resumed]).fit(again, loader(), loader(), ckpt_path=path, weights_only=True)
    return straight, pruning, again, resumed


@pytest.mark.parametrize("build", prunings())
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resume_at_an_epochs_end(build: Any, epoch: int, tmp_path: Path) -> None:
    straight, pruning, again, resumed = interrupted(build, Scheduled, tmp_path, epoch * BATCHES, {"every_n_epochs": 1})
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in straight.state_dict().items())
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in pruning.masks.items())
    assert resumed.at_target
    assert resumed.updates == pruning.updates


@pytest.mark.parametrize("module", [Scheduled, Manual])
def test_resume_with_several_optimizers_and_callbacks(module: Any, tmp_path: Path) -> None:
    straight, pruning, again, resumed = interrupted(
        lambda: Pruning(0.7), module, tmp_path, (12 if module is Manual else 8) * 2, {"every_n_epochs": 1}
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in straight.state_dict().items())
    assert pruning.at_target
    assert resumed.at_target


def checkpoint(tmp_path: Path, *callbacks: Callback, epochs: int = EPOCHS) -> str:
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_epochs=2, save_top_k=-1)
    trainer([*callbacks, keep], enable_checkpointing=True, max_epochs=epochs).fit(Tiny(), loader(), loader())
    return str(tmp_path / "half.ckpt")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (Pruning(0.8), r"another plan of net\.0\.weight: 0 -> 0\.7, Unstructured\(\) then, 0 -> 0\.8"),
        (Pruning(0.7, initial=0.1), r"0 -> 0\.7.* then, 0\.1 -> 0\.7"),
        (Pruning(0.7, granularity=Filter()), r"Unstructured\(\) then, .*Filter\(\) now"),
        (Pruning(0.7, criterion=Magnitude(2)), r"another criterion: Magnitude\(p=1\.0\) then, Magnitude\(p=2\.0\) now"),
        (Pruning(0.7, OneShot()), r"another schedule: AGP\(power=3\.0\) then, OneShot\(\) now"),
        (Pruning(0.7, scope="local"), "another scope: global then, local now"),
        (Pruning({"net.0*": 0.7}), r"pruned by Pruning\[\*\], this training has \['Pruning\[net\.0\*\]'\]"),
    ],
)
def test_resume_with_a_changed_plan_is_refused(changed: Pruning, message: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Pruning(0.7), epochs=2)
    with pytest.raises(ValueError, match=message):
        trainer([changed]).fit(Tiny(), loader(), loader(), ckpt_path=path, weights_only=True)


def test_resume_with_another_way_of_retraining_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Pruning(0.7, Iterative(2)), epochs=2)
    changed = Pruning(0.7, Iterative(2), rewind=LearningRateRewinding())
    with pytest.raises(ValueError, match=r"another rewind: None then, LearningRateRewinding\(.*\) now"):
        trainer([changed]).fit(Tiny(), loader(), loader(), ckpt_path=path, weights_only=True)


def test_a_dense_training_can_be_continued_with_pruning(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, epochs=2)
    model = Tiny()
    trainer([Pruning(0.7)]).fit(model, loader(), loader(), ckpt_path=path, weights_only=True)
    assert share_of_zeros(model) == round(0.7 * 192) / 192


def test_the_same_callback_serves_a_second_fit() -> None:
    pruning = Pruning(0.7)
    first, second = Tiny(seed=0), Tiny(seed=5)
    fit([pruning], first)
    fit([pruning], second)
    fresh = fit([Pruning(0.7)], Tiny(seed=5))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert share_of_zeros(first) == share_of_zeros(second)


def test_one_trainer_goes_on_for_more_epochs() -> None:
    pruning = Pruning(0.7, end=Epochs(2))
    model = Tiny()
    loop = trainer([pruning], max_epochs=3)
    loop.fit(model, loader(), loader())
    masks = pruning.masks
    assert pruning.updates > 2
    updates = pruning.updates
    loop.fit_loop.max_epochs = 5
    loop.fit(model, loader(), loader())
    assert pruning.updates == updates  # masks were kept, not chosen anew
    assert all(torch.equal(mask, pruning.masks[name]) for name, mask in masks.items())
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_validating_a_checkpoint_does_not_disturb_the_next_fit(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Pruning(0.7), epochs=2)
    pruning, model = Pruning(0.7), Tiny()
    trainer([pruning]).validate(model, loader(), ckpt_path=path, verbose=False, weights_only=True)
    model = fit([pruning], Tiny(seed=5))
    fresh = fit([Pruning(0.7)], Tiny(seed=5))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_validating_a_checkpoint_needs_no_plan_of_its_own(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Pruning(0.7), epochs=2)
    loop = trainer([Pruning({"net.0*": 0.5})])
    loop.validate(Tiny(), loader(), ckpt_path=path, verbose=False, weights_only=True)


def test_checkpoint_loads_without_this_package_and_holds_plain_containers(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Pruning(0.7, Iterative(2), rewind=WeightRewinding()), EMAWeightAveraging(), epochs=2)
    stored = torch.load(path, weights_only=True)
    assert set(stored["state_dict"]) == set(Tiny().state_dict())
    Tiny().load_state_dict(stored["state_dict"])


class Stateful:
    """A loader that can be stopped in the middle of an epoch and continued."""

    def __init__(self) -> None:
        self.batches = list(loader())
        self.position = 0
        self.resumed = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        if not self.resumed:
            self.position = 0
        self.resumed = False
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.resumed = state["position"], True


@pytest.mark.parametrize("module", [Tiny, Manual])
def test_resume_in_mid_epoch(module: Any, tmp_path: Path) -> None:
    class SaveInTheMiddle(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    straight, pruning = module(), Pruning(0.7)
    trainer([pruning, SaveInTheMiddle()]).fit(straight, Stateful(), loader())
    again, resumed = module(seed=1), Pruning(0.7)
    path = tmp_path / "middle.ckpt"
    trainer([resumed]).fit(again, Stateful(), loader(), ckpt_path=path, weights_only=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in straight.state_dict().items())
    assert resumed.updates == pruning.updates


def test_a_longer_training_never_goes_back_in_sparsity(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Pruning(0.7), epochs=2)  # at target after 12 of 16 steps
    seen: list[float] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(share_of_zeros(pl_module))

    trainer([Pruning(0.7), Note()], max_epochs=8).fit(Tiny(), loader(), loader(), ckpt_path=path, weights_only=True)
    assert set(seen) == {round(0.7 * 192) / 192}


def test_a_checkpoint_of_another_plan_can_still_be_tested(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Pruning(0.7), epochs=2)
    other = trainer([Pruning({"net.0*": 0.5})])
    [metrics] = other.validate(Tiny(), loader(), ckpt_path=path, verbose=False, weights_only=True)
    assert metrics["val_loss"] > 0
