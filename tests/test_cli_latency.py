"""`lightning-prune calibrate` and `profile`, really run, on the digits and a tiny network."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune import NM, DeviceProfile, SparsityPlan
from lightning_prune.cli import main
from lightning_prune.commands.network import example_inputs
from lightning_prune.latency import passes, session
from lightning_prune.trainer import PruneTrainer
from tests.support import Tiny, loader
from tests.test_cli import ON_CPU, QUIET, configs, environment, error_of, launch

NETWORK = [*configs("digits", "mlp"), "--model.network.widths=[64,32,10]", *ON_CPU, *QUIET]
SHORT = ["--rounds=1", "--spread=0"]
LAYERS = ["network.layers.0.weight", "network.layers.1.weight"]
DEVICES = sorted((Path(__file__).parents[1] / "configs" / "devices").glob("*.json"))
ANALYTIC = [path for path in DEVICES if DeviceProfile.load(path).machine.kind == "analytic"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def calibrate(*arguments: str) -> None:
    main(["calibrate", *NETWORK, *SHORT, *arguments])


def profile(*arguments: str) -> dict[str, Any]:
    main(["profile", *NETWORK, "--output=latency", *arguments])
    report: dict[str, Any] = json.loads(Path("latency", "kernel_report.json").read_text())
    return report


def python_trainer() -> PruneTrainer:
    return PruneTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)


def test_calibrate_then_profile(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        calibrate()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "Kernels for the 2 layers of Classifier" in shown
    assert re.search(r"bsr-16 .* 2: blocks of 16 x 16 do not divide .*, and the like|bsr-16 .* 1: blocks", shown)
    assert "2:4 products run on NVIDIA GPUs" in shown
    assert re.search(r"fixed part, nchw: [\d.e-]+ ms of [\d.e-]+ ms", shown)
    assert "written: device.json" in shown
    device = DeviceProfile.load("device.json")
    assert (device.machine.threads, device.machine.dtype, device.rounds) == (1, "float32", 1)
    assert {m.work.batch for m in device.measurements} == {1}

    report = profile("--plan=0.9")
    shown = capsys.readouterr().out
    assert [row["layer"] for row in report["layers"]] == LAYERS
    for row in report["layers"]:
        assert row["sparsity"] == pytest.approx(0.9, abs=0.01)
        assert min(row["estimated_s"], row["measured_s"], row["dense_s"]) > 0
        assert row["layer"] in shown
        assert row["pays_from"] == "never" or 0 <= row["pays_from"] < 1
    assert report["schema"] == "lightning-prune/kernel-report/1"
    assert report["calibrated"] is True
    assert report["machine"]["device"] == device.machine.device
    assert report["speedup"] == pytest.approx(report["dense_s"] / report["measured_s"])
    assert report["relative_error"] <= 1e-4
    assert [curve["layer"] for curve in report["speedup_curves"]] == LAYERS
    assert Path("latency", "speedup.png").read_bytes().startswith(b"\x89PNG")
    for words in ("pays from", "estimated ms", "measured ms", "dense ms", "whole pass", "a pass takes"):
        assert words in shown
    slow = [row["layer"] for row in report["layers"] if row["kernel"].startswith("dense")]
    assert (f"Zeros do not pay in {len(slow)} of 2 layers" in shown) == bool(slow)
    assert all(f"  {name}: 0.9" in shown for name in slow)
    assert not Path("runs").exists()


def test_calibrating_again_measures_nothing_again_and_extends(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate()
    first = DeviceProfile.load("device.json")
    calibrate()
    assert DeviceProfile.load("device.json").measurements == first.measurements
    calibrate("--batch_size=5")
    extended = DeviceProfile.load("device.json")
    assert len(extended.networks) == 2
    assert {m.work.batch for m in extended.measurements} == {1, 5}
    capsys.readouterr()
    report = profile("--batch_size=3")
    assert report["calibrated"] is False
    assert "This network was not calibrated at this batch size" in capsys.readouterr().out


def test_an_interrupted_calibration_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = passes.measure_kernel

    def interrupted(kernel: Any, *args: Any, **options: Any) -> Any:
        if kernel.uses_sparsity:
            raise KeyboardInterrupt
        return real(kernel, *args, **options)

    monkeypatch.setattr(session, "measure_kernel", interrupted)
    with pytest.raises(SystemExit, match="Interrupted"):
        calibrate("--output=mine/device.json")
    assert "what was measured is kept in mine/device.json; the same command goes on" in capsys.readouterr().out
    kept = DeviceProfile.load("mine/device.json").measurements
    assert {m.kernel for m in kept} == {"dense"}
    monkeypatch.setattr(session, "measure_kernel", real)
    calibrate("--output=mine/device.json")
    whole = DeviceProfile.load("mine/device.json")
    assert set(whole.measurements) > set(kept)
    assert "csr" in whole.costs

    def at_once(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "measure_kernel", at_once)
    with pytest.raises(SystemExit, match="Interrupted"):
        calibrate("--output=none.json")
    assert "nothing was measured yet" in capsys.readouterr().out


def test_a_half_calibrated_profile_asks_for_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate()
    whole = json.loads(Path("device.json").read_text())
    Path("half.json").write_text(json.dumps({**whole, "costs": {}}))
    error = error_of("profile", *NETWORK, "--device_profile=half.json", code=1, capsys=capsys)
    assert "calibrate" in error


def test_weights_of_a_checkpoint_and_the_folder_of_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.name=tiny"]
    main(["fit", *NETWORK, *short])
    run = Path("runs", "tiny", "version_0")
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"][LAYERS[0]][:24] = 0
    torch.save(checkpoint, path)
    calibrate(f"--ckpt_path={path}")
    # As the run was configured, and from where nothing else is said.
    main(["profile", f"--config={run / 'config.yaml'}", f"--ckpt_path={path}"])
    report = json.loads((run / "latency" / "kernel_report.json").read_text())
    assert report["layers"][0]["sparsity"] == 0.75
    assert report["checkpoint"] == str(path)
    assert (run / "latency" / "speedup.png").is_file()
    assert not Path("runs", "tiny", "version_1").exists()
    assert "0.750" in capsys.readouterr().out


def test_a_plan_from_a_file_with_patterns_of_its_own() -> None:
    calibrate()
    SparsityPlan({"*": 0.75, LAYERS[0]: (0.5, NM(2, 4))}).save("plan.yaml")
    report = profile("--plan=plan.yaml", "--granularity=Block", "--granularity.rows=2", "--granularity.cols=2")
    # Blocks may leave inputs of the second layer without consumers; its own zeros are what the plan says at least.
    assert report["layers"][0]["sparsity"] == pytest.approx(0.5)
    assert report["layers"][1]["sparsity"] == pytest.approx(0.75, abs=0.02)
    assert report["plan"] == "plan.yaml"
    assert report["granularity"] == "Block(rows=2, cols=2)"


@pytest.mark.parametrize("path", ANALYTIC, ids=lambda path: path.stem)
def test_an_analytic_profile_is_only_estimated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = profile(f"--device_profile={path}", "--plan=0.8")
    shown = capsys.readouterr().out
    assert "nothing was executed, all times are estimates" in shown
    assert "measured ms" not in shown
    assert report["measured_s"] is report["relative_error"] is None
    assert all(row["measured_s"] is None for row in report["layers"])
    assert 0 < report["estimated_s"] <= report["dense_s"]
    assert report["speedup"] == pytest.approx(report["dense_s"] / report["estimated_s"])
    assert sum(row["estimated_s"] for row in report["layers"]) == pytest.approx(report["estimated_s"], rel=1e-3)
    losing = [row for row in report["layers"] if row["estimated_s"] > 0.98 * row["dense_s"]]
    assert (f"Zeros do not pay in {len(losing)} of 2" in shown) == bool(losing)
    for row in losing:
        assert row["pays_from"] == "never" or row["pays_from"] > 0.78


def test_wrong_settings_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def error(command: str, *arguments: str, code: int = 1) -> str:
        return error_of(command, *NETWORK, *arguments, code=code, capsys=capsys)

    assert "no device profile at 'device.json'; write one with `lightning-prune calibrate`" in error("profile")
    Path("broken.json").write_text('{"schema": "lightning-pru')
    assert "broken.json is not a whole device profile" in error("profile", "--device_profile=broken.json")
    assert "broken.json is not a whole device profile" in error("calibrate", "--output=broken.json")
    Path("bytes.json").write_bytes(b"\xff\xfe")
    assert "bytes.json is not a whole device profile" in error("profile", "--device_profile=bytes.json")
    assert "batch_size=0" in error("calibrate", "--batch_size=0")
    assert "threads=0" in error("calibrate", "--threads=0")
    assert "rounds=0" in error("calibrate", "--rounds=0")
    assert "no checkpoint at 'none.ckpt'" in error("calibrate", "--ckpt_path=none.ckpt")
    torch.save({"weights": torch.zeros(1)}, "other.ckpt")
    assert "'other.ckpt' is no whole Lightning checkpoint" in error("calibrate", "--ckpt_path=other.ckpt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, "foreign.ckpt")
    assert "'foreign.ckpt' does not fit Classifier" in error("calibrate", "--ckpt_path=foreign.ckpt")
    assert "mixes two; give --trainer.precision" in error("calibrate", "--trainer.precision=bf16-mixed")
    assert "unrecognized arguments: --round=1" in error("calibrate", "--round=1", code=2)

    calibrate()
    assert "its threads is 1, here it is 2" in error("profile", "--threads=2")
    assert "write to another file with --output" in error("calibrate", "--threads=2")
    assert "write to another file with --output" in error("calibrate", f"--output={ANALYTIC[0]}")
    assert "no sparsity plan at 'none.yaml'" in error("profile", "--plan=none.yaml")
    assert "'network.layer.0.weight'" in error("profile", '--plan={"network.layer.0.weight": 0.5}')


def test_options_are_explained_and_the_commands_listed(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "calibrate": ("output", "batch_size", "threads", "rounds", "spread", "ckpt_path"),
        "profile": ("device_profile", "ckpt_path", "plan", "batch_size", "threads", "granularity", "output"),
    }
    for command, names in options.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert all(f"--{name} " in shown for name in names)
        assert "--datamodule" not in shown
        with pytest.raises(SystemExit):
            main(["--help"])
        shown = capsys.readouterr().out
        assert f"lightning-prune {command} --config" in shown
        assert re.search(rf"^    {command} ", shown, re.MULTILINE)


def test_the_command_in_a_process_of_its_own() -> None:
    arguments = launch("calibrate", *NETWORK, *SHORT)
    result = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "written: device.json" in result.stdout


def test_fit_imports_nothing_of_the_commands() -> None:
    code = "import sys, lightning_prune.cli; sys.exit('lightning_prune.commands' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


# Examples, in Python


class Data(LightningDataModule):
    """Rows of eight numbers that count up, with the loaders that a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"no {stage}")

    def rows(self, count: int = 2) -> DataLoader[Any]:
        x = torch.arange(count * 8.0).view(count, 8)
        return DataLoader([(row, 0) for row in x], batch_size=4)  # type: ignore[arg-type]


