"""The QuantizedEvaluation callback: the twin's metrics are right, and training does not notice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_prune import Percentile, Pruning, Steps, quantize
from lightning_prune.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_prune.callbacks.quantized_evaluation import QuantizedEvaluation
from lightning_prune.cli import PruneCLI
from tests.support import BATCHES, EPOCHS, Tiny, fit, loader, share_of_zeros, trainer


class Rich(Tiny):
    """BatchNorm and dropout; logs by every road there is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4, bias=False)
        )
        self.accuracy = MulticlassAccuracy(4, average="micro")
        scores = {"f1": MulticlassF1Score(4), "acc": MulticlassAccuracy(4)}
        self.scores = MetricCollection(scores, prefix="val_")  # type: ignore[arg-type]
        self.gathered: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        self.accuracy(logits, y)
        self.scores.update(logits, y)
        self.log("val_micro", self.accuracy)
        self.log_dict(self.scores)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.gathered.append(logits)
        x.zero_()  # in place, as some do
        return logits

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_peak", outputs.max(), reduce_fx="max")

    def on_validation_epoch_end(self) -> None:
        self.log("val_spread", torch.cat(self.gathered).std())
        self.gathered.clear()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


METRICS = ("val_micro", "val_f1", "val_acc", "val_loss", "val_peak", "val_spread")


def clones() -> list[Any]:
    """Batches of several sizes: averages must be over examples."""
    return [tuple(t[: 8 - 3 * (i % 2)].clone() for t in batch) for i, batch in enumerate(loader())]


def batches() -> DataLoader[Any]:
    return DataLoader(clones(), batch_size=None)  # type: ignore[arg-type]


def reference(model: Rich, calibration: list[Any], **settings: Any) -> dict[str, float]:
    """What Lightning says of the twin itself."""
    twin = quantize(model, calibration, **settings)
    [metrics] = trainer([]).validate(twin, batches(), verbose=False)  # type: ignore[arg-type]
    return {name: metrics[name] for name in METRICS}


def trained() -> Rich:
    return fit([], Rich(), max_epochs=2)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_metrics_are_those_of_the_twin() -> None:
    model = trained()
    callbacks = [
        QuantizedEvaluation(calibration_batches=3),
        QuantizedEvaluation(4, "symmetric", per_channel=False),
        QuantizedEvaluation({"net.0": 3}, ranges=Percentile(0.9), name="low", calibration_batches=99),
    ]
    [metrics] = trainer(list(callbacks)).validate(model, batches(), verbose=False)
    dense = reference(model, clones(), bits=16)
    for end, expected in (
        ("int8", reference(model, clones()[:3])),
        ("int4_symmetric", reference(model, clones()[:1], bits=4, scheme="symmetric", per_channel=False)),
        ("low", reference(model, clones(), bits={"net.0": 3}, ranges=Percentile(0.9))),
    ):
        assert expected["val_loss"] != dense["val_loss"]
        for name in METRICS:
            assert metrics[f"{name}_{end}"] == pytest.approx(expected[name], rel=1e-6)
            assert metrics[f"{name}_{end}_drop"] == pytest.approx(metrics[name] - expected[name], abs=1e-6)
            assert metrics[name] == pytest.approx(dense[name], rel=2e-2)  # not disturbed
    assert len(metrics) == len(METRICS) * 7
    assert not {"log", "on_validation_epoch_end", "forward"} & vars(model).keys()


def test_every_setting_reaches_the_twin() -> None:
    every: list[dict[str, Any]] = [
        {"bits": 16},
        {"bits": 3, "exclude": "net.0"},
        {"bits": 2, "first_bits": 8, "last_bits": 16},
        {"bits": {"net.0": 3, "*": 5}, "activation_bits": 2, "weight_scheme": "symmetric", "outputs": True},
        {"bits": 3, "weight_ranges": Percentile(0.8), "ranges": Percentile(0.7), "per_channel": False},
    ]
    model = trained()
    callbacks: list[Callback] = [QuantizedEvaluation(**each, name=f"q{i}") for i, each in enumerate(every)]
    [metrics] = trainer(callbacks).validate(model, loader(), verbose=False)
    losses = []
    for i, each in enumerate(every):
        [expected] = trainer([]).validate(quantize(model, list(loader())[:1], **each), loader(), verbose=False)  # type: ignore[arg-type]
        assert metrics[f"val_loss_q{i}"] == pytest.approx(expected["val_loss"], rel=1e-6)
        losses.append(expected["val_loss"])
    assert len(set(losses)) == len(every)


