"""`lightning-prune search`, really run, on tiny networks and the digits."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SparsityPlan
from lightning_prune.cli import main
from lightning_prune.commands import search as command
from lightning_prune.commands.evaluation import Validation
from lightning_prune.commands.recovery import RECOVERIES, Recovery
from lightning_prune.commands.validation import validated
from lightning_prune.kernels import ALL_KERNELS, KERNELS, Workload
from lightning_prune.kernels.int8 import unavailable
from lightning_prune.latency.measurement import Measurement
from lightning_prune.latency.profile import digest
from lightning_prune.layers import layer_table
from lightning_prune.search.result import SearchResult
from lightning_prune.terminal import console
from lightning_prune.trainer import PruneTrainer
from tests.support import Tiny, loader
from tests.test_cli import ON_CPU, QUIET, ROOT, configs, environment, error_of, launch, listening

NETWORK = [*configs("digits", "mlp"), "--model.network.widths=[64,24,10]", *ON_CPU, *QUIET]
SETTINGS = ["--objective=macs", "--sampler=optuna.samplers.RandomSampler", "--sampler.seed=0"]
SMALL = ["--n_trials=5", "--recovery=none", "--trainer.max_epochs=4", "--output=out", "--calibration_examples=64"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration is tested elsewhere; here it is none."""
    from lightning_prune.commands import search as command
    from lightning_prune.latency.machine import Machine
    from tests.latency.profiles import hand_made
    from tests.latency.profiles import record as record_of

    def calibrate(model: nn.Module, example: Any, *, profile: Path, **options: Any) -> Any:
        made = hand_made(record_of(model, example)[1])
        object.__setattr__(made, "machine", Machine.here(torch.device("cpu"), torch.float32))
        return made

    monkeypatch.setattr(command, "calibrate", calibrate)


def search(*arguments: str) -> dict[str, Any]:
    main(["search", *NETWORK, *SETTINGS, *SMALL, *arguments])
    found: dict[str, Any] = json.loads(Path("out", "search_result.json").read_text())
    return found


class TinyData(LightningDataModule):
    """Counts what it is asked for."""

    def __init__(self, val_batches: int = 8) -> None:
        super().__init__()
        self.val_batches = val_batches
        self.asked: list[str] = []

    def prepare_data(self) -> None:
        self.asked.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.asked.append(f"setup {getattr(stage, 'value', stage)}")

    def teardown(self, stage: str) -> None:
        self.asked.append(f"teardown {getattr(stage, 'value', stage)}")

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        self.asked.append("val_dataloader")
        if not self.val_batches:
            return DataLoader(TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)))
        return loader(batches=self.val_batches)


