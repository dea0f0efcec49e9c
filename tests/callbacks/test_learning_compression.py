"""The LearningCompression callback: exact ends, validation of θ, checkpoints, resuming, company, and refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_prune import (
    NM,
    Block,
    Epochs,
    Filter,
    GradientMagnitude,
    Iterative,
    Magnitude,
    OneShot,
    Pruning,
    SparsityPlan,
    Steps,
    Unstructured,
    WeightRewinding,
)
from lightning_prune.callbacks.learning_compression import LearningCompression
from lightning_prune.cli import PruneCLI
from lightning_prune.criteria import Criterion, Evidence
from lightning_prune.zoo import MLP, Digits
from lightning_prune.zoo.classifier import Classifier
from tests.support import BATCHES, EPOCHS, Tiny, Watch, fit, loader, share_of_zeros, trainer
from tests.test_resume import Manual, Scheduled, Stateful

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

TARGET = round(0.7 * 192) / 192


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


class Validated(Callback):
    """Share of zeros in every validation, and in training right after."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.after: list[float] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 0:
            self.seen.append(share_of_zeros(pl_module))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.after.append(share_of_zeros(pl_module))


@pytest.mark.parametrize(
    ("granularity", "share"), [(Unstructured(), 0.7), (Filter(), 0.5), (NM(2, 4), 0.5), (Block(2, 2), 0.25)], ids=str
)
@pytest.mark.parametrize("end", [0.75, 1.0, Epochs(2)], ids=str)
def test_the_end_is_exact(granularity: Any, share: float, end: Any) -> None:
    callback, watch = LearningCompression(share, granularity=granularity, scope="local", end=end), Validated()
    model = fit([callback, watch])
    assert share_of_zeros(model) == (round(share * 128) + round(share * 64)) / 192
    assert set(watch.seen) == {share_of_zeros(model)}  # θ is what every validation sees
    settled = {0.75: 3, 1.0: 4}.get(end, 2)
    assert watch.after == [0.0] * settled + [share_of_zeros(model)] * (EPOCHS - settled)
    assert callback.compressor.settled
    for name, mask in callback.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_a_plan_with_granularities_of_its_own_and_scopes(tmp_path: Path) -> None:
    SparsityPlan({"net.0*": (0.25, Filter()), "net.2.weight": 0.5}).save(tmp_path / "plan.yaml")
    callback = LearningCompression(tmp_path / "plan.yaml", scope="local")
    model = fit([callback])
    assert int((model.net[0].weight == 0).all(dim=1).sum()) == 4
    assert share_of_zeros(model, "net.2.weight") == 0.5
    assert dict(callback.plan) == {"net.0.weight": 0.25, "net.2.weight": 0.5}


def test_rounds_follow_the_window() -> None:
    callback = LearningCompression(0.7, begin=Steps(4), end=Steps(20), every=Steps(4), growth=2.0)
    watch = Watch(lambda *_: (callback.compressor.rounds, callback.compressor.penalty, callback.compressor.settled))
    fit([callback, watch])
    for step, (rounds, penalty, settled) in enumerate(watch.seen, start=1):
        assert rounds == (0 if step < 4 else min((step - 4) // 4, 4) + 1)
        assert penalty == 1e-3 * 2.0 ** max(rounds - 1, 0)
        assert settled == (step >= 20)
    assert len(watch.seen) == BATCHES * EPOCHS


def test_thirty_rounds_unless_told_otherwise() -> None:
    callback = LearningCompression(0.7, end=Steps(60))
    fit([callback], max_epochs=8)
    assert callback.compressor.rounds == 31  # the first chooses where to begin


def test_gradient_accumulation_takes_rounds_after_real_steps_only() -> None:
    callback = LearningCompression(0.7, begin=Steps(1), end=Steps(7), every=Steps(1))
    watch = Watch(lambda loop, _: (loop.global_step, callback.compressor.rounds))
    fit([callback, watch], accumulate_grad_batches=3)
    assert all(rounds == min(step, 7) for step, rounds in watch.seen)


class Lowering(Tiny):
    """Its logged metric is a list of numbers, whatever it learns."""

    scores: tuple[float, ...] = (math.nan, 0.9, 0.2, 0.4, 0.5)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("score", self.scores[self.trainer.current_epoch])


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2), (None, 3)])
@pytest.mark.parametrize("end", [0.75, 1.0])
def test_the_best_network_is_kept(mode: Any, best: int, end: float) -> None:
    class Note(Callback):
        def __init__(self) -> None:
            self.validated: list[dict[str, Tensor]] = []

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
            if batch_idx == 0:
                self.validated.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    callback, note = LearningCompression(0.7, end=end, monitor="score" if mode else None, mode=mode), Note()
    model = fit([callback, note], Lowering())
    assert all(torch.equal(value, note.validated[best][name]) for name, value in model.state_dict().items())
    assert callback.best_score == (pytest.approx(Lowering.scores[best]) if mode else None)
    assert share_of_zeros(model) == TARGET
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in callback.masks.items())


