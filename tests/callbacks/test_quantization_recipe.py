"""The configurations in recipes/quantization train, prune, and show what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.cli import PruneCLI
from lightning_prune.zoo import MLP
from tests.support import share_of_zeros

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quantization"


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("evaluate", {"val_acc_int8", "val_loss_int8_symmetric_drop", "val_acc_top5_int4", "val_acc_int8_at_target"}),
        ("aware", {"val_acc_int4", "val_acc_int4_drop"}),
    ],
)
def test_configurations_run(name: str, metrics: set[str], tmp_path: Path) -> None:
    path = RECIPE / f"{name}.yaml"
    command = path.read_text().splitlines()[1].split()
    assert command[:3] == ["#", "lightning-prune", "fit"]
    files = [f"--config={ROOT / file}" for file in command[4::2]]
    assert files[-1] == f"--config={path}"
    quick = [
        *("--trainer.accelerator=cpu", "--trainer.max_epochs=4", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli = PruneCLI(["fit", *files, *quick])
    assert metrics <= cli.trainer.callback_metrics.keys()
    network = cli.model.network
    assert isinstance(network, MLP)
    assert share_of_zeros(network) == pytest.approx(0.9, abs=1e-4)
    best = [each for each in vars(cli.trainer)["callbacks"] if isinstance(each, ModelCheckpoint)][-1]
    stored = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {name.removeprefix("network.") for name in stored} == set(network.state_dict())


def test_the_page_names_what_is_there() -> None:
    page = (RECIPE / "README.md").read_text()
    for path in RECIPE.glob("*.yaml"):
        assert f"recipes/quantization/{path.name}" in page
