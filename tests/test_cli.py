"""The command line, the configurations and the folders of runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_prune.callbacks.monitor import SparsityMonitor
from lightning_prune.callbacks.pruning import Pruning
from lightning_prune.cli import PruneCLI, main
from lightning_prune.granularities import Filter
from lightning_prune.moments import Epochs, Steps
from lightning_prune.schedules import AGP, Iterative, OneShot
from lightning_prune.trainer import PruneTrainer
from lightning_prune.zoo import HanCNN, ImageFolderData

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
NETWORKS_ON = {
    "cnn": "digits",
    "mlp": "digits",
    "han_cnn": "mnist",
    "cifar_resnet20": "cifar10",
    "torchvision": "cifar10",
}
DATA = ["digits", "mnist", "cifar10", "imagefolder"]
PRUNING = {"one_shot": OneShot(), "iterative": Iterative(steps=5), "agp": AGP()}
COMPOSED = [
    *([name] for name in [*DATA, "digits_agp"]),
    *([data, network] for network, data in NETWORKS_ON.items()),
    *([data, block] for data in DATA for block in PRUNING),
    *([data, network, block] for network, data in NETWORKS_ON.items() for block in PRUNING),
]
ON_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def configs(*names: str) -> list[str]:
    return [f"--config={CONFIGS / name}.yaml" for name in names]


def build(*arguments: str) -> PruneCLI:
    return PruneCLI([*ON_CPU, *arguments], run=False)


def callbacks_of(cli: PruneCLI) -> list[Callback]:
    # Lightning sets this attribute from outside the Trainer, where no type checker sees it.
    callbacks: list[Callback] = vars(cli.trainer)["callbacks"]
    return callbacks


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_table_names_every_configuration() -> None:
    composed = {name for names in COMPOSED for name in names}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == composed | {"digits_search"}  # which is for `search`


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_begin_with_their_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert comment == lines[: len(comment)]
    assert 1 <= len(comment) <= 3
    assert comment[1].startswith(("#   lightning-prune fit --config configs/", "#   lightning-prune search --config "))
    named = set(re.findall(r"configs/(\w+)\.yaml", " ".join(comment)))
    assert path.stem in named
    assert named <= {other.stem for other in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("names", COMPOSED, ids="-".join)
def test_configurations_compose(names: list[str]) -> None:
    cli = build(*configs(*names))
    assert isinstance(cli.trainer, PruneTrainer)
    # The name stems from the configurations, and no folder is made before there is something to write.
    assert Path(cli.trainer.loggers[0].log_dir or "") == Path("runs", "-".join(names), "version_0")
    assert not Path("runs").exists()
    callbacks = callbacks_of(cli)
    monitors = [c.monitor for c in callbacks if isinstance(c, ModelCheckpoint)]
    assert monitors[:1] == (["val_acc"] if names != ["digits_agp"] else ["val_acc_at_target"])
    pruned = [c for c in callbacks if isinstance(c, Pruning)]
    watched = [c for c in callbacks if isinstance(c, SparsityMonitor)]
    is_sparse = names[-1] in {*PRUNING, "digits_agp"}
    assert len(pruned) == len(watched) == is_sparse
    if is_sparse:
        assert pruned[0].schedule == PRUNING.get(names[-1], AGP())
        assert "val_acc_at_target" in monitors


def test_an_example_fits_every_network_and_its_data() -> None:
    for names in COMPOSED:
        if "imagefolder" not in names:  # 224 x 224 takes long and shows nothing more
            model = build(*configs(*names)).model.eval()
            with torch.no_grad():
                assert model(model.example_input_array).shape == (1, 10)


@pytest.mark.parametrize("names", [names for names in COMPOSED if names[0].startswith("digits")], ids="-".join)
def test_digits_configurations_run(names: list[str]) -> None:
    pruning = [HALF] if names[-1] in {*PRUNING, "digits_agp"} else []
    main(["fit", *configs(*names), *ON_CPU, *QUIET, *pruning, "--trainer.fast_dev_run=true"])
    assert not list(Path().rglob("config*.yaml"))


def test_the_last_callback_takes_options() -> None:
    options = ["--trainer.callbacks.sparsity=0.95", "--trainer.callbacks.schedule.power=2"]
    start = ["--trainer.callbacks.begin=Epochs", "--trainer.callbacks.begin.n=3"]
    cli = build(*configs("digits", "agp"), *options, *start)
    [pruning] = [c for c in callbacks_of(cli) if isinstance(c, Pruning)]
    assert pruning.schedule == AGP(power=2)
    assert pruning.begin == Epochs(3)
    cli = build(*configs("digits", "agp"), "--trainer.callbacks.begin=Steps", "--trainer.callbacks.begin.n=5")
    [pruning] = [c for c in callbacks_of(cli) if isinstance(c, Pruning)]
    assert pruning.begin == Steps(5)


MOMENTS: list[tuple[Any, Any]] = [
    ({"class_path": "Steps", "init_args": {"n": 40}}, Steps(40)),
    ({"class_path": "Epochs", "init_args": {"n": 2}}, Epochs(2)),
    ({"class_path": "lightning_prune.Steps", "init_args": {"n": 40}}, Steps(40)),
    (0.25, 0.25),
]


@pytest.mark.parametrize(("written", "meant"), MOMENTS)
@pytest.mark.parametrize("where", ["begin", "every", "rewind"])
def test_moments_keep_their_units_in_yaml_and_in_the_saved_configuration(
    where: str, written: Any, meant: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "sparsity": {"*": 0.5, "network.layers.0*": {"sparsity": 0.75, "granularity": {"class_path": "Filter"}}},
        "schedule": {"class_path": "OneShot"},
        "scope": {"all": "*"},
        "begin": {"class_path": type(meant).__name__, "init_args": {"n": 50}} if where == "rewind" else 0.0,
        "end": 1.0,
        where: {"class_path": "WeightRewinding", "init_args": {"to": written}} if where == "rewind" else written,
    }
    if where == "rewind" and meant == 0.25:
        options["begin"] = 0.5
    path = tmp_path / "pruning.yaml"
    for _ in range(2):  # as written, and as the configuration is saved
        path.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "Pruning", "init_args": options}]}}))
        cli = build(*configs("digits"), f"--config={path}")
        [pruning] = [c for c in callbacks_of(cli) if isinstance(c, Pruning)]
        found = getattr(pruning.rewind, "to", None) if where == "rewind" else getattr(pruning, where)
        assert found == meant
        assert type(found) is type(meant)
        assert pruning.target.granularity("network.layers.0*") == Filter()
        saved = yaml.safe_load(cli.parser.dump(cli.config))["trainer"]["callbacks"]
        [options] = [each["init_args"] for each in saved if each["class_path"].endswith("Pruning")]


def test_options_override_networks_and_data() -> None:
    cli = build(*configs("mnist"), "--model.network=lightning_prune.zoo.HanCNN", "--model.network.dropout=0.1")
    assert isinstance(cli.model.network, HanCNN)
    cli = build(*configs("imagefolder"), "--data.folder=pictures", "--data.batch_size=3")
    assert isinstance(cli.datamodule, ImageFolderData)
    assert (str(cli.datamodule.folder), cli.datamodule.batch_size) == ("pictures", 3)


# The whole command, in a process of its own


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(launch(*arguments), env=environment(), capture_output=True, text=True, timeout=120)


def launch(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lightning_prune.cli", *arguments]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"LIGHTNING_PRUNE_DATA", "LIGHTNING_PRUNE_DEBUG"}}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


SHORT = ["--trainer.max_epochs=4", "--trainer.limit_train_batches=3", "--trainer.log_every_n_steps=1", *ON_CPU]
# So soon a global threshold for 90 % empties the layer with the smallest initial weights, which is reported.
HALF = "--trainer.callbacks.sparsity=0.5"


def test_two_runs_share_a_folder_and_each_can_be_repeated_and_tested() -> None:
    results = [command("fit", *configs("digits", "agp"), *SHORT, HALF) for _ in range(2)]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "Before and after pruning" in result.stdout
        assert "Warning" not in result.stderr
    runs = [Path("runs", "digits-agp", f"version_{number}") for number in range(2)]
    for run in runs:
        settings = yaml.safe_load((run / "config.yaml").read_text())
        assert settings["trainer"]["max_epochs"] == 4
        assert settings["seed_everything"] == 0
        assert list(run.glob("events.out.tfevents*"))
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "best-sparse.ckpt"}
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs)
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())

    checkpoint = runs[0] / "checkpoints" / "best-sparse.ckpt"
    tested = command("test", f"--config={runs[0] / 'config.yaml'}", f"--ckpt_path={checkpoint}", *QUIET)
    assert tested.returncode == 0, tested.stderr
    assert "test_acc" in tested.stdout
    assert Path("runs", "digits-agp", "version_2", "config.yaml").is_file()


def test_runs_without_a_logger_do_not_collide() -> None:
    silent = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"]
    for _ in range(2):
        main(["fit", *configs("digits"), *SHORT, *QUIET, *silent])
    assert not list(Path().rglob("config*.yaml"))


@pytest.mark.filterwarnings("ignore:Experiment logs directory:UserWarning", "ignore:Checkpoint directory:UserWarning")
def test_a_second_run_in_one_folder_keeps_the_first_configuration() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv", "--trainer.logger.version=v"]
    for epochs in (1, 2):
        main(["fit", *configs("digits"), *SHORT, *QUIET, *logger, f"--trainer.max_epochs={epochs}"])
    folder = Path("csv", "lightning_logs", "v")
    kept = [yaml.safe_load((folder / name).read_text()) for name in ("config.yaml", "config_1.yaml")]
    assert [settings["trainer"]["max_epochs"] for settings in kept] == [1, 2]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "\n  lightning-prune fit --config configs/digits_agp.yaml\n" in shown
    assert "LIGHTNING_PRUNE_DATA" in shown
    for subcommand in ("fit", "validate", "test", "predict"):
        assert re.search(rf"^    {subcommand} ", shown, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_options_of_a_subcommand_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--config FILE [--config FILE ...]" in shown.splitlines()[0]
    assert "--trainer.name" in shown


def error_of(*arguments: str, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    if isinstance(stop.value.code, str):  # Python prints it and exits with 1
        assert code == 1
        return stop.value.code
    assert stop.value.code == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data.batch_size=0"], 1, "error: Digits needs batch_size >= 1, got 0."),
        (["--model.network.widths=[64]"], 1, "error: MLP needs at least two widths"),
        (["--trainer.max_epoch=3"], 2, "unrecognized arguments: --trainer.max_epoch=3"),
        (["--model.network.depth=20"], 2, "Option 'depth' is not accepted"),
        (["--trainer.precision=7"], 2, "trainer.precision"),
        (["--model.initialize_from=none.pt"], 1, "error: No weights at 'none.pt'; check the path"),
        (["--config=none.yaml"], 2, "none.yaml"),
        (["--ckpt_path=none.ckpt"], 1, "none.ckpt"),
    ],
)
def test_errors_are_one_message(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of("fit", *configs("digits"), *QUIET, *ON_CPU, *arguments, code=code, capsys=capsys)
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("sparsity: 1.5", r"\[0, 1\], got 1.5"),
        ("{sparsity: 0.5, begin: 0.6, end: 0.5}", r"begin"),
        ("sparsity: {network.layer.0.weight: 0.5}", "'network.layers.0.weight'"),
        ("sparsity: none.yaml", "none.yaml"),
    ],
)
def test_wrong_pruning_is_one_message(settings: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [{"class_path": "Pruning", "init_args": yaml.safe_load(settings)}]
    Path("wrong.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
    error = error_of("fit", *configs("digits"), "--config=wrong.yaml", *QUIET, *ON_CPU, code=1, capsys=capsys)
    assert re.search(message, error)
    assert "Union subtypes" not in error


def test_unknown_key_in_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    Path("typo.yaml").write_text("trainer:\n  max_epoch: 3\n")
    error = error_of("fit", *configs("digits"), "--config=typo.yaml", code=2, capsys=capsys)
    assert "does not accept option 'trainer.max_epoch'" in error


def test_unwritable_output_folder_is_reported_before_any_work() -> None:
    Path("file").write_text("not a folder")
    start = time.monotonic()
    result = command("fit", *configs("digits"), "--trainer.default_root_dir=file/runs")
    assert result.returncode == 1
    assert "The output folder 'file/runs' cannot be written" in result.stderr
    assert "file' is not a folder; set --trainer.default_root_dir" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Epoch" not in result.stdout
    assert time.monotonic() - start < 60


def test_missing_data_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", "nowhere")
    arguments = [*configs("mnist"), *QUIET, *ON_CPU, "--data.download=false"]
    error = error_of("fit", *arguments, code=1, capsys=capsys)
    assert error.startswith("error: No readable MNIST")
    assert "'nowhere'" in error


def test_debug_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_DEBUG", "1")
    with pytest.raises(ValueError, match="batch_size >= 1"):
        main(["fit", *configs("digits"), *QUIET, "--data.batch_size=0"])


def test_errors_of_others_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: HanCNN, x: object) -> None:
        int("a message that explains nothing")

    monkeypatch.setattr("lightning_prune.zoo.mlp.nn.Linear.forward", broken)
    monkeypatch.setitem(broken.__globals__, "__name__", "somewhere.else")
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", *configs("digits"), *ON_CPU, *QUIET, "--trainer.fast_dev_run=true"])


def listening() -> None:
    """For `preexec_fn`: a shell that puts the tests in the background has their children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_interrupt_ends_without_a_traceback() -> None:
    endless = ["--trainer.max_epochs=100000", "--trainer.callbacks=null", *ON_CPU, *QUIET]
    arguments = launch("fit", *configs("digits"), *endless)
    with subprocess.Popen(
        arguments, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=listening
    ) as process:
        deadline = time.monotonic() + 60
        while not list(Path("runs").rglob("events.out*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in stderr


# PruneTrainer in Python


def test_trainer_keeps_runs_below_runs() -> None:
    trainer = PruneTrainer(accelerator="cpu")
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert Path(trainer.logger.log_dir) == Path("runs", "default", "version_0")
    assert PruneTrainer(accelerator="cpu", logger=False).loggers == []
    logger = CSVLogger("elsewhere")
    assert PruneTrainer(accelerator="cpu", logger=logger).loggers == [logger]
    assert PruneTrainer(accelerator="cpu", barebones=True).loggers == []


def test_trainer_refuses_an_unwritable_folder() -> None:
    Path("file").write_text("not a folder")
    with pytest.raises(ValueError, match="'file' cannot be written because"):
        PruneTrainer(accelerator="cpu", default_root_dir=Path("file"))
    with pytest.raises(ValueError, match="logger's save_dir"):
        PruneTrainer(accelerator="cpu", logger=CSVLogger("file/logs"))