class Validation(Data):
    def val_dataloader(self) -> Any:
        return [self.rows(), self.rows(3)]

    def train_dataloader(self) -> Any:
        raise AssertionError("validation data come first")


class Training(Data):
    def val_dataloader(self) -> Any:
        return []

    def train_dataloader(self) -> Any:
        return {"a": self.rows(), "b": self.rows(3)}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 100, batch[1]]


@pytest.mark.parametrize(
    ("data", "first", "calls"),
    [
        (Validation(), 0.0, ["prepare", "validate", "no validate"]),
        (Training(), 100.0, ["prepare", "validate", "no validate", "fit", "no fit"]),
    ],
    ids=["validation", "training"],
)
def test_an_example_comes_from_data(data: Data, first: float, calls: list[str]) -> None:
    example = example_inputs(python_trainer(), Tiny(), data, 5)
    assert example[:, 0].tolist() == [first, first + 8, first, first + 8, first]
    assert data.calls == calls


def test_an_example_of_the_model_itself() -> None:
    class Own(Tiny):
        def val_dataloader(self) -> Any:
            return loader(batches=1)

    assert example_inputs(python_trainer(), Own(), None, 3).shape == (3, 8)
    model = Own()
    scale = torch.tensor([1.0, 2.0, 3.0])
    model.example_input_array = (torch.ones(2, 8), scale)
    x, other = example_inputs(python_trainer(), model, Validation(), 1)
    assert x.shape == (1, 8)
    assert other is scale


@pytest.mark.parametrize("data", [None, Data()], ids=["no data", "no loader"])
def test_without_an_example_there_is_nothing_to_run(data: Data | None) -> None:
    with pytest.raises(ValueError, match="set its example_input_array, or give data"):
        python_trainer().calibrate(Tiny(), data)


def test_the_model_stays_as_it_was_and_layers_are_built_when_lightning_would() -> None:
    class Late(Tiny):
        def configure_model(self) -> None:
            if len(self.net) == 3:
                self.net.append(torch.nn.Linear(4, 2))

    model = Late()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = python_trainer()
    device = trainer.calibrate(model, Validation(), rounds=1, spread=0)
    assert model.training
    assert {m.work.outputs for m in device.measurements} == {16, 4, 2}
    report = trainer.profile(model, Validation(), plan={"*": 0.5}, output="here")
    assert [row.layer for row in report.layers] == ["net.0.weight", "net.2.weight", "net.3.weight"]
    assert math.isfinite(report.estimated_s)
    after: dict[str, Tensor] = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_true_precision_is_measured_as_such() -> None:
    trainer = PruneTrainer(
        accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    assert trainer.calibrate(Tiny(), Validation(), rounds=1, spread=0).machine.dtype == "float64"