class Wide(Tiny):
    """With layers that are worth pruning, and an example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        self.example_input_array = torch.zeros(1, 8)


def trainer(**options: Any) -> PruneTrainer:
    settings = {
        "max_epochs": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **options,
    }
    return PruneTrainer(**settings)


def by_python(by: PruneTrainer | None = None, data: TinyData | None = None, **options: Any) -> SearchResult:
    given: dict[str, Any] = {
        "objective": "macs",
        "max_drop": 0.3,
        "n_trials": 5,
        "recovery": "none",
        "calibration_examples": 64,
        "output": "out",
        **options,
    }
    return (by or trainer()).search(Wide(), data or TinyData(), **given)


def test_search_writes_a_result_and_a_recipe_that_prunes_to_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    found = search("--recovery=one_shot", "--recovery_epochs=2", "--max_drop=0.2")
    shown = capsys.readouterr().out
    assert found["feasible"]
    assert {path.name for path in Path("out").iterdir()} >= {
        "search_result.json",
        "plan.yaml",
        "recipe.yaml",
        "study.db",
    }
    plan = SparsityPlan.load("out/plan.yaml")
    assert len(plan)
    assert plan == SparsityPlan(found["plan"])
    # The dense network, four trials, and the repaired and the recovered network.
    assert found["evaluations"] == 5 + 2
    for words in (
        "Training the dense network",
        "Repairing 2 layers",
        "Recovering the winner",
        ": feasible",
        "written: out/",
    ):
        assert words in shown
    text = Path("out", "recipe.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    for pattern in (
        r"command: lightning-prune search .*--recovery=one_shot",
        r"dense checkpoint: .*\.ckpt, best epoch \d",
        rf"val_acc: {found['accuracy']:.6g}, dense {found['dense_accuracy']:.6g}, drop .* of at most 0\.2",
        r"before recovery: 0\.\d+; recovery one_shot, 2 epochs, best epoch [01]",
        r"least macs: \d+ MACs, dense 1776 MACs; 7 evaluations",
        rf"nonzeros {found['nonzeros']:,} of 1,776; MACs {found['macs']:,} of 1,776",
        r"latency of a pass: measured .* ms \(dense .* ms\), estimated .* ms \(dense .* ms\) on .*, 1 thread",
        r"sparsity profile:\n#   network\.layers\.0\.weight: 0\.\d+, \d+ of 1,536 weights left, ",
    ):
        assert re.search(pattern, header), (pattern, header)
    recipe = yaml.safe_load(text)
    assert "metric" not in recipe

    main(["fit", "--config=out/recipe.yaml", "--trainer.max_epochs=2", "--trainer.name=again"])
    [checkpoint] = Path("runs", "again").rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, sparsity in plan.items():
        assert int((state[name] == 0).sum()) == round(sparsity * state[name].numel()), name


def test_a_quantised_search_reports_both_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    found = search("--quantize=int4", "--levels=[0.5,0.8]", "--max_drop=0.3", "--trainer.max_epochs=3")
    shown = capsys.readouterr().out
    assert found["quantization"] == "int4"
    assert found["bits"] == {"network.layers.0.weight": 4, "network.layers.1.weight": 4}
    # Dense, trials, the winner, the winner in floating point, and the dense one quantised.
    assert 1 + 1 + 3 < found["evaluations"] <= 5 + 3
    numbers = [found[name] for name in ("float_accuracy", "quantized_dense_accuracy", "accuracy", "dense_accuracy")]
    assert all(0.3 < number <= 1.0 for number in numbers)
    assert found["drop"] == pytest.approx(found["dense_accuracy"] - found["accuracy"])
    exact = f"{numbers[0]:.4f}, and the dense network, quantised, {numbers[1]:.4f}"
    assert "Quantising the dense network: int4" in shown
    assert f"quantised (int4): 2 layers; in floating point it is {exact}" in shown
    recipe = Path("out", "recipe.yaml").read_text()
    assert "# val_acc is that of the quantised network (int4, 2 layers); in floating point " in recipe
    assert re.search(r"# +network\.layers\.0\.weight: 0\.\d+, [\d,]+ of 1,536 weights left, 4 bits", recipe)
    page = Path("out", "report.html").read_text()
    for cell in ("val_acc, quantised (int4)", "val_acc in floating point", "val_acc, all layers quantised"):
        assert cell in page


def test_kernels_in_integers_are_timed_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    before: Any = vars(command)["calibrate"]
    network, example = Wide().eval(), torch.zeros(1, 8)

    def calibrate(*args: Any, kernels: Any, **options: Any) -> Any:
        asked.append(kernels)
        made = before(*args, **options)
        work = Workload("linear", 1, 8, 32)
        measured = [
            Measurement(k.name, work, 0.0, 1.0, 1e-5, 0.0, digest(layer_table(network, example))) for k in kernels
        ]
        made = replace(made, measurements=tuple(measured))
        made.save("device.json")
        return made

    monkeypatch.setattr(command, "calibrate", calibrate)
    for quantized in (False, False, True, True, False):
        command._profile(network, example, Path("device.json"), quantized, False, console())
    # What is known is not timed again, but in integers, which the first time left out.
    assert asked == ([KERNELS, ALL_KERNELS] if unavailable() is None else [KERNELS])


@pytest.mark.parametrize("recovery", [*RECOVERIES, "none"])
def test_every_recovery_keeps_the_plan_and_makes_nothing_worse(recovery: str) -> None:
    result = by_python(recovery=recovery, recovery_epochs=3, n_trials=3)
    assert len(result.plan)
    assert result.model is not None
    for name, sparsity in result.plan.items():
        weight = result.model.get_parameter(name)
        assert int((weight == 0).sum()) == round(sparsity * weight.numel())
    assert result.accuracy >= result.search_accuracy
    assert validated(trainer(), result.model, TinyData())["val_acc"] == result.accuracy  # type: ignore[arg-type]
    if recovery != "none":
        assert result.details["recovery"]["kind"] == recovery
        assert 0 <= result.details["recovery"]["best_epoch"] < 3


def test_another_attempt_to_recover_overwrites_nothing() -> None:
    recover = Recovery(
        trainer(), Wide(), TinyData(), kind="one_shot", epochs=1, metric="val_acc", mode="max", folder=Path("out")
    )
    name = next(name for name, _ in Wide().named_parameters() if name.endswith("weight"))
    for sparsity in (0.5, 0.75):
        recover(Wide(), SparsityPlan({name: sparsity}))
    assert [each["folder"] for each in recover.attempts] == ["recovery", "recovery_2"]
    for more, sparsity in (("", 0.5), ("_2", 0.75)):
        weight = torch.load(Path("out", f"recovered{more}", "best.ckpt"), weights_only=True)["state_dict"][name]
        assert int((weight == 0).sum()) == sparsity * weight.numel()
        assert any(Path("out", f"recovery{more}").iterdir())


@pytest.mark.parametrize("scheme", ["block", "nm", "filter", "mixed"])
def test_recovery_keeps_patterns(scheme: str) -> None:
    result = by_python(scheme=scheme, recovery="one_shot", recovery_epochs=1, max_drop=0.6, n_trials=3)
    assert result.model is not None
    for name in result.plan:
        granularity = result.plan.granularity(name)
        if granularity is None:
            continue
        weight = result.model.get_parameter(name)
        pooled = granularity.pool(weight.abs())
        dead = int((pooled == 0).sum())
        assert dead == round(result.plan[name] * pooled.numel()) or scheme in ("nm", "mixed")


def test_candidates_are_fine_tuned_before_they_are_measured() -> None:
    model, by = Wide(), trainer()
    by.fit(model, datamodule=TinyData())
    by.save_checkpoint("dense.ckpt")
    given: dict[str, Any] = {"ckpt_path": "dense.ckpt", "n_trials": 4}
    bare = by_python(output="bare", **given)
    result = by_python(tuning_steps=12, repair="sequential", recovery="one_shot", recovery_epochs=1, **given)
    assert bare.details["candidates"] == "layerwise repair"
    assert result.details["candidates"] == "sequential repair, fine-tuned for 12 steps"
    assert json.loads(Path("out", "search_result.json").read_text())["details"]["candidates"]
    assert result.model is not None
    for name, sparsity in result.plan.items():
        weight = result.model.get_parameter(name)
        assert int((weight == 0).sum()) == round(sparsity * weight.numel())
    # Steps bring accuracy back, so that more can go.
    assert result.cost < bare.cost
    assert result.accuracy >= result.search_accuracy
    with pytest.raises(ValueError, match="another repair or fine-tuning of candidates"):
        by_python(tuning_steps=3, **given)


def test_a_checkpoint_is_not_trained_and_the_model_not_changed() -> None:
    model, by = Wide(), trainer()
    by.fit(model, datamodule=TinyData())
    by.save_checkpoint("dense.ckpt")
    before = {name: value.clone() for name, value in Wide().state_dict().items()}
    fresh = Wide()
    result = trainer().search(
        fresh, TinyData(), objective="parameters", n_trials=3, recovery="none", max_drop=0.5, ckpt_path="dense.ckpt"
    )
    assert result.dense_accuracy == validated(trainer(), model, TinyData())["val_acc"]
    assert result.details["dense_epoch"] == 6  # as Lightning counts when training has ended
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_a_part_of_the_validation_data_searches_and_all_of_it_confirms() -> None:
    result = by_python(trainer(limit_val_batches=2))
    model = result.model
    assert model is not None
    assert result.accuracy == validated(trainer(), model, TinyData())["val_acc"]  # type: ignore[arg-type]
    # The dense network is confirmed as well, and the next plan where one does not hold on all data.
    assert result.evaluations == 5 + 1 + len(result.details["confirmations"])
    part = validated(trainer(limit_val_batches=2), model, TinyData())["val_acc"]  # type: ignore[arg-type]
    assert result.search_accuracy == part


class TestValidation:
    def test_data_are_set_up_once_and_the_module_is_left_alone(self) -> None:
        data, by = TinyData(), trainer()
        own = data.__dict__["val_dataloader"] = data.val_dataloader
        validation = Validation(by, data, "val_acc")
        values = [validation(Wide()) for _ in range(3)]
        assert data.asked == ["prepare_data", "setup validate", "val_dataloader"]
        assert data.__dict__["val_dataloader"] is own
        assert "setup" not in data.__dict__
        assert values == [validated(by, Wide(), TinyData())["val_acc"]] * 3
        assert by.callback_metrics.keys() == {"val_acc", "val_loss"}

    def test_a_check_looks_at_one_batch(self) -> None:
        seen: list[int] = []

        class Noting(Wide):
            def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
                seen.append(batch_idx)
                super().validation_step(batch, batch_idx)

        by = trainer(limit_val_batches=0.5)
        validation = Validation(by, TinyData(), "val_acc")
        validation.check(Noting())
        assert seen == [0]
        validation(Noting())
        assert len(seen) == 1 + 4
        assert by.limit_val_batches == 0.5


class TestRefused:
    """Before the dense network is trained."""

    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def fit(*args: Any, **options: Any) -> None:
            pytest.fail("it trained before it looked")

        monkeypatch.setattr(Trainer, "fit", fit)
        yield
        assert not Path("out", "search_result.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max_drop=-0.1"], "max_drop is how much val_acc may lose, absolute and at least 0"),
            (["--metric=val_accuracy"], "never logs 'val_accuracy'; closest of what it logs: 'val_acc'"),
            (["--trainer.limit_val_batches=0"], "the validation set is empty, --trainer.limit_val_batches is 0"),
            (["--objective=speed"], "objective is one of ['bytes', "),
            (["--scheme=blocks"], "scheme is one of ['block', "),
            (["--recovery=hope"], "recovery is one of ['agp', 'lc', 'none', 'one_shot', 'rewind'], got 'hope'"),
            (["--recovery=agp", "--recovery_epochs=0"], "recovery trains for at least one epoch"),
            (["--n_trials=1"], "n_trials is at least 2, got 1"),
            (["--tuning_steps=-1"], "candidates are tuned for some steps, or for none (0), got tuning_steps=-1"),
            (["--calibration_examples=0"], "repairing needs examples, got calibration_examples=0"),
            (["--levels=[0.5,1.5]"], "levels are shares removed, in (0, 1), got [0.5, 1.5]"),
            (["--names=[network.layer.0.weight]"], "closest: 'network.layers.0.weight'"),
            (["--batch_size=0"], "got batch_size=0"),
            (["--quantize=int9"], "got quantize='int9'; closest: 'int8'"),
            (["--quantize=mixed"], "'macs' does not depend on it: give objective 'latency' or 'throughput'"),
            (["--quantize.exclude=network.fc"], "exclude names 'network.fc', which matches none of the 2 layers"),
            (["--quantize.bits=9"], "bits is a width of 2 to 8, or 16, got bits=9"),
            (["--storage=postgresql://nobody:secret@127.0.0.1:9/none"], "://nobody:***@127.0.0.1:9/none"),
            (["--storage=mysql+none://x/y"], "mysql+none://x/y is no storage"),
            (["--ckpt_path=none.ckpt"], "there is no checkpoint at 'none.ckpt'"),
        ],
    )
    def test_bad_options(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        error = error_of("search", *NETWORK, *SETTINGS, *SMALL, *arguments, code=1, capsys=capsys)
        assert error.startswith("error: ")
        assert message in error
        assert "secret" not in error

    def test_other_modes_do_not_parse(self, capsys: pytest.CaptureFixture[str]) -> None:
        error = error_of("search", *NETWORK, "--mode=best", code=2, capsys=capsys)
        assert "max" in error
        assert "min" in error

    def test_an_empty_validation_set(self) -> None:
        with pytest.raises(ValueError, match="validation logged nothing: the validation set is empty"):
            by_python(data=TinyData(val_batches=0))

    def test_a_profile_of_another_machine(self) -> None:
        device = next(path for path in (ROOT / "configs" / "devices").glob("*.json"))
        with pytest.raises(ValueError, match=r"machine|analytic|device"):
            by_python(profile=str(device))

    def test_no_training_data(self) -> None:
        class Only(TinyData):
            train_dataloader = LightningDataModule.train_dataloader

        with pytest.raises(
            ValueError, match="Only has no train_dataloader, whose inputs the kept weights are fitted on"
        ):
            by_python(data=Only())


def test_a_dense_network_that_is_no_better_than_chance() -> None:
    class Known(Wide):
        num_classes = 4

    model = Known()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.net[4].bias[3] = 1.0  # all examples are of the last class then, the rarest of the 64
    torch.save({"state_dict": model.state_dict(), "epoch": 0}, "constant.ckpt")
    with pytest.raises(ValueError, match=r"val_acc of the dense network is 0\.1\d+, no better than chance \(0\.25\)"):
        trainer().search(Known(), TinyData(), objective="macs", ckpt_path="constant.ckpt", output="out")


def test_a_full_disk_while_results_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        calls.append(name)
        if name.startswith(".recipe.yaml"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    error = error_of("search", *NETWORK, *SETTINGS, *SMALL, code=1, capsys=capsys)
    assert "No space left on device" in error
    assert "finished trials are kept. To go on, give the same options and --ckpt_path" in capsys.readouterr().out
    names = {path.name for path in Path("out").iterdir()}
    assert "plan.yaml" in names  # was written before, and whole
    assert not names & {"recipe.yaml", "search_result.json"}
    assert not [name for name in names if name.endswith(".tmp")]
    SparsityPlan.load("out/plan.yaml")
    monkeypatch.setattr(os, "fsync", fsync)
    [checkpoint] = Path("runs").rglob("best.ckpt")
    found = search(f"--ckpt_path={checkpoint}")  # with what was evaluated before
    assert found["evaluations"] == 5 + 1


def test_ctrl_c_says_how_to_go_on() -> None:
    command = launch("search", *NETWORK, *SETTINGS, "--recovery=none", "--trainer.max_epochs=1", "--profile=d.json")
    command += ["--output=out", "--n_trials=400", "--calibration_examples=64", "--names=[network.layers.*]"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening
    )
    try:
        give_up = time.monotonic() + 120
        while finished() < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 1
    assert err.rstrip().endswith("Interrupted.")
    assert "Traceback" not in out + err
    said = re.search(r"To go on, give the same options and (.*)", out)
    assert said, out
    kept = finished()
    assert kept >= 3

    rest = said.group(1).split()
    n_trials = kept + 3  # the dense one and two more
    arguments = [one for one in command if not one.startswith(("--n_trials", "--output"))]
    again = subprocess.run(
        [*arguments, f"--n_trials={n_trials}", "--output=out2", *rest],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert "Training the dense network" not in again.stdout
    found = json.loads(Path("out2", "search_result.json").read_text())
    assert found["evaluations"] == n_trials + 1
    assert finished() == n_trials - 1


def finished() -> int:
    """Evaluations in the database."""
    path = Path("out", "study.db")
    if not path.exists():
        return 0
    try:
        study = optuna.load_study(study_name="search", storage=f"sqlite:///{path.absolute()}")
    except Exception:  # it is being made
        return 0
    trials = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    return sum("plan" in trial.user_attrs for trial in trials)


def test_python_needs_no_command_line() -> None:
    result = by_python()
    recipe = yaml.safe_load(Path("out", "recipe.yaml").read_text())
    assert list(recipe) == ["trainer"]
    assert "command:" not in Path("out", "recipe.yaml").read_text()
    [pruning] = recipe["trainer"]["callbacks"]
    assert SparsityPlan(pruning["init_args"]["sparsity"]) == result.plan
    saved = SearchResult.load("out/search_result.json")
    assert replace(saved, details={}) == replace(result, details={})
    assert saved.details["seconds"] == result.details["seconds"]


def test_a_front_is_written_and_nothing_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["search", *NETWORK, *SMALL, "--objective=macs", "--max_drop=null", "--n_trials=8"])
    found = json.loads(Path("out", "search_result.json").read_text())
    assert found["max_drop"] is None
    assert found["evaluations"] == 8
    assert found["plan"] == {}
    assert len(found["details"]["front"]) > 1
    assert not Path("out", "recipe.yaml").exists()
    assert not Path("out", "plan.yaml").exists()
    page = Path("out", "report.html").read_text()
    assert f"A front of {len(found['details']['front'])} plans" in page
    said = " ".join(capsys.readouterr().out.split())
    assert "front of macs and val_acc" in said
    assert "plans are in the first" in said