def test_checkpoints_hold_the_compressed_weights(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss_at_target", mode="min", save_top_k=-1)
    callback = LearningCompression(0.7, begin=Epochs(1), end=Epochs(3), every=Steps(2))
    model = Tiny()
    loop = trainer([callback, keep], enable_checkpointing=True)
    loop.fit(model, loader(), loader())
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert [path.stem for path in paths] == ["epoch=0", "epoch=1", "epoch=2", "epoch=3"]  # the first round is at 8
    for path in paths:
        stored = torch.load(path, weights_only=True)
        assert set(stored["state_dict"]) == set(Tiny().state_dict())
        plain = Tiny()
        plain.load_state_dict(stored["state_dict"])
        assert share_of_zeros(plain) == TARGET
        [metrics] = trainer([]).validate(plain, loader(), verbose=False)
        score = stored["callbacks"][keep.state_key]["current_score"]
        assert metrics["val_loss"] == pytest.approx(float(score), rel=1e-6)  # of what was validated


def test_metrics_count_only_once_there_is_a_theta() -> None:
    seen: list[float] = []

    class Note(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics["val_loss_at_target"]))

    fit([LearningCompression(0.7, begin=Epochs(2), end=Epochs(3), every=Steps(4)), Note()])
    assert [math.isnan(value) for value in seen] == [True, False, False, False]


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"monitor": "val_loss", "mode": "min"}, {"granularity": Filter(), "scope": "local", "end": 1.0}]
)
def test_resume_is_bit_equal(epoch: int, options: Any, tmp_path: Path) -> None:
    def build() -> LearningCompression:
        return LearningCompression(0.5, every=Steps(3), growth=1.5, **options)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight, whole = Scheduled(), build()
    trainer([whole, keep], enable_checkpointing=True).fit(straight, loader(), loader())
    again, resumed = Scheduled(seed=1), build()
    path = tmp_path / f"epoch={epoch - 1}.ckpt"
    trainer([resumed]).fit(again, loader(), loader(), ckpt_path=path, weights_only=True)
    assert same(straight, again)
    assert resumed.compressor.rounds == whole.compressor.rounds
    assert resumed.compressor.penalty == whole.compressor.penalty
    assert resumed.best_score == whole.best_score


