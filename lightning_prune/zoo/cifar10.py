"""CIFAR-10 in three layouts."""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from lightning_prune.zoo.datasets import (
    ImageTensors,
    TensorDataModule,
    data_folder,
    missing_data,
    stratified_split,
)

_Part = tuple[Tensor, Tensor]  # uint8 images [n, 3, 32, 32] and int64 labels [n]
_SUBSET = "cifar10/cifar10_lossless_subset.npz"
_JPEG = "cifar10/cifar10_jpeg.tar.gz"
_BATCHES = "cifar-10-batches-py"


class CIFAR10(TensorDataModule):
    """Photographs of 10 classes, images `[3, 32, 32]`, normalised as the published CIFAR ResNets expect.

    Read from the folder named by `LIGHTNING_PRUNE_DATA` (default `./data`). Validation examples are held
    out from the training ones. The layouts are different distributions (a network trained on the original
    pixels loses ten points on the lossy ones), so training and test images always come from the same one.

    Args:
        variant: `torchvision`, the 60,000 images in torchvision's layout, downloaded where missing;
            `lossless_subset`, original pixels of 8,068 training and 1,017 test images
            (`cifar10/cifar10_lossless_subset.npz`); `jpeg`, all 60,000 as lossy JPEGs
            (`cifar10/cifar10_jpeg.tar.gz`, read in memory, a few seconds);
            `auto`, the first of these that is there, with a warning where it is not the full original.
        batch_size: Examples per batch.
        augment: Random crops (four pixels) and mirror images while training.
        val_share: Share of every training class (or test class, see below) that is held out for validation, in (0, 1).
        download: Let torchvision download the data where no layout is there.
        split_seed: Selects the split, which does not depend on the seed of the run.
        val_from: Which images validation is held out from. `train` where the network has still to be trained. `test`
            for published weights, which know all training images: then the other test images are the test set, and
            all training images are trained on.

    Raises:
        FileNotFoundError: The chosen layout is missing and may not, or could not, be downloaded.

    Source:
        Krizhevsky, Learning multiple layers of features from tiny images.
    """

    def __init__(
        self,
        variant: Literal["auto", "torchvision", "lossless_subset", "jpeg"] = "auto",
        batch_size: int = 128,
        augment: bool = True,
        val_share: float = 0.1,
        download: bool = True,
        split_seed: int = 0,
        val_from: Literal["train", "test"] = "train",
    ) -> None:
        super().__init__(batch_size)
        if val_from not in ("train", "test"):
            raise ValueError(f"CIFAR10 holds validation images out from 'train' or 'test', got val_from={val_from!r}.")
        self.variant = variant
        self.augment = augment
        self.val_share = val_share
        self.download = download
        self.split_seed = split_seed
        self.val_from = val_from

    def prepare_data(self) -> None:
        """Download what is missing, once per machine."""
        if self._layout() == "torchvision" and not (data_folder() / _BATCHES).is_dir():
            _torchvision_part(data_folder(), train=True, download=self.download)

    def load(self) -> dict[str, ImageTensors]:
        """Return the three sets."""
        layout, folder = self._layout(), data_folder()
        if layout != self.variant and layout != "torchvision":
            warnings.warn(
                f"CIFAR10 uses its {layout!r} layout below {str(folder)!r}, not the 60,000 original images; "
                f"results differ from published ones. Set variant: {layout} to choose it knowingly.",
                stacklevel=2,
            )
        readers: dict[str, Callable[[Path], tuple[_Part, _Part]]] = {
            "torchvision": lambda f: (_torchvision_part(f, train=True), _torchvision_part(f, train=False)),
            "lossless_subset": _read_subset,
            "jpeg": _read_jpeg,
        }
        parts = dict(zip(("train", "test"), readers[layout](folder), strict=True))
        images, labels = parts[self.val_from]
        rest, val = stratified_split(labels, self.val_share, self.split_seed)
        parts |= {self.val_from: (images[rest], labels[rest]), "val": (images[val], labels[val])}
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return {
            name: ImageTensors(*part, mean, std, augment=self.augment and name == "train")
            for name, part in parts.items()
        }

    def _layout(self) -> str:
        if self.variant != "auto":
            return self.variant
        present = {"torchvision": _BATCHES, "lossless_subset": _SUBSET, "jpeg": _JPEG}
        return next((name for name, path in present.items() if (data_folder() / path).exists()), "torchvision")


def _torchvision_part(folder: Path, train: bool, download: bool = False) -> _Part:
    try:
        data = datasets.CIFAR10(str(folder), train=train, download=download)
    except (OSError, RuntimeError) as error:
        raise missing_data(
            f"readable CIFAR-10 ({_BATCHES}/, {_SUBSET} or {_JPEG})",
            folder,
            "point the variable to a folder that holds it, or set download: true with a network",
        ) from error
    return _channels_first(data.data), torch.tensor(data.targets)


def _read_subset(folder: Path) -> tuple[_Part, _Part]:
    _require(folder, _SUBSET)
    with np.load(folder / _SUBSET) as arrays:
        train, test = (
            (_channels_first(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]).long())
            for part in ("train", "test")
        )
    return train, test


def _read_jpeg(folder: Path) -> tuple[_Part, _Part]:
    _require(folder, _JPEG)
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    # Members are decoded in memory: nothing is unpacked, so no path in the archive can do harm.
    with tarfile.open(folder / _JPEG) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is None:
                continue
            part, name, _ = member.name.removeprefix("./").split("/")
            with Image.open(io.BytesIO(content.read())) as image:
                images[part].append(np.asarray(image))
            names[part].append(name)
    # The classes in alphabetical order are CIFAR's classes 0 to 9.
    number = {name: i for i, name in enumerate(sorted(set(names["train"])))}
    train, test = (
        (_channels_first(np.stack(images[part])), torch.tensor([number[name] for name in names[part]]))
        for part in ("train", "test")
    )
    return train, test


def _require(folder: Path, path: str) -> None:
    if not (folder / path).is_file():
        raise missing_data(path, folder, "point the variable to a folder that holds it, or set variant: auto")


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
