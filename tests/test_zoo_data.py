"""Data modules: splits, layouts, augmentation and what is said where data is missing."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import nn

from lightning_prune.zoo import (
    CIFAR10,
    MNIST,
    Digits,
    ImageFolderData,
    ImageTensors,
    stratified_split,
)

DATA = os.environ.get("LIGHTNING_PRUNE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LIGHTNING_PRUNE_DATA does not name a data folder")


def prepare(data: LightningDataModule) -> None:
    data.prepare_data()
    data.setup("fit")


def contents(data: Any, part: str) -> set[bytes]:
    return {image.numpy().tobytes() for image in data._sets[part].images}


def test_split_is_stratified_disjoint_and_fixed() -> None:
    labels = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(1))
    rest, held_out = stratified_split(labels, 0.3, seed=4)
    assert sorted(torch.cat([rest, held_out]).tolist()) == list(range(500))
    assert torch.equal(labels[held_out].bincount(), (labels.bincount() * 0.3).round().long())
    torch.manual_seed(99)
    assert torch.equal(stratified_split(labels, 0.3, seed=4)[1], held_out)
    assert not torch.equal(stratified_split(labels, 0.3, seed=5)[1], held_out)
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="inside"):
            stratified_split(labels, share)


def test_digits() -> None:
    data = Digits(batch_size=100)
    data.setup("fit")
    sizes = {part: len(data._sets[part]) for part in ("train", "val", "test")}
    assert sum(sizes.values()) == 1797
    assert abs(sizes["test"] - 360) <= 2
    assert abs(sizes["val"] - 360) <= 2
    parts = [contents(data, part) for part in sizes]
    assert len(set.union(*parts)) == sum(len(part) for part in parts)
    images, labels = data._sets["train"].__getitems__(list(range(sizes["train"])))
    assert images.dtype == torch.float32
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02
    assert labels.bincount().min() > 100
    again = Digits()
    again.setup("test")
    assert contents(again, "train") == parts[0]
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, y.shape) == ((100, 1, 8, 8), (100,))


def test_batches_shuffle_for_training_only() -> None:
    data = Digits(batch_size=2000)
    data.setup("fit")
    first, second = (next(iter(data.train_dataloader()))[1] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (next(iter(data.val_dataloader()))[1] for _ in range(2))
    assert torch.equal(first, second)


def test_augmented_image_is_a_shifted_or_mirrored_one() -> None:
    torch.manual_seed(0)
    image = torch.randint(1, 256, (1, 3, 6, 6), dtype=torch.uint8)
    plain = ImageTensors(image, torch.zeros(1).long(), [0.0] * 3, [1 / 255] * 3)
    augmented = ImageTensors(image, torch.zeros(1).long(), [0.0] * 3, [1 / 255] * 3, augment=True)
    assert torch.allclose(plain[0][0], image[0].float())
    padded = nn.functional.pad(image[0].float(), (4, 4, 4, 4))
    windows = [padded[:, y : y + 6, x : x + 6] for y in range(9) for x in range(9)]
    allowed = windows + [window.flip(2) for window in windows]
    seen = set()
    for _ in range(300):
        crop = augmented[0][0]
        matches = [i for i, window in enumerate(allowed) if torch.allclose(crop, window)]
        assert matches
        seen.update(matches)
    assert len(seen) > 100


@pytest.mark.parametrize("build", [Digits, MNIST, CIFAR10])
def test_batch_size_below_one_is_refused(build: Callable[..., LightningDataModule]) -> None:
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        build(batch_size=0)


@pytest.mark.parametrize("variable", ["set", "unset"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: MNIST(download=False),
        lambda: CIFAR10(download=False),
        lambda: CIFAR10("jpeg"),
        lambda: CIFAR10("lossless_subset"),
    ],
)
def test_missing_data_names_folder_variable_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any], variable: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if variable == "set":
        monkeypatch.setenv("LIGHTNING_PRUNE_DATA", str(tmp_path / "nowhere"))
    else:
        monkeypatch.delenv("LIGHTNING_PRUNE_DATA", raising=False)
    folder = "nowhere" if variable == "set" else "data"
    with pytest.raises(FileNotFoundError, match=rf"{folder}' \(.*LIGHTNING_PRUNE_DATA.*point the variable"):
        prepare(build())


@needs_data
def test_mnist() -> None:
    data = MNIST(val_share=0.1, download=False)
    data.prepare_data()
    data.setup("fit")
    assert [len(data._sets[part]) for part in ("train", "val", "test")] == [54_001, 5_999, 10_000]
    images, labels = data._sets["train"].__getitems__(list(range(2000)))
    assert images.shape == (2000, 1, 28, 28)
    assert abs(images.mean().item()) < 0.05
    assert abs(images.std().item() - 1) < 0.05
    assert set(labels.tolist()) == set(range(10))


@needs_data
def test_cifar10_subset_is_split_by_class() -> None:
    auto = CIFAR10("auto", download=False)
    with pytest.warns(UserWarning, match="uses its 'lossless_subset' layout"):
        prepare(auto)
    data = CIFAR10("lossless_subset", download=False)
    data.setup("fit")
    assert len(data._sets["train"]) + len(data._sets["val"]) == 8068
    assert len(data._sets["test"]) == 1017
    assert torch.equal(auto._sets["val"].labels, data._sets["val"].labels)
    assert data._sets["train"].augment
    assert not data._sets["val"].augment
    shares = data._sets["val"].labels.bincount() / data._sets["train"].labels.bincount()
    assert torch.allclose(shares, torch.full((10,), 1 / 9), atol=0.002)


def jpeg_archive(path: Path, per_class: int, classes: list[str]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for part in ("train", "test"):
            for number, name in enumerate(classes):
                for index in range(per_class):
                    buffer = io.BytesIO()
                    Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)).save(buffer, "JPEG")
                    member = tarfile.TarInfo(f"{part}/{name}/{index:04}.jpg")
                    member.size = buffer.tell()
                    buffer.seek(0)
                    archive.addfile(member, buffer)


def test_cifar10_jpegs_are_read_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ["truck", "airplane", "dog"]
    jpeg_archive(tmp_path / "cifar10" / "cifar10_jpeg.tar.gz", 4, classes)
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", str(tmp_path))
    data = CIFAR10("jpeg", val_share=0.25, augment=False)
    data.prepare_data()
    data.setup("fit")
    test = data._sets["test"]
    shades = {int(label): int(image[0, 0, 0]) for image, label in zip(test.images, test.labels, strict=True)}
    assert shades == {0: 20, 1: 40, 2: 0}  # alphabetical: airplane, dog, truck
    assert [len(data._sets[part]) for part in ("train", "val", "test")] == [9, 3, 12]
    assert [path.name for path in tmp_path.rglob("*")] == ["cifar10", "cifar10_jpeg.tar.gz"]


def test_cifar10_validates_on_test_images_where_all_training_images_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg_archive(tmp_path / "cifar10" / "cifar10_jpeg.tar.gz", 4, ["airplane", "dog"])
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", str(tmp_path))
    data = CIFAR10("jpeg", val_from="test", val_share=0.5)
    data.setup("fit")
    sets = data._sets
    assert [len(sets[part]) for part in ("train", "val", "test")] == [8, 4, 4]
    assert sets["val"].labels.bincount().tolist() == sets["test"].labels.bincount().tolist() == [2, 2]
    assert [sets[part].augment for part in ("train", "val", "test")] == [True, False, False]
    with pytest.raises(ValueError, match="holds validation images out from 'train' or 'test', got val_from='all'"):
        CIFAR10("jpeg", val_from="all")  # type: ignore[arg-type]


@needs_data
def test_halves_of_the_test_images_are_disjoint() -> None:
    data = CIFAR10("lossless_subset", val_from="test", val_share=0.5, download=False)
    data.setup("fit")
    train, val, test = (len(data._sets[part]) for part in ("train", "val", "test"))
    assert (train, val + test) == (8068, 1017)
    assert abs(val - test) <= 10
    assert not contents(data, "val") & contents(data, "test")


def image_folder(root: Path, parts: dict[str, dict[str, int]]) -> None:
    for part, classes in parts.items():
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 30), (index, 0, 0)).save(root / part / name / f"{index}.png")


def test_image_folder_holds_out_validation_from_training(tmp_path: Path) -> None:
    image_folder(tmp_path, {"train": {"cat": 8, "dog": 8}, "test": {"cat": 1, "dog": 1}})
    data = ImageFolderData(str(tmp_path), image_size=16, val_share=0.25, num_workers=0)
    data.setup("fit")
    train, val = (set(data._sets[part].indices) for part in ("train", "val"))  # type: ignore[attr-defined]
    assert not train & val
    assert (len(train), len(val)) == (12, 4)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert len(next(iter(data.test_dataloader()))[1]) == 2


def test_image_folder_with_val_but_no_test(tmp_path: Path) -> None:
    image_folder(tmp_path, {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 2}})
    data = ImageFolderData(str(tmp_path), image_size=16, num_workers=0)
    data.setup("fit")
    assert [len(next(iter(loader))[1]) for loader in (data.train_dataloader(), data.val_dataloader())] == [4, 3]
    with pytest.raises(FileNotFoundError, match="test'; add it"):
        data.test_dataloader()


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train'.*set data\.folder"):
        ImageFolderData(str(tmp_path)).setup("fit")
    image_folder(tmp_path, {"train": {"cat": 1, "dog": 1}, "test": {"dog": 1}})
    with pytest.raises(ValueError, match=r"\['dog'\] but train holds \['cat', 'dog'\]"):
        ImageFolderData(str(tmp_path)).setup("fit")