@pytest.mark.parametrize("module", [Tiny, Manual])
def test_resume_in_mid_epoch_and_mid_round(module: Any, tmp_path: Path) -> None:
    class SaveInTheMiddle(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    straight, whole = module(), LearningCompression(0.7, every=Steps(5))
    trainer([whole, SaveInTheMiddle()]).fit(straight, Stateful(), loader())
    again, resumed = module(seed=1), LearningCompression(0.7, every=Steps(5))
    path = tmp_path / "middle.ckpt"
    trainer([resumed]).fit(again, Stateful(), loader(), ckpt_path=path, weights_only=True)
    assert same(straight, again)
    assert resumed.compressor.rounds == whole.compressor.rounds
    with pytest.raises(ValueError, match=r"another growth: 1\.1 then, 1\.2 now"):
        trainer([LearningCompression(0.7, growth=1.2)]).fit(
            module(), Stateful(), loader(), ckpt_path=path, weights_only=True
        )
    with pytest.raises(ValueError, match=r"pruned by LearningCompression\[\*\], this training has .*\[net\.0\*\]"):
        trainer([LearningCompression({"net.0*": 0.7})]).fit(
            module(), Stateful(), loader(), ckpt_path=path, weights_only=True
        )


def test_a_checkpoint_written_while_theta_is_shown_has_the_weights_in_training(tmp_path: Path) -> None:
    class SaveInValidation(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "shown.ckpt")
                assert share_of_zeros(pl_module) == TARGET

    callback = LearningCompression(0.7)
    fit([callback, SaveInValidation()], enable_checkpointing=False)
    stored = torch.load(tmp_path / "shown.ckpt", weights_only=True)
    state = stored["callbacks"][callback.state_key]["compressor"]
    assert all(int((weight == 0).sum()) == 0 for weight in state["weights"].values())
    assert all(torch.equal(stored["state_dict"][name], theta) for name, theta in state["theta"].items())


def test_the_same_callback_serves_a_second_fit() -> None:
    callback = LearningCompression(0.7, monitor="val_loss", mode="min")
    first, second = Tiny(seed=0), Tiny(seed=5)
    fit([callback], first)
    fit([callback], second)
    assert same(second, fit([LearningCompression(0.7, monitor="val_loss", mode="min")], Tiny(seed=5)))
    assert share_of_zeros(first) == share_of_zeros(second) == TARGET


def test_one_trainer_goes_on_for_more_epochs() -> None:
    callback, model = LearningCompression(0.7, end=Epochs(2)), Tiny()
    loop = trainer([callback], max_epochs=3)
    loop.fit(model, loader(), loader())
    masks, rounds, before = callback.masks, callback.compressor.rounds, model.net[0].weight.detach().clone()
    loop.fit_loop.max_epochs = 5
    loop.fit(model, loader(), loader())
    assert callback.compressor.rounds == rounds
    assert all(torch.equal(mask, callback.masks[name]) for name, mask in masks.items())
    assert share_of_zeros(model) == TARGET
    assert not torch.equal(before, model.net[0].weight)


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_validation_gives_the_weights_back(hook: str, error: Any) -> None:
    class Fail(Callback):
        weights: Tensor

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.weights = pl_module.get_parameter("net.0.weight").detach().clone()

    def fail(*_: Any) -> None:
        raise error("power cut")

    before, model, callback = Fail(), Tiny(), LearningCompression(0.7)
    setattr(before, hook, fail)
    loop = trainer([before, callback])
    with pytest.raises((error, SystemExit)):
        loop.fit(model, loader(), loader())
    assert torch.equal(model.net[0].weight, before.weights)
    assert share_of_zeros(model) == 0.0
    assert not loop.optimizers or not loop.optimizers[0]._optimizer_step_post_hooks


def test_early_stopping_leaves_theta_and_says_so() -> None:
    stop = EarlyStopping("val_loss", patience=0, mode="max", min_delta=10.0)
    with pytest.warns(UserWarning, match=r"stopped after 16 steps, learning-compression ends after 24: .* apart"):
        model = fit([LearningCompression(0.7), stop])
    assert share_of_zeros(model) == TARGET
    with pytest.warns(UserWarning, match="begins after 24: nothing was pruned; train longer, or lower begin"):
        model = fit(
            [
                LearningCompression(0.7, begin=Epochs(3), end=Epochs(4)),
                EarlyStopping("val_loss", patience=0, min_delta=9),
            ]
        )
    assert share_of_zeros(model) == 0


def test_sanity_check_and_learning_rate_finder_leave_it_alone(tmp_path: Path) -> None:
    class Rated(Tiny):
        lr = 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    callback, watch = LearningCompression(0.7, begin=Steps(4), end=Steps(12), every=Steps(4)), Validated()
    rounds = Watch(lambda *_: callback.compressor.rounds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the finder's own remarks
        loop = trainer(
            [LearningRateFinder(num_training_steps=5), callback, watch, rounds],
            tmp_path,
            num_sanity_val_steps=2,
            enable_checkpointing=True,
        )
        loop.fit(Rated(), loader(), loader())
    assert rounds.seen[:13] == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 2
    assert watch.seen[0] == 0.0  # the sanity check


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    assert share_of_zeros(fit([LearningCompression(0.7)], precision=precision)) == TARGET


def test_the_pull_is_the_same_under_a_gradient_scaler() -> None:
    """Fused optimizers unscale gradients themselves, so theirs are still scaled when the penalty joins them."""

    def weights(fused: bool, scale: float | None) -> Tensor:
        class Quiet(Tiny):
            def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
                return 1e-3 * super().training_step(batch, batch_idx).float()

        model = Quiet(lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-3, fused=fused))
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale)) if scale else None
        options: dict[str, Any] = {"plugins": [scaler]} if scaler else {}
        fit([LearningCompression(0.7, end=1.0, every=Steps(8), penalty=0.1)], model, max_epochs=2, **options)
        weight: Tensor = model.net[0].weight
        return weight.detach()

    plain = weights(False, None)
    for fused in (False, True):
        torch.testing.assert_close(weights(fused, 1024.0), plain, rtol=0, atol=2e-3)


