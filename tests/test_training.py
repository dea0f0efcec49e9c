"""Pruning beside everything else that a Trainer may do."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_prune import Epochs, GradientMagnitude, Linear, Movement, OneShot, Pruning, Steps
from lightning_prune.enforcement import ZERO_PRESERVING, Enforcer
from tests.support import BATCHES, EPOCHS, Tiny, Watch, fit, loader, sgd, share_of_zeros, trainer
from tests.test_resume import Manual

TARGET = round(0.7 * 192) / 192


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


class Noisy(torch.optim.SGD):
    """An optimizer that leaves no zero at zero."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3 * torch.randn_like(parameter))
        return loss


class Lookahead(torch.optim.SGD):
    """Every fifth step weights go half way back to where they were five steps ago."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    slow = state.setdefault("slow", parameter.clone())
                    if state["count"] % 5 == 0:
                        parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


OPTIMIZERS = [
    *(lambda p, kind=kind: kind(p, lr=0.01, weight_decay=0.01) for kind in sorted(ZERO_PRESERVING, key=str)),
    sgd,
    lbfgs,
    lambda p: Noisy(p, lr=0.05),
    lambda p: Lookahead(p, lr=0.05),
    lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=0.01),
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, maximize=True),
    lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True),
    lambda p: torch.optim.Adam(p, fused=True),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_removed_weights_stay_zero_under_any_optimizer(optimizer: Any) -> None:
    pruning = Pruning(0.7, end=0.5)
    watch = Watch(
        lambda _, module: sum(
            int(module.get_parameter(name)[~mask].count_nonzero()) for name, mask in pruning.masks.items()
        )
    )
    model = fit([pruning, watch], Tiny(optimizer))
    assert watch.seen == [0] * BATCHES * EPOCHS
    assert share_of_zeros(model) == TARGET
    for kept in pruning.masks.values():
        assert kept.any()


@pytest.mark.parametrize("kind", sorted(ZERO_PRESERVING, key=str))
def test_zero_preserving_optimizers_need_masked_gradients_only(kind: Any) -> None:
    weight = nn.Parameter(torch.randn(50))
    mask = torch.rand(50) > 0.5
    optimizer = kind([weight], lr=0.1, weight_decay=0.1)
    enforcer = Enforcer({"weight": weight})
    enforcer.set({"weight": mask})
    for _ in range(20):
        weight.grad = torch.randn(50)
        enforcer.mask_gradients(optimizer)
        optimizer.step()
        assert not weight[~mask].any()
        assert weight[mask].all()


def test_equals_torchs_own_masking_bit_for_bit() -> None:
    """torch.nn.utils.prune multiplies inside the forward pass: the same training by other means."""
    ours, theirs = Tiny(), Tiny()
    pruning = Pruning(0.7, OneShot())
    scores = torch.cat([ours.net[i].weight.detach().abs().flatten() for i in (0, 2)])
    threshold = scores.kthvalue(round(0.7 * 192)).values
    for i in (0, 2):
        torch.nn.utils.prune.custom_from_mask(theirs.net[i], "weight", theirs.net[i].weight.abs() > threshold)
    fit([pruning], ours)
    fit([], theirs)
    for i in (0, 2):
        assert torch.equal(ours.net[i].weight, theirs.net[i].weight_orig * theirs.net[i].weight_mask)
        assert torch.equal(ours.net[i].bias, theirs.net[i].bias)


def test_optimizer_state_of_removed_weights_is_cleared() -> None:
    pruning = Pruning(0.7)
    loop = trainer([pruning])
    model = Tiny()
    loop.fit(model, loader(), loader())
    for name, mask in pruning.masks.items():
        momentum = loop.optimizers[0].state[model.get_parameter(name)]["momentum_buffer"]
        assert not momentum[~mask].any()
        assert momentum[mask].any()


@pytest.mark.parametrize("batches", [2, 3])
def test_gradient_accumulation_prunes_after_real_steps_only(batches: int) -> None:
    watch = Watch(lambda loop, module: (loop.global_step, share_of_zeros(module)))
    fit([Pruning(0.5, Linear(), begin=Steps(1), end=Steps(7)), watch], accumulate_grad_batches=batches)
    for step, seen in watch.seen:
        assert seen == round(0.5 * min(max(step - 1, 0) / 6, 1) * 192) / 192


def test_accumulation_that_changes_over_epochs() -> None:
    schedule = GradientAccumulationScheduler({0: 1, 1: 4})
    watch = Watch(lambda _, module: share_of_zeros(module))
    fit([schedule, Pruning(0.5, Linear(), begin=Epochs(1), end=Epochs(3)), watch])
    assert watch.seen[2 * BATCHES - 2] == 0
    assert watch.seen[2 * BATCHES - 1] == 0.25
    assert watch.seen[3 * BATCHES - 1] == 0.5
    with pytest.raises(ValueError, match="share of training"):
        fit([GradientAccumulationScheduler({0: 1, 1: 4}), Pruning(0.5)])


def test_manual_optimization_with_several_optimizers() -> None:
    pruning = Pruning(0.7)
    watch = Watch(lambda _, module: share_of_zeros(module))
    model = fit([pruning, watch], Manual())
    assert share_of_zeros(model) == TARGET
    assert watch.seen[23] == TARGET > watch.seen[15]


def test_manual_optimization_past_lightning() -> None:
    """Optimizers called directly tell no callback before they step, so weights are masked afterwards."""

    class Raw(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
                optimizer.step()
            return loss

    pruning = Pruning(0.7, end=0.5)
    watch = Watch(lambda _, m: sum(int(m.get_parameter(n)[~k].count_nonzero()) for n, k in pruning.masks.items()))
    model = fit([pruning, watch], Raw())
    assert set(watch.seen) == {0}
    assert share_of_zeros(model) == TARGET


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    assert share_of_zeros(fit([Pruning(0.7)], precision=precision)) == TARGET


def test_steps_that_the_gradient_scaler_skips() -> None:
    class Overflow(Tiny):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx % 4 == 1 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    weights = Watch(lambda _, module: module.get_parameter("net.0.weight").detach().clone())
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    model = fit([Pruning(0.7, begin=Steps(2), end=0.5), weights], Overflow(), plugins=[plugin])
    assert torch.equal(weights.seen[0], weights.seen[1])  # the second step was skipped
    assert share_of_zeros(model) == TARGET
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_gradient_clipping_ignores_removed_weights() -> None:
    norms: list[float] = []

    class Clipped(Tiny):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()))
            kept = [p.grad[p != 0].norm() for p in self.parameters() if p.grad is not None]
            assert norms[-1] == pytest.approx(float(torch.stack(kept).norm()), rel=1e-6)

    fit([Pruning(0.7, OneShot())], Clipped(), gradient_clip_val=1.0)
    assert len(norms) == BATCHES * EPOCHS


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about the machine, differently on every one
def test_compiled_modules_keep_plain_names() -> None:
    model = Tiny()
    model.net = torch.compile(model.net, backend="eager")
    pruning = Pruning({"net.0.weight": 0.5, "net.2.weight": 0.25})
    fit([pruning], model)
    assert list(pruning.plan) == ["net.0.weight", "net.2.weight"]
    assert [int((~mask).sum()) for mask in pruning.masks.values()] == [64, 16]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_lightning_module() -> None:
    model = Tiny()
    trainer([Pruning(0.7)]).fit(torch.compile(model, backend="eager"), loader(), loader())  # type: ignore[arg-type]
    assert share_of_zeros(model) == TARGET


class OwnAveraging(Callback):
    """Somebody else's weight averaging: a copy of the model that is written back at the end."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.average = copy.deepcopy(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), pl_module.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.average.state_dict())


