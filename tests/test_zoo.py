"""Networks, pretrained weights and the Classifier."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_prune.zoo import (
    CIFAR10,
    MLP,
    CIFARResNet,
    Classifier,
    Digits,
    HanCNN,
    SmallCNN,
    load_weights,
    torchvision_network,
)
from lightning_prune.zoo.cifar_resnet import BasicBlock

DATA = os.environ.get("LIGHTNING_PRUNE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LIGHTNING_PRUNE_DATA does not name a data folder")


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def trainer(**kwargs: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **{**quiet, **kwargs})


# Networks


@pytest.mark.parametrize(
    ("build", "shape", "count"),
    [
        (MLP, (1, 8, 8), 50_610),
        (lambda: MLP([784, 300, 100, 10]), (1, 28, 28), 266_610),
        (SmallCNN, (1, 8, 8), 9 * (16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 650),
        (SmallCNN, (1, 28, 28), 24_058),
        (lambda: SmallCNN(3, [8], 4), (3, 5, 7), 9 * 24 + 16 + 36),
        (HanCNN, (1, 28, 28), 228_010),
        (lambda: CIFARResNet(20), (3, 32, 32), 269_722),
        (lambda: CIFARResNet(32), (3, 32, 32), 464_154),
        (lambda: CIFARResNet(44), (3, 32, 32), 658_586),
        (lambda: CIFARResNet(56), (3, 32, 32), 853_018),
        (lambda: torchvision_network("resnet18", num_classes=7), (3, 64, 64), 11_180_103),
    ],
)
def test_network_maps_images_to_logits(build: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> None:
    network = build()
    assert parameters(network) == count
    logits = network.eval()(torch.randn(2, *shape))
    assert logits.shape[0] == 2
    assert logits.ndim == 2


def test_option_a_shortcut_pads_channels_on_both_sides() -> None:
    block = BasicBlock(16, 32, stride=2).eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().max() == out[:, 24:].abs().max() == 0


@pytest.mark.parametrize("depth", [7, 21, 2])
def test_cifar_resnet_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2, got depth={depth}"):
        CIFARResNet(depth)


def test_wrong_input_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="set its first width to 784"):
        MLP()(torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match="at least two widths"):
        MLP([3])
    with pytest.raises(ValueError, match="at least one convolution"):
        SmallCNN(channels=[])
    with pytest.raises(ValueError, match="'resnet50'"):
        torchvision_network("resnet_50")


# Weights


@pytest.mark.parametrize("prefix", ["", "module.", "network.", "network._orig_mod."])
@pytest.mark.parametrize("nested", [True, False])
def test_weights_load_under_every_usual_prefix(tmp_path: Path, prefix: str, nested: bool) -> None:
    source, target = MLP([4, 3, 2]), MLP([4, 3, 2])
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state} if nested else state, tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_weights_that_do_not_fit_leave_the_network_alone(tmp_path: Path) -> None:
    network = MLP([4, 3, 2])
    before = network.state_dict()["layers.0.weight"].clone()
    torch.save(MLP([4, 3, 3, 2]).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"does not fit MLP.*unknown layers\.2\.weight.*layers\.1\.weight \[3, 3\]"):
        load_weights(network, tmp_path / "other.pt")
    assert torch.equal(network.state_dict()["layers.0.weight"], before)


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("harm",)


def test_weights_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "harmful.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(MLP(), "harmful.pt")
    assert not Path("harm").exists()


def test_weights_from_damaged_or_missing_files(tmp_path: Path) -> None:
    torch.save(MLP().state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for name, damaged in {"cut.pt": content[:1000], "text.pt": b"no weights", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            load_weights(MLP(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_weights(MLP(), tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds list"):
        load_weights(MLP(), tmp_path / "list.pt")


@needs_data
def test_published_resnet20_scores_as_measured() -> None:
    weights = f"{DATA}/cifar_resnets/resnet20-12fca82f.th"
    model = Classifier(CIFARResNet(20), initialize_from=weights)
    data = CIFAR10(variant="lossless_subset", batch_size=339, download=False)
    [scores] = trainer().test(model, data, verbose=False)
    assert scores["test_acc"] == pytest.approx(0.9164, abs=0.0005)
    assert scores["test_acc_top5"] > 0.99


# Classifier


def fitted(model: Classifier, **kwargs: Any) -> Trainer:
    run = trainer(max_epochs=2, log_every_n_steps=1, **kwargs)
    run.fit(model, Digits())
    return run


def test_classifier_learns_and_logs() -> None:
    torch.manual_seed(0)
    model = Classifier(MLP(), input_shape=[1, 8, 8])
    run = fitted(model)
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_acc", "val_acc_top5"}
    assert run.callback_metrics["val_acc"] > 0.8
    assert all(name.startswith("network.") for name, _ in model.named_parameters())
    assert torch.equal(torch.as_tensor(model.example_input_array), torch.zeros(1, 1, 8, 8))
    # The logged accuracy is the plain share of right answers.
    data = Digits()
    data.setup("validate")
    images, labels = data._sets["val"].__getitems__(list(range(359)))
    share = (model.eval()(images).argmax(1) == labels).float().mean()
    assert run.callback_metrics["val_acc"] == pytest.approx(share.item(), abs=1e-6)


def test_predictions_are_probabilities() -> None:
    predictions = trainer().predict(Classifier(MLP()), Digits())
    assert predictions is not None
    probabilities = torch.cat([batch for batch in predictions if isinstance(batch, Tensor)])
    assert probabilities.shape == (359, 10)
    assert torch.allclose(probabilities.sum(1), torch.ones(359))


def test_top5_only_where_it_means_something() -> None:
    assert set(Classifier(MLP([64, 5]), num_classes=5).val_metrics.keys()) == {"val_acc"}


def test_cosine_that_ends_elsewhere_is_reported() -> None:
    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.CosineAnnealingLR:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)

    with pytest.warns(UserWarning, match=r"T_max=5.*max_epochs=2"):
        fitted(Classifier(MLP(), lr_scheduler=cosine), limit_train_batches=2)


def test_plateau_scheduler_is_monitored() -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau

    model = Classifier(MLP(), lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val_loss"))
    run = fitted(model, limit_train_batches=2)
    assert run.lr_scheduler_configs[0].monitor == "val_loss"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes >= 2, got 1"),
        ({"label_smoothing": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_classifier_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(MLP(), **arguments)


def test_classifier_names_a_wrong_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"num_classes=7\], but its network MLP returned \[1, 10\]"):
        Classifier(MLP(), num_classes=7)(torch.zeros(1, 64))