def test_company_and_combinations_that_are_refused() -> None:
    def refused(message: str, *others: Callback, plan: Any = 0.7) -> None:
        with pytest.raises(ValueError, match=message):
            fit(
                [LearningCompression(plan), *others],
                enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
            )

    refused(r"both Pruning and LearningCompression prune 'net\.0\.weight' \(2 such\)", Pruning(0.5))
    refused(r"both .* prune 'net\.2\.weight' \(1 such\)", Pruning({"net.2*": 0.5}))
    refused("two LearningCompression callbacks", LearningCompression({"net.2*": 0.5}), plan={"net.0*": 0.5})
    refused("EMAWeightAveraging would average the dense weights", EMAWeightAveraging())
    refused("StochasticWeightAveraging would average", StochasticWeightAveraging(swa_lrs=0.1))
    refused(r"ModelCheckpoint\(save_weights_only=True\) asks no callback", ModelCheckpoint(save_weights_only=True))
    rewinding = Pruning({"net.2*": 0.5}, Iterative(2), rewind=WeightRewinding())
    refused(r"Pruning\(rewind=WeightRewinding\(.*\) takes the whole network back", rewinding, plan={"net.0*": 0.5})
    loop = trainer([])
    loop._accelerator_connector.strategy = FSDPStrategy(accelerator=None)
    with pytest.raises(ValueError, match="FSDPStrategy shards them"):
        LearningCompression(0.7).setup(loop, Tiny(), "fit")