class Generators(Callback):
    """All that is random, after each validation."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_does_not_notice(precision: Any) -> None:
    ends = []
    for callbacks in ([], [QuantizedEvaluation(), QuantizedEvaluation(4, every=2)]):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
        watch, model = Generators(), Rich()
        loop = trainer([*callbacks, watch, Pruning(0.5)], precision=precision, num_sanity_val_steps=2, max_epochs=2)
        torch.manual_seed(3)
        loop.fit(model, loader(), batches())
        optimizer: Any = loop.optimizers[0]
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        ends.append((model.state_dict(), momenta, watch.seen, dict(loop.callback_metrics)))
    (weights, momenta, seen, metrics), (weights_, momenta_, seen_, metrics_) = ends
    assert all(torch.equal(value, weights_[name]) for name, value in weights.items())
    assert all(torch.equal(value, other) for value, other in zip(momenta, momenta_, strict=True))
    assert seen == seen_
    assert all(torch.equal(value, metrics_[name]) for name, value in metrics.items())
    assert {f"{name}_int8" for name in METRICS} <= metrics_.keys()
    assert {f"{name}_int4_drop_at_target" for name in METRICS} <= metrics_.keys()
    assert metrics_["val_loss_int4"] != metrics_["val_loss_int8"] != metrics_["val_loss"]


class Note(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append((trainer.callback_metrics.get("val_loss_int8"), share_of_zeros(pl_module)))


def test_ranges_are_of_the_first_training_batches_and_the_network_is_the_one_validated() -> None:
    class Twin(Callback):
        """The same by hand, of averaged weights; the callback is listed before them."""

        losses: list[float]

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
            if batch_idx == 0 and not trainer.sanity_checking:
                twin = quantize(pl_module, list(loader())[:1])
                losses = [nn.functional.cross_entropy(twin(x), y).item() for x, y in loader()]
                self.losses.append(sum(losses) / len(losses))

    hand, note, model = Twin(), Note(), Tiny()
    hand.losses = []
    callbacks = [QuantizedEvaluation(), EMAWeightAveraging(decay=0.9), Pruning(0.7, end=0.5), hand, note]
    loop = trainer([*callbacks, QuantizedEvaluation(exclude="net.2", name="partly")])
    loop.fit(model, loader(), loader())
    assert [float(loss) for loss, _ in note.seen] == pytest.approx(hand.losses, rel=1e-6)
    assert len(hand.losses) == EPOCHS
    assert share_of_zeros(model) == round(0.7 * 192) / 192
    before = float(loop.callback_metrics["val_loss_int8"])
    [metrics] = loop.validate(model, loader(), verbose=False)  # after fit, still with batches of training
    assert metrics["val_loss_int8"] == pytest.approx(before, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_every_nth_validation_also_after_resuming(tmp_path: Path) -> None:
    class Builds(Note):
        def on_validation_batch_end(self, *args: Any) -> None:
            if args[4] == 0:
                self.seen.append(callback._pass is not None)

        def on_validation_end(self, *_: Any) -> None:
            pass

    callback, builds = QuantizedEvaluation(every=3), Builds()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer([callback, builds, keep], enable_checkpointing=True).fit(Tiny(), loader(), loader())
    assert builds.seen == [True, False, False, True]
    callback, builds = QuantizedEvaluation(every=3), Builds()
    path = tmp_path / "epoch=1.ckpt"
    loop = trainer([callback, builds], max_epochs=5)
    loop.fit(Tiny(), loader(), loader(), ckpt_path=path, weights_only=True)
    assert builds.seen == [False, True, False]


def test_checkpoints_and_early_stopping_monitor_it(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="best", monitor="val_acc_int4", mode="max")
    stop = EarlyStopping("val_acc_int4_drop", mode="max", patience=1, stopping_threshold=-10.0)
    note = Note()
    trainer([stop, QuantizedEvaluation(4), keep, note], enable_checkpointing=True, max_epochs=9).fit(
        Tiny(), loader(), loader()
    )
    assert stop.stopped_epoch == 0
    assert len(note.seen) == 1
    stored = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == set(Tiny().state_dict())
    assert 0.0 <= float(stored["callbacks"][keep.state_key]["best_model_score"]) <= 1.0


class Two(Tiny):
    """Two loaders; no forward of its own; batches that are mappings."""

    forward: Any = LightningModule.forward

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
        self.log("loss", nn.functional.cross_entropy(self.net(batch["x"]), batch["y"]), on_step=dataloader_idx == 0)

    test_step = validation_step


def test_several_loaders_a_step_without_forward_and_test() -> None:
    def entries(count: int) -> DataLoader[Any]:
        found = [{"x": x, "y": y} for x, y in list(loader())[:count]]
        return DataLoader(found, batch_size=None)  # type: ignore[arg-type]

    model = Two()
    loop = trainer([QuantizedEvaluation(5, calibration_batches=3)])
    first, second = loop.test(model, [entries(2), entries(4)], verbose=False)
    twin = quantize(model.net, [x for x, _ in list(loader())[:2]], 5)
    for number, (count, metrics) in enumerate(((2, first), (4, second))):
        losses = [nn.functional.cross_entropy(twin(x), y).item() for x, y in list(loader())[:count]]
        expected = sum(losses) / count
        name = "_epoch" if number == 0 else ""
        assert metrics[f"loss_int5{name}/dataloader_idx_{number}"] == pytest.approx(expected, rel=1e-5)
        drop = loop.callback_metrics[f"loss_int5_drop/dataloader_idx_{number}"]
        assert float(drop) == pytest.approx(metrics[f"loss{name}/dataloader_idx_{number}"] - expected, abs=1e-6)


def test_a_forward_of_ones_own_and_one_that_fails() -> None:
    seen: list[Any] = []

    def run(model: Any, batch: Any) -> Any:
        seen.append(batch)
        return model.net(batch[0])

    trainer([QuantizedEvaluation(forward=run, calibration_batches=1)]).validate(Tiny(), loader(), verbose=False)
    assert len(seen) == 1
    rows = DataLoader(TensorDataset(torch.ones(8, 5)), batch_size=4)

    class Odd(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", batch[0].sum())

    model = Odd()
    message = r"Odd did not run on a batch for calibration: RuntimeError: .*QuantizedEvaluation\(forward=\.\.\.\)"
    with pytest.raises(ValueError, match=message):
        trainer([QuantizedEvaluation()]).validate(model, rows, verbose=False)
    assert not {"log", "on_validation_epoch_end"} & vars(model).keys()


def test_an_error_leaves_the_module_as_it_was() -> None:
    class Fail(Callback):
        def on_validation_epoch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    model = Tiny()
    with pytest.raises(RuntimeError, match="stop"):
        trainer([QuantizedEvaluation(), QuantizedEvaluation(4), Fail()]).validate(model, loader(), verbose=False)
    assert not {"log", "on_validation_epoch_end"} & vars(model).keys()


def test_layers_left_out_are_told_of_once() -> None:
    class Spare(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.warns(UserWarning, match="stay in floating point: spare") as caught:
        fit([QuantizedEvaluation()], Spare(), max_epochs=3)
    assert sum("floating point" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits is a width of 2 to 8, or 16, got bits=9"),
        ({"scheme": "odd"}, "scheme is one of"),
        ({"every": 0}, "every is a whole number from 1 up, got every=0"),
        ({"calibration_batches": 1.5}, "calibration_batches is a whole number from 1 up"),
        ({"name": "a/b"}, "letters, digits and _, got name='a/b'"),
        ({"name": ""}, "letters, digits and _, got name=''"),
    ],
)
def test_settings_that_make_no_sense(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedEvaluation(**options)


def test_what_is_refused_before_work_starts() -> None:
    with pytest.raises(ValueError, match="two QuantizedEvaluation callbacks would both log metrics that end in _int8;"):
        fit([QuantizedEvaluation(), QuantizedEvaluation(per_channel=False)])
    with pytest.raises(ValueError, match=r"exclude names 'net\.9'.*closest: 'net\.2', 'net\.0'"):
        fit([QuantizedEvaluation(exclude="net.9")])

    class Iterating(Tiny):
        def validation_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
            next(dataloader_iter)

    with (
        pytest.warns(UserWarning, match="dataloader_iter"),
        pytest.raises(ValueError, match=r"Iterating\.validation_step takes its batches from the loader itself"),
    ):
        trainer([QuantizedEvaluation()]).validate(Iterating(), loader(), verbose=False)


def test_an_endless_loader_and_limits() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from list(loader())[:3]

    endless = DataLoader(Endless(), batch_size=None)
    [metrics] = trainer([QuantizedEvaluation(calibration_batches=5)]).validate(Tiny(), endless, verbose=False)
    [limited] = trainer([QuantizedEvaluation(calibration_batches=5)], limit_val_batches=3).validate(
        Tiny(), loader(), verbose=False
    )
    assert metrics.keys() == limited.keys()
    assert all(metrics[name] == pytest.approx(value) for name, value in limited.items())
    assert BATCHES > 3


def test_from_yaml(tmp_path: Path) -> None:
    options = {
        "bits": 4,
        "ranges": {"class_path": "lightning_prune.Percentile", "init_args": {"share": 0.99}},
        "exclude": ["network.layers.0"],
        "every": 2,
        "name": "few",
    }
    path = tmp_path / "q.yaml"
    where = "lightning_prune.callbacks.quantized_evaluation.QuantizedEvaluation"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": where, "init_args": options}]}}))
    configs = [f"--config={Path(__file__).parents[2] / 'configs' / 'digits.yaml'}", f"--config={path}"]
    cli = PruneCLI([*configs, "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
    [callback] = [each for each in vars(cli.trainer)["callbacks"] if isinstance(each, QuantizedEvaluation)]
    assert (callback.settings.bits, callback.settings.ranges) == (4, Percentile(0.99))
    assert (callback.every, callback.name, callback.settings.exclude) == (2, "few", ("network.layers.0",))


class Reduced(Rich):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_micro", self.accuracy(logits, batch[1]) * 0 + 1, sync_dist=True)
        self.scores.update(logits, batch[1])
        self.log_dict(self.scores)
        return logits

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        pass

    on_validation_epoch_end = on_validation_batch_end


def rank(folder: Path) -> None:
    """One of two processes."""
    model, aware = Reduced(), QuantizationAwareTraining(4, freeze=Steps(3))
    callbacks: list[Callback] = [QuantizedEvaluation(4), aware, Pruning(0.5, end=Steps(2))]
    loop = trainer(callbacks, folder, devices=2, strategy="ddp", max_epochs=1)
    loop.fit(model, loader(), loader())
    metrics = {name: float(value) for name, value in loop.callback_metrics.items() if name.startswith("val")}
    batches = [x for x, _ in callbacks[0]._seen]  # type: ignore[attr-defined]
    ranges = {f"{n}.{k}": v for n, each in aware.quantizers.items() for k, v in each.state_dict().items()}
    ranges = {name: value for name, value in ranges.items() if not name.startswith(("net.0.weight", "net.4.weight"))}
    kept = {"metrics": metrics, "weights": model.state_dict(), "ranges": ranges, "batches": batches}
    torch.save(kept, folder / f"{loop.global_rank}.pt")


def test_ranks_agree(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.callbacks.test_quantized_evaluation", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    for kind in ("weights", "ranges"):
        assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())
    assert not torch.equal(first["batches"][0], second["batches"][0])
    model = Reduced()
    model.load_state_dict(first["weights"])
    twin = quantize(model, first["batches"], 4)
    x, y = (torch.cat(part) for part in zip(*loader(), strict=True))
    assert first["metrics"] == pytest.approx(second["metrics"])
    metrics = first["metrics"]
    assert metrics["val_loss_int4"] == pytest.approx(nn.functional.cross_entropy(twin(x), y).item(), rel=1e-5)
    assert metrics["val_f1_int4_drop"] == pytest.approx(metrics["val_f1"] - metrics["val_f1_int4"], abs=1e-6)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