AVERAGES = [
    lambda: EMAWeightAveraging(decay=0.9),
    lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.5), use_buffers=False),
    lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5, annealing_epochs=1),
    OwnAveraging,
]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
def test_weight_averages_end_at_the_target(average: Any, first: bool, tmp_path: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    pruning, averaging = Pruning(0.7), average()
    keep = ModelCheckpoint(tmp_path, filename="last", save_last=True)
    callbacks = [averaging, pruning, keep] if first else [pruning, averaging, keep]
    model = fit(callbacks, enable_checkpointing=True)
    assert share_of_zeros(model) == TARGET
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    zeros = sum(int((stored[name] == 0).sum()) for name in pruning.masks)
    assert zeros / 192 == TARGET


def test_finders_and_sanity_check_leave_masks_alone(tmp_path: Any) -> None:
    class Loaded(Tiny):
        batch_size = 8
        lr = 0.05

        def train_dataloader(self) -> Any:
            return loader(self.batch_size, 64 // self.batch_size)

        def val_dataloader(self) -> Any:
            return loader()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    watch = Watch(lambda _, module: share_of_zeros(module))
    pruning = Pruning(0.5, Linear(), begin=0.25, end=0.75)
    finders: list[Callback] = [
        LearningRateFinder(num_training_steps=5),
        BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=2),
    ]
    model = Loaded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the finders' own remarks
        loop = trainer([*finders, pruning, watch], tmp_path, num_sanity_val_steps=2, enable_checkpointing=True)
        loop.fit(model)
    steps = len(watch.seen)
    assert steps == 4 * 64 // model.batch_size
    assert watch.seen[steps // 4 - 1] == 0
    assert watch.seen[steps * 3 // 4 - 2] < watch.seen[steps * 3 // 4 - 1] == 0.5
    assert pruning.at_target


def test_interrupt_lets_go_of_the_optimizers() -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            raise RuntimeError("power cut")

    pruning = Pruning(0.7, OneShot())
    model = Tiny()
    loop = trainer([pruning, Interrupt()])
    with pytest.raises(RuntimeError, match="power cut"):
        loop.fit(model, loader(), loader())
    assert not loop.optimizers[0]._optimizer_step_post_hooks
    assert share_of_zeros(model) == TARGET


def test_sharding_strategies_are_refused() -> None:
    loop = trainer([])
    pruning = Pruning(0.7)
    loop.strategy_connector = None  # type: ignore[attr-defined]
    loop._accelerator_connector.strategy = FSDPStrategy(accelerator=None)
    with pytest.raises(ValueError, match="FSDPStrategy shards them"):
        pruning.setup(loop, Tiny(), "fit")


def test_gradients_changed_after_masking_revive_nothing() -> None:
    class Noisy(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad += torch.randn_like(parameter)

    class NoisyCallback(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            Noisy.on_before_optimizer_step(pl_module, optimizer)

    class Clipping(Tiny):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            Noisy.on_before_optimizer_step(self, optimizer)  # type: ignore[arg-type]

    for model, more in ((Noisy(), []), (Tiny(), [NoisyCallback()]), (Clipping(), [])):
        seen = Watch(lambda _, module: share_of_zeros(module))
        fit([Pruning(0.7, OneShot()), *more, seen], model)
        assert set(seen.seen) == {TARGET}


def test_other_peoples_copies_of_the_model_are_left_alone() -> None:
    class Teacher(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.teacher = copy.deepcopy(pl_module)

    teacher = Teacher()
    fit([teacher, Pruning(0.7)])
    assert share_of_zeros(teacher.teacher) == 0.0


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_with_batchnorm_reaches_the_target(first: bool) -> None:
    """It adds an epoch in which only statistics are learned."""
    pruning = Pruning(0.7, end=1.0)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5, annealing_epochs=1)
    model = Tiny()
    model.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    fit([averaging, pruning] if first else [pruning, averaging], model)
    assert pruning.at_target
    assert share_of_zeros(model, "net.0.weight", "net.3.weight") == TARGET


@pytest.mark.parametrize("criterion", [GradientMagnitude(), Movement()])
def test_gradients_that_overflow_are_no_evidence(criterion: Any) -> None:
    class Overflow(Tiny):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx % 4 == 1 else loss

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    model = fit([Pruning(0.7, criterion=criterion, end=0.5)], Overflow(), plugins=[plugin])
    assert share_of_zeros(model) == TARGET


def test_a_gradient_criterion_where_an_optimizer_steps_now_and_then() -> None:
    model = fit([Pruning(0.7, criterion=GradientMagnitude(), begin=Steps(4), every=Steps(1))], Manual())
    assert share_of_zeros(model) == TARGET


def test_manual_optimization_with_max_steps() -> None:
    # Lightning counts 12 steps of both optimizers an epoch of 8 batches; 24 are reached after 16 batches.
    pruning = Pruning(0.7, Linear(), end=0.5)
    seen = Watch(lambda _, module: share_of_zeros(module))
    fit([pruning, seen], Manual(), max_steps=24)
    assert seen.seen[4] < seen.seen[5] == TARGET
