"""The function behind `lightning-prune sensitivity`, with modules that log in one way or another."""

from __future__ import annotations

import functools
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from lightning_prune.commands import sensitivity as command
from lightning_prune.commands.validation import step_totals
from lightning_prune.criteria import GradientMagnitude, Magnitude
from lightning_prune.granularities import Unstructured
from lightning_prune.plan import SparsityPlan
from lightning_prune.pruner import Pruner
from lightning_prune.search import Sensitivity
from lightning_prune.zoo.classifier import Classifier
from lightning_prune.zoo.cnn import SmallCNN
from tests.support import Tiny, loader, trainer

LEVELS = (0.0, 0.5, 0.9)


class Scored(Tiny):
    """Logs metric objects as well: an average over examples and one that is none; and one at the end of the epoch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.scores = MetricCollection(
            {"val_acc": MulticlassAccuracy(4, average="micro"), "val_f1": MulticlassF1Score(4)}, compute_groups=True
        )
        self.late = MulticlassAccuracy(4, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), batch_size=len(batch[1]))
        self.scores.update(logits, batch[1])
        self.log_dict(dict(self.scores.items()), batch_size=len(batch[1]))
        self.late.update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("val_late", self.late.compute())
        self.late.reset()


def data(batch_size: int = 24) -> DataLoader[Any]:
    whole = loader()  # 64 examples: the last batch is smaller
    return DataLoader(whole.dataset, batch_size=batch_size)


def run(model: LightningModule, source: Any = None, *, by: Trainer | None = None, **options: Any) -> Sensitivity:
    model.val_dataloader = lambda: data() if source is None else source  # type: ignore[method-assign]
    given: dict[str, Any] = {
        "levels": LEVELS,
        "names": None,
        "metrics": None,
        "criterion": Magnitude(),
        "granularity": Unstructured(),
        "ckpt_path": None,
        "weights_only": None,
        "reuse": True,
        "output": "out",
    }
    return command.run(by or trainer([]), model, None, **{**given, **options})


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def validated(model: LightningModule) -> dict[str, float]:
    found = trainer([])
    found.validate(model, data(), verbose=False)
    return {name: float(value) for name, value in found.callback_metrics.items()}


def require_ordinary(result: Sensitivity, make: Any) -> None:
    """Every cell is what `trainer.validate` gives for a network pruned like that."""
    for row, name in enumerate(result.names):
        for column, level in enumerate(result.levels):
            expected = pruned(make, name, level)
            for metric in result.metrics:
                assert result.values[metric][row][column] == pytest.approx(expected[metric], rel=1e-5)
    assert {metric: pruned(make, "", 0.0)[metric] for metric in result.metrics} == pytest.approx(dict(result.dense))


@functools.cache
def pruned(make: Any, name: str, level: float) -> dict[str, float]:
    model = make()
    if level:
        Pruner(model, SparsityPlan({name: level})).update(1.0)
    return validated(model)


def test_cells_are_what_validate_gives(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(Tiny())
    require_ordinary(result, Tiny)
    assert (result.metrics, result.examples) == (("val_loss", "val_acc"), 64)
    assert result.plain_passes == 3 * (1 + 2 * 2)
    # Three batches: recorded, four times with a layer pruned; one pass counts, two check; three ordinary runs.
    assert result.forward_passes == 3 * (1 + 4) + 1 + 2 + 3 * 3
    # The step runs the network twice, so a third of its work comes before the second layer is first used.
    assert result.full_passes == pytest.approx(result.forward_passes - (3 * 2 + 1) / 3)
    assert Sensitivity.load("out/sensitivity.json") == result
    assert {path.name for path in Path("out").iterdir()} == {f"sensitivity.{name}" for name in ("json", "csv", "png")}
    assert Path("out/sensitivity.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "val_acc of Tiny with one layer pruned, dense" in shown
    assert f"64 examples; {result.forward_passes} forward passes of a batch, the work of" in shown
    assert "written: out/sensitivity.csv" in shown


def test_metrics_that_are_no_averages_are_validated_whole(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(Scored())
    require_ordinary(result, Scored)
    assert set(result.metrics) == {"val_loss", "val_acc", "val_f1", "val_late"}
    shown = capsys.readouterr().out
    assert "val_f1, val_late: no average over examples that a step logs" in shown
    assert "validated whole, 6 times 3 batches; name other metrics with --metrics" in shown
    assert result.forward_passes == result.full_passes == 3 * 5 + 2 * 3
    assert result.examples == 64


def test_averages_among_them_have_the_fast_way(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(Scored(), metrics=["val_acc", "val_loss"])
    assert result.metrics == ("val_acc", "val_loss")
    require_ordinary(result, Scored)
    assert "no average" not in capsys.readouterr().out
    assert result.full_passes < result.forward_passes


def test_without_reuse_it_is_the_same() -> None:
    fast, plain = run(Tiny()), run(Tiny(), reuse=False)
    assert fast.values == plain.values
    assert plain.full_passes == plain.forward_passes == plain.plain_passes + 3 * 3


class Loud(Callback):
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("callbacks have no part in this")


def test_trainer_model_and_generators_are_left_alone() -> None:
    logger = TensorBoardLogger("runs", name="r")
    by = trainer([Loud()], logger=logger)
    model = Classifier(SmallCNN(channels=(4, 8), num_classes=4), num_classes=4)
    x = torch.randn(20, 1, 8, 8)
    source = DataLoader(TensorDataset(x, torch.randint(4, (20,))), batch_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    result = run(model.train(), source, by=by)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not {"log", "validation_step", "forward"} & model.__dict__.keys()
    assert any(isinstance(callback, Loud) for callback in by.callbacks)  # type: ignore[attr-defined]
    assert by.loggers == [logger]
    assert result.names == ("network.convs.0.weight", "network.convs.1.weight", "network.classifier.weight")
    events = EventAccumulator("out")
    events.Reload()
    assert events.Tags()["images"] == ["sensitivity"]
    with pytest.raises(RuntimeError, match="no part in this"):
        by.validate(model, source)


def test_weights_of_a_checkpoint_and_the_folder_of_its_run() -> None:
    by = trainer([], max_epochs=1)
    by.fit(trained := Tiny(seed=4), loader(), loader())
    by.save_checkpoint("run/checkpoints/last.ckpt")
    result = run(Tiny(), ckpt_path="run/checkpoints/last.ckpt", weights_only=True, output=None)
    assert dict(result.dense) == pytest.approx(validated(trained))
    assert Sensitivity.load("run/sensitivity/sensitivity.json") == result


def test_names_and_limits() -> None:
    result = run(Tiny(), names=["net.2.*"], by=trainer([], limit_val_batches=1))
    assert (result.names, result.examples) == (("net.2.weight",), 24)


class Interrupted(Tiny):
    """Somebody presses Ctrl-C in some step."""

    at, late, steps = 0, False, 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        type(self).steps += 1
        if self.steps == self.at:
            raise KeyboardInterrupt

    def on_validation_epoch_end(self) -> None:
        if self.late:
            self.log("val_late", 1.0)


@pytest.mark.parametrize(("late", "at"), [(False, 20), (True, 20)])
def test_an_interrupted_command_goes_on(late: bool, at: int, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    Interrupted.late, Interrupted.at, Interrupted.steps = late, 0, 0
    whole = run(Interrupted(), output="whole")
    steps, Interrupted.at, Interrupted.steps = Interrupted.steps, at, 0
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())
    assert (
        "Interrupted: what was finished is kept; the same command with --output out goes on" in capsys.readouterr().out
    )
    assert signal.getsignal(signal.SIGINT) is handler
    Interrupted.at, Interrupted.steps = 0, 0
    resumed = run(Interrupted())
    assert (resumed.values, resumed.dense, resumed.examples) == (whole.values, whole.dense, whole.examples)
    assert Interrupted.steps < steps - 3
    assert not Path("out/sensitivity.partial.json").exists()
    Interrupted.at, Interrupted.steps = 8 if late else 2, 0
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), output="early")


class Silent(Tiny):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


class Vector(Tiny):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_vector", self(batch[0]).mean(dim=0))


class Nameless(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)


class Undefined(Tiny):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).mean() * math.nan)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Nameless, {}, "Nameless defines no validation_step, so nothing says how good it is; define one that logs"),
        (Silent, {}, r"the validation_step of Silent logs nothing; log a metric with self.log\(name, value\)"),
        (Vector, {}, r"logs 'val_vector' of shape \[4\]; log single numbers"),
        (Undefined, {}, "'val_loss' of the dense network is NaN on batch 0"),
        (Tiny, {"metrics": ["val_ac"]}, "the metric 'val_ac' is never logged in validation; closest: 'val_acc'"),
        (Tiny, {"names": ["net.4.weight"]}, r"'net.4.weight', which matches no parameter of Tiny; closest: 'net"),
        (Tiny, {"levels": (0.9, 0.5)}, "levels are fractions removed"),
        (Tiny, {"criterion": GradientMagnitude()}, r"GradientMagnitude\(\) needs gradients"),
        (Tiny, {"source": DataLoader(TensorDataset(torch.ones(0, 8)))}, "there are no validation data: the validation"),
        (
            Tiny,
            {"by": ("precision", "bf16-mixed")},
            "trainer.precision='bf16-mixed' mixes two; give --trainer.precision",
        ),
        (
            Tiny,
            {"by": ("limit_val_batches", 0)},
            "there are no validation data: .* or --trainer.limit_val_batches is 0",
        ),
    ],
)
def test_bad_input_is_refused(model: Any, options: dict[str, Any], message: str) -> None:
    if "by" in options:
        options = {**options, "by": trainer([], **dict([options["by"]]))}
    with pytest.raises(ValueError, match=message):
        run(model(), options.pop("source", None), **options)
    assert not Path("out/sensitivity.json").exists()


def test_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"this runs on one device, and the Trainer has 2; give --trainer.devices 1"):
        run(Tiny())


def test_metrics_are_read_batch_by_batch_and_left_as_they_were() -> None:
    class Gathering(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.area = BinaryAUROC()  # keeps all it has seen in lists

        def step(self, batch: tuple[Tensor, Tensor]) -> None:
            self.area.update(*batch)
            self.log("area", self.area)

    model = Gathering()
    first = torch.tensor([0.1, 0.9, 0.4]), torch.tensor([0, 1, 1])
    second = torch.tensor([0.8, 0.2]), torch.tensor([0, 1])
    metric: Metric = model.area
    metric.update(*first)
    assert step_totals(model, lambda: model.step(second), second) == {"area": (0.0, 2.0)}
    assert metric.compute() == 1.0
    metric.update(*second)
    whole = BinaryAUROC()
    whole.update(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    assert metric.compute() == whole.compute()
    assert "log" not in model.__dict__
