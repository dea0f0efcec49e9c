"""SparsityMonitor, judged by the files that loggers wrote."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import Tensor, nn

from lightning_prune import AGP, Epochs, OneShot, Pruning, SparsityMonitor, Steps
from lightning_prune.callbacks._records import Records
from tests.support import BATCHES, EPOCHS, Tiny, loader, share_of_zeros, trainer

WEIGHTS = {"net.0.weight": 128, "net.2.weight": 64}
PARAMETERS = 128 + 16 + 64 + 4
END = EPOCHS * BATCHES


class Configured(Tiny):
    """With hyperparameters of its own, and a random state that a careless callback would disturb."""

    def __init__(self, lr: float = 0.05, widths: tuple[int, ...] = (16, 4), note: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.drop(x))
        return out


class Odd(Tiny):
    """Takes batches that no forward takes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class Zeros(Callback):
    """Counts zeros in the weights, independently, whenever something may have been logged."""

    def __init__(self) -> None:
        self.seen: dict[int, set[float]] = {}

    def _see(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.seen.setdefault(trainer.global_step, set()).add(share_of_zeros(module, *WEIGHTS))

    on_train_start = on_train_epoch_end = on_train_end = _see  # type: ignore[assignment]
    on_train_batch_start = on_train_batch_end = _see  # type: ignore[assignment]


def pruning(**options: Any) -> Pruning:
    return Pruning(**{"sparsity": 0.75, "begin": Epochs(1), "end": Epochs(3), "every": Steps(3), **options})


def run(folder: Path, callbacks: list[Callback], model: LightningModule | None = None, **options: Any) -> Trainer:
    """One fit with a TensorBoard logger in `folder`."""
    logger = TensorBoardLogger(folder, name="", version="run")
    fitted = trainer(callbacks, **{"logger": logger, "log_every_n_steps": 1, "default_root_dir": folder, **options})
    fitted.fit(model or Tiny(), loader(), loader())
    return fitted


def events(folder: Path, run: str = "run") -> EventAccumulator:
    """All events of a run, none left out."""
    read = EventAccumulator(str(folder / run), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    read.Reload()
    return read


def scalars(read: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read.Scalars(tag)]


def hparams(read: EventAccumulator) -> tuple[dict[str, Any], list[str]]:
    """The line that TensorBoard shows of a run, and the metrics beside it."""
    start = metadata.parse_session_start_info_plugin_data(
        read.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    experiment = metadata.parse_experiment_plugin_data(
        read.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    )
    params = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert {info.name for info in experiment.hparam_infos} == set(params)
    return params, [info.name.tag for info in experiment.metric_infos]


@pytest.mark.parametrize("first", [True, False], ids=["monitor before pruning", "monitor after pruning"])
@pytest.mark.parametrize(
    "options", [{}, {"schedule": OneShot(), "begin": 0.0}, {"schedule": AGP(), "begin": 0.0, "initial": 0.25}], ids=repr
)
def test_what_is_logged_is_what_is_zero(tmp_path: Path, first: bool, options: dict[str, Any]) -> None:
    zeros, monitor = Zeros(), SparsityMonitor()
    model, prune = Tiny(), pruning(**options)
    run(tmp_path, [monitor, prune, zeros] if first else [prune, monitor, zeros], model)
    read = events(tmp_path)
    logged = scalars(read, "sparsity/global")
    assert len(logged) >= 3
    for step, value in logged:
        assert any(value == pytest.approx(seen, abs=1e-6) for seen in zeros.seen[step] | ({0.0} if not step else set()))
    assert logged[0] == (0, 0.0)
    assert logged[-1] == (END, 0.75)
    assert {step for step, _ in logged} >= {BATCHES * epoch for epoch in range(EPOCHS + 1)}
    for name, total in WEIGHTS.items():
        assert scalars(read, f"sparsity/{name}")[-1][1] == pytest.approx(share_of_zeros(model, name)), total
    kept = PARAMETERS - sum(int((p == 0).sum()) for p in model.parameters())
    assert scalars(read, "compression_ratio")[-1][1] == pytest.approx(PARAMETERS / kept)
    assert scalars(read, "theoretical_speedup")[-1][1] == pytest.approx(4.0)  # a linear layer: MACs = weights
    assert {value for _, value in scalars(read, "sparsity/target")} == {0.75}


def test_churn_is_logged_at_every_update_and_adds_up(tmp_path: Path) -> None:
    prune = pruning()
    run(tmp_path, [prune, SparsityMonitor()])
    churn = scalars(events(tmp_path), "mask/churn")
    assert len(churn) == prune.updates
    assert sum(value for _, value in churn) == pytest.approx(0.75)  # masks are monotone: each entry changes once


def test_several_pruning_callbacks_count_as_one(tmp_path: Path) -> None:
    first = Pruning({"net.0.weight": 0.5}, begin=Steps(4), end=Steps(12), every=Steps(4))
    second = Pruning({"net.2.*": 0.75, "net.2.bias": 0.5}, begin=Steps(8), end=Steps(20), every=Steps(4))
    model = Tiny()
    run(tmp_path, [first, SparsityMonitor(), second], model)
    read = events(tmp_path)
    assert len(scalars(read, "mask/churn")) >= 4
    removed = 64 + 48 + 2
    assert scalars(read, "sparsity/global")[-1][1] == pytest.approx(removed / (128 + 64 + 4))
    assert scalars(read, "sparsity/target")[-1][1] == pytest.approx(removed / (128 + 64 + 4))
    assert scalars(read, "sparsity/net.2.bias")[-1][1] == 0.5
    params, _ = hparams(read)
    assert params["pruning/0/sparsity"] == 0.5
    assert params["pruning/1/sparsity"] == pytest.approx(50 / 68)
    # The target is reached when both callbacks have reached theirs.
    assert [event.step for event in read.Histograms("weights/net.0.weight")][-2] == 20


def test_histograms_before_and_after(tmp_path: Path) -> None:
    model = Tiny()
    run(tmp_path, [pruning(schedule=OneShot(), begin=Epochs(2)), SparsityMonitor()], model)
    read = events(tmp_path)
    assert set(read.Tags()["histograms"]) == {
        f"{kind}/{name}" for kind in ("weights", "weights_kept") for name in WEIGHTS
    }
    for name, total in WEIGHTS.items():
        everything, kept = (read.Histograms(f"{kind}/{name}") for kind in ("weights", "weights_kept"))
        assert [event.step for event in everything] == [event.step for event in kept] == [0, 15, 16, END]
        assert {event.histogram_value.num for event in everything} == {total}
        alive = total - round(share_of_zeros(model, name) * total)
        assert [event.histogram_value.num for event in kept] == [total, total, alive, alive]
        assert all(min(event.histogram_value.bucket) >= 0 for event in kept)
        final = everything[-1].histogram_value
        weight = dict(model.named_parameters())[name].detach()
        assert final.sum == pytest.approx(float(weight.sum()), abs=1e-4)
        assert final.sum_squares == pytest.approx(float(weight.square().sum()), rel=1e-4)
        assert final.max == -final.min == pytest.approx(float(weight.abs().max()))
        assert final.bucket_limit[-1] == pytest.approx(final.max)


def test_histograms_of_a_gradual_schedule(tmp_path: Path) -> None:
    run(tmp_path, [SparsityMonitor(), pruning()])
    steps = [event.step for event in events(tmp_path).Histograms("weights/net.0.weight")]
    # Start; before the first weight went; before the last one went; when it went; end.
    assert steps == [0, BATCHES, 3 * BATCHES - 1, 3 * BATCHES, END]


def test_figure_and_text(tmp_path: Path) -> None:
    run(tmp_path, [pruning(), SparsityMonitor()])
    read = events(tmp_path)
    assert [event.step for event in read.Images("layers")] == [0, END]
    assert all(event.width > 1000 and event.height > 150 for event in read.Images("layers"))
    (text,) = read.Tensors("summary/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| sparsity | 0.0000 |  | 0.7500 |" in table
    assert "| **total** |  | **192** | **48** | **0.7500** | **192** | **48** |" in table


def test_hyperparameters_stand_beside_the_users_own_and_the_final_metrics(tmp_path: Path) -> None:
    model = Configured(lr=0.01)
    run(tmp_path, [pruning(), SparsityMonitor()], model)
    read = events(tmp_path)
    params, shown = hparams(read)
    assert params == {
        "lr": 0.01,
        "widths": "(16, 4)",
        "note": "None",
        "pruning/sparsity": 0.75,
        "pruning/schedule": str(AGP()),
        "pruning/criterion": "Magnitude(p=1.0)",
        "pruning/granularity": "Unstructured()",
        "pruning/scope": "global",
    }
    assert {"sparsity/global", "compression_ratio", "theoretical_speedup"} < set(shown)
    for name in ("val_acc", "val_loss"):
        moments = {moment: f"summary/{name}_{moment}" for moment in ("before", "best", "last")}
        assert set(moments.values()) < set(shown)
        history = [value for _, value in scalars(read, name)]
        assert scalars(read, moments["before"]) == [(END, history[0])]
        assert scalars(read, moments["last"]) == [(END, history[-1])]
        best = max if name == "val_acc" else min
        assert scalars(read, moments["best"]) == [(END, best(history[2:]))]
    assert "hp_metric" not in read.Tags()["scalars"]
    assert "lr: 0.01" in (tmp_path / "run" / "hparams.yaml").read_text()


def test_metrics_that_the_user_declares_stay(tmp_path: Path) -> None:
    class Declares(Configured):
        def on_train_start(self) -> None:
            assert isinstance(self.logger, TensorBoardLogger)
            self.logger.log_hyperparams({"lr": 0.1}, {"hp/mine": 0.0})

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    run(tmp_path, [SparsityMonitor()], Declares(), logger=logger)
    read = events(tmp_path)
    start = metadata.parse_session_start_info_plugin_data(
        read.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    assert set(start.hparams) == {"lr", "widths", "note"}
    content = read.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    assert [info.name.tag for info in metadata.parse_experiment_plugin_data(content).metric_infos] == ["hp/mine"]


def test_the_loggers_placeholder_is_put_back(tmp_path: Path) -> None:
    class Fails(Configured):
        def on_sanity_check_start(self) -> None:
            raise RuntimeError("in the sanity check")

        def training_step(self, *args: Any) -> Tensor:
            raise RuntimeError("in training")

    for sanity in (0, 1):
        logger = TensorBoardLogger(tmp_path, name="", version="run")
        with pytest.raises(RuntimeError, match="in "):
            run(tmp_path, [SparsityMonitor()], Fails(), logger=logger, num_sanity_val_steps=sanity)
        assert logger._default_hp_metric


def test_csv_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="csv")
    model = Configured()
    run(tmp_path, [pruning(), SparsityMonitor()], model, logger=logger)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [(int(row["step"]), float(row["sparsity/global"])) for row in rows if row["sparsity/global"]]
    assert logged[0] == (0, 0.0)
    assert logged[-1] == (END, 0.75)
    assert [row["summary/val_acc_last"] for row in rows if row["summary/val_acc_last"]]
    settings = (tmp_path / "csv" / "hparams.yaml").read_text()
    assert "lr: 0.05" in settings
    assert "schedule: AGP" in settings


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}], ids=repr)
def test_without_a_logger(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = trainer([pruning(), SparsityMonitor()], tmp_path, **options)
    fitted.fit(Tiny(), loader(), loader())
    assert "theoretical speedup" in capsys.readouterr().out
    assert float(fitted.callback_metrics["sparsity/global"]) == 0.75
    assert not list(tmp_path.rglob("events.*"))


def test_without_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Tiny()
    with torch.no_grad():
        model.get_parameter("net.0.weight")[:4] = 0.0
    model.get_parameter("net.0.weight").requires_grad_(False)
    run(tmp_path, [SparsityMonitor()], model)
    read = events(tmp_path)
    assert all(value == pytest.approx(32 / 192) for _, value in scalars(read, "sparsity/global"))
    assert "mask/churn" not in read.Tags()["scalars"]
    assert "sparsity/target" not in read.Tags()["scalars"]
    assert "summary/val_acc_before" not in read.Tags()["scalars"]
    assert len(scalars(read, "summary/val_acc_best")) == 1
    assert [event.step for event in read.Histograms("weights/net.0.weight")] == [0, END]
    printed = capsys.readouterr().out
    assert "at target" not in printed
    assert "0.1667" in printed


@pytest.mark.parametrize("first", [True, False])
def test_training_does_not_notice(tmp_path: Path, first: bool) -> None:
    def fitted(callbacks: list[Callback], folder: str) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(3)
        model = Configured()
        run(tmp_path / folder, callbacks, model, num_sanity_val_steps=1)
        return list(model.parameters()), torch.get_rng_state()

    watched = [SparsityMonitor(), pruning()] if first else [pruning(), SparsityMonitor()]
    with_it, random_with_it = fitted(watched, "with")
    without, random_without = fitted([pruning()], "without")
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert torch.equal(random_with_it, random_without)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resume_keeps_what_was_measured_before(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{epoch}")
    run(tmp_path, [save, pruning(), SparsityMonitor()], enable_checkpointing=True)
    whole = events(tmp_path)
    path = tmp_path / "checkpoints" / "epoch=1.ckpt"
    stored = torch.load(path, weights_only=True)["callbacks"]["SparsityMonitor"]
    assert stored["records"]["dense"].keys() == {"val_acc", "val_loss"}
    monitor = SparsityMonitor()
    logger = TensorBoardLogger(tmp_path, name="", version="resumed")
    resumed = trainer(
        [save, pruning(), monitor], tmp_path, logger=logger, log_every_n_steps=1, enable_checkpointing=True
    )
    resumed.fit(Tiny(seed=5), loader(), loader(), ckpt_path=path)
    read = events(tmp_path, "resumed")
    for tag in ("before", "best", "last"):
        for name in ("val_acc", "val_loss"):
            assert scalars(read, f"summary/{name}_{tag}") == scalars(whole, f"summary/{name}_{tag}")
    assert scalars(read, "mask/churn") == [pair for pair in scalars(whole, "mask/churn") if pair[0] > 2 * BATCHES]
    assert scalars(read, "sparsity/global")[-1] == (END, 0.75)
    text = read.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| sparsity | 0.0000 |  | 0.7500 |" in text


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_monitor_that_joins_at_resume_says_what_it_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer([save, pruning()], tmp_path, enable_checkpointing=True).fit(Tiny(), loader(), loader())
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    late = trainer(
        [save, SparsityMonitor(), pruning()], tmp_path, logger=logger, log_every_n_steps=1, enable_checkpointing=True
    )
    late.fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    read = events(tmp_path)
    assert scalars(read, "sparsity/global") == [(3 * BATCHES, 0.75), (END, 0.75)]
    assert "mask/churn" not in read.Tags()["scalars"]
    assert "Before pruning was never measured" in capsys.readouterr().out


def test_a_second_fit_starts_afresh(tmp_path: Path) -> None:
    callbacks: list[Callback] = [SparsityMonitor(), pruning()]
    for name in ("first", "second"):
        run(tmp_path / name, callbacks, Tiny())
    first, second = events(tmp_path / "first"), events(tmp_path / "second")
    assert first.Tags()["scalars"] == second.Tags()["scalars"]
    for tag in set(first.Tags()["scalars"]) - {"epoch"}:
        assert scalars(first, tag) == scalars(second, tag)
    assert len(first.Histograms("weights/net.0.weight")) == len(second.Histograms("weights/net.0.weight"))


def test_other_callbacks_can_monitor_sparsity(tmp_path: Path) -> None:
    stop = EarlyStopping("sparsity/global", stopping_threshold=0.7, mode="max", patience=99)
    best = ModelCheckpoint(tmp_path / "best", monitor="sparsity/global", mode="max", save_top_k=1)
    monitor = SparsityMonitor(progress_bar=True)
    with pytest.warns(UserWarning, match="reached"):
        fitted = run(tmp_path, [monitor, pruning(end=Epochs(4)), stop, best], enable_checkpointing=True, max_epochs=8)
    assert fitted.current_epoch < 8
    assert float(best.best_model_score or 0.0) > 0.7
    assert fitted.progress_bar_metrics["sparsity"] > 0.7


def test_a_run_that_never_was_dense_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [pruning(schedule=OneShot(), begin=0.0), SparsityMonitor()], num_sanity_val_steps=1)
    assert "no validation ran before the first weights were removed" in capsys.readouterr().out
    assert "summary/val_acc_before" not in events(tmp_path).Tags()["scalars"]


def test_a_run_that_stops_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stops(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    with pytest.warns(UserWarning, match="not reached"):
        run(tmp_path, [pruning(), SparsityMonitor(), Stops()])
    printed = capsys.readouterr().out
    assert "last, target not reached" in printed
    assert "The target sparsity was not reached" in printed


def test_a_model_without_metrics_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [pruning(), SparsityMonitor()], limit_val_batches=0)
    assert "No validation metric was logged" in capsys.readouterr().out


def test_multiplications_that_cannot_be_counted_are_left_out_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [{"x": x, "y": y} for x, y in loader()]
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fitted = trainer([pruning(), SparsityMonitor()], tmp_path, logger=logger, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="leaves out multiplications") as caught:
        fitted.fit(Odd(), torch.utils.data.DataLoader(data, batch_size=None), loader())  # type: ignore[arg-type]
    assert len([each for each in caught if "multiplications" in str(each.message)]) == 1
    assert "theoretical_speedup" not in events(tmp_path).Tags()["scalars"]
    assert "MACs are unknown" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["argument", "attribute"])
def test_an_example_can_be_given(tmp_path: Path, where: str) -> None:
    model = Odd()
    example = torch.zeros(1, 8)
    if where == "attribute":
        model.example_input_array = example
    data = [{"x": x, "y": y} for x, y in loader()]
    monitor = SparsityMonitor(example_inputs=example if where == "argument" else None)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fitted = trainer([pruning(), monitor], tmp_path, logger=logger, log_every_n_steps=1)
    fitted.fit(model, torch.utils.data.DataLoader(data, batch_size=None), loader())  # type: ignore[arg-type]
    assert scalars(events(tmp_path), "theoretical_speedup")[-1] == (END, 4.0)


def test_switches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = SparsityMonitor(every_n_epochs=3, histograms=False, figures=False, summary=False)
    run(tmp_path, [quiet, pruning(schedule=OneShot(), begin=Epochs(2))])
    read = events(tmp_path)
    assert not read.Tags()["histograms"]
    assert not read.Tags()["images"]
    assert "theoretical speedup" not in capsys.readouterr().out
    assert [step for step, _ in scalars(read, "sparsity/global")] == [0, 2 * BATCHES, 3 * BATCHES, END]
    with pytest.raises(ValueError, match="every_n_epochs >= 1, got every_n_epochs=0"):
        SparsityMonitor(every_n_epochs=0)


def test_diverged_weights_are_no_obstacle(tmp_path: Path) -> None:
    model = Tiny()
    with torch.no_grad():
        model.get_parameter("net.0.weight")[0, 0] = math.nan
    model.get_parameter("net.0.weight").requires_grad_(False)
    run(tmp_path, [SparsityMonitor()], model)
    read = events(tmp_path)
    assert scalars(read, "sparsity/global")[-1] == (END, 0.0)
    assert read.Histograms("weights/net.0.weight")[-1].histogram_value.num == 127


def test_records_follow_what_callbacks_monitor() -> None:
    records = Records()
    records.modes = {"val_score": "min"}
    for value in (3.0, 1.0, 2.0, math.nan):
        records.add({"val_score": value, "val_acc": value, "test_error": value}, dense=False, at_target=True)
    assert records.best == {"val_score": 1.0, "val_acc": 3.0, "test_error": 1.0}
    restored = Records()
    restored.load_state_dict(records.state_dict())
    assert repr(restored.rows()) == repr(records.rows())