def test_beside_pruning_of_other_layers() -> None:
    callback = LearningCompression({"net.0*": 0.7}, monitor="val_loss", mode="min")
    model = fit([Pruning({"net.2*": 0.5}), callback])
    assert share_of_zeros(model, "net.0.weight") == round(0.7 * 128) / 128
    assert share_of_zeros(model, "net.2.weight") == 0.5
    assert callback.best_score is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, r"penalty is where mu starts, above 0 and finite, got penalty=-1\.0"),
        ({"growth": 0.9}, r"at least 1 and finite, got growth=0\.9"),
        ({"max_penalty": 1e-9}, "max_penalty bounds mu from above"),
        ({"begin": 0.6, "end": 0.5}, r"needs begin < end, got begin=0\.6, end=0\.5"),
        ({"begin": 1.5}, r"begin is a share of training in \[0, 1\]"),
        ({"every": -0.1}, "every is a share of training"),
        ({"criterion": GradientMagnitude()}, "cannot see a gradient"),
        ({"criterion": Magnitude}, "criterion is an object such as"),
        ({"granularity": 0.5}, "granularity is an object such as"),
        ({"scope": "layer"}, "scope is 'global', 'local'"),
        ({"monitor": "val_acc"}, "monitor and mode go together, got monitor='val_acc', mode=None"),
        ({"mode": "max"}, "monitor and mode go together, got monitor=None"),
        ({"monitor": "val_acc", "mode": "up"}, "monitor and mode go together.*'up'"),
        ({"sparsity": 1.5}, r"in \[0, 1\], got 1\.5"),
    ],
)
def test_arguments_that_cannot_work(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningCompression(**{"sparsity": 0.5, **options})


def test_what_only_the_training_can_tell() -> None:
    with pytest.raises(ValueError, match=r"monitors 'val_accuracy', which validation did not log; .*'val_acc'"):
        fit([LearningCompression(0.7, monitor="val_accuracy", mode="max")])
    with pytest.raises(ValueError, match="monitor='val_acc' needs validation"):
        fit([LearningCompression(0.7, monitor="val_acc", mode="max")], limit_val_batches=0)
    with pytest.raises(ValueError, match="closest"):
        fit([LearningCompression({"net.9*": 0.7})])
    with pytest.raises(ValueError, match="training lasts 32"):
        fit([LearningCompression(0.7, end=Steps(33))])
    with pytest.raises(RuntimeError, match=r"once Trainer\.fit has started"):
        LearningCompression(0.7).compressor  # noqa: B018
    fresh = LearningCompression(0.7)
    assert (fresh.masks, fresh.state_dict(), fresh.best_score, fresh.at_target) == ({}, {}, None, False)


def test_optimizers_that_step_past_lightning_are_noticed() -> None:
    class Raw(Manual):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
                optimizer.step()
            return loss

    with pytest.warns(UserWarning, match="no gradient of any compressed weight was seen in a whole round"):
        model = fit([LearningCompression(0.7)], Raw())
    assert share_of_zeros(model) == TARGET


def test_fast_dev_run_goes_through_everything() -> None:
    model = fit([LearningCompression(0.7, begin=Epochs(1), end=Epochs(3))], fast_dev_run=2)
    assert share_of_zeros(model) == TARGET


def test_from_yaml(tmp_path: Path) -> None:
    options = {
        "sparsity": {"*": 0.5, "network.layers.0*": {"sparsity": 0.75, "granularity": {"class_path": "Filter"}}},
        "criterion": {"class_path": "Magnitude", "init_args": {"p": 1.0}},
        "end": {"class_path": "Epochs", "init_args": {"n": 3}},
        "every": 0.1,
        "penalty": 0.01,
        "monitor": "val_acc",
        "mode": "max",
    }
    path = tmp_path / "lc.yaml"
    where = "lightning_prune.callbacks.learning_compression.LearningCompression"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": where, "init_args": options}]}}))
    configs = [f"--config={Path(__file__).parents[2] / 'configs' / 'digits.yaml'}", f"--config={path}"]
    cli = PruneCLI([*configs, "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
    [callback] = [each for each in vars(cli.trainer)["callbacks"] if isinstance(each, LearningCompression)]
    assert callback.target.granularity("network.layers.0*") == Filter()
    assert (callback.criterion, callback.end, callback.every) == (Magnitude(1.0), Epochs(3), 0.1)
    assert (callback.penalty, callback.monitor, callback.mode) == (0.01, "val_acc", "max")


def test_digits_recover() -> None:
    """At 95 % the network is as good as the dense one within 2 points, and as one-shot with as much fine-tuning."""

    def network() -> Classifier:
        return Classifier(MLP([64, 300, 100, 10]), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))

    def accuracy(model: Classifier, epochs: int, *callbacks: Callback) -> float:
        seed_everything(0, verbose=False)
        data = Digits()
        trainer(list(callbacks), max_epochs=epochs).fit(model, data)
        [metrics] = trainer([]).test(model, data, verbose=False)
        return float(metrics["test_acc"])

    seed_everything(0, verbose=False)
    dense, compressed, one_shot = network(), network(), network()
    before = accuracy(dense, 6)
    for model in (compressed, one_shot):
        model.load_state_dict(dense.state_dict())
    after = accuracy(compressed, 8, LearningCompression(0.95))
    beside = accuracy(one_shot, 8, Pruning(0.95, OneShot()))
    total = sum(p.numel() for p in compressed.parameters() if p.ndim > 1)
    assert sum(int((p == 0).sum()) for p in compressed.parameters() if p.ndim > 1) == round(0.95 * total)
    assert after >= before - 0.02
    assert after >= beside - 0.01


@dataclass(frozen=True)
class Unseeded(Criterion):
    """What a user might write: other scores on every rank."""

    def score(self, evidence: Evidence) -> Tensor:
        return torch.rand_like(evidence.weight)


class OwnScore(Lowering):
    """Ranks disagree about which epoch was the best."""

    scores = (0.2, 0.9)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("score", self.scores[self.trainer.current_epoch] * (1 - 2 * self.trainer.global_rank), sync_dist=False)


def rank(folder: Path) -> None:
    """One of two processes."""
    callback = LearningCompression(0.7, criterion=Unseeded(), monitor="score", mode="max", end=1.0)
    model = OwnScore()
    loop = trainer([callback], folder, devices=2, strategy="ddp", max_epochs=2)
    torch.manual_seed(100 + loop.global_rank)
    loop.fit(model, loader(), loader())
    torch.save({"masks": callback.masks, "weights": model.state_dict()}, folder / f"{loop.global_rank}.pt")


def test_ranks_agree(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.callbacks.test_learning_compression", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    for kind in ("masks", "weights"):
        assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())
    assert sum(int((~mask).sum()) for mask in first["masks"].values()) == round(0.7 * 192)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
