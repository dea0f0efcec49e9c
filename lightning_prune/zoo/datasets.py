"""Small image sets held in memory, stratified splits, and where data lies."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

DATA_VARIABLE = "LIGHTNING_PRUNE_DATA"

Batch = tuple[Tensor, Tensor]


def data_folder() -> Path:
    """Return the folder that `LIGHTNING_PRUNE_DATA` names, or `data` in the working directory."""
    return Path(os.environ.get(DATA_VARIABLE) or "data")


def missing_data(what: str, folder: Path, remedy: str) -> FileNotFoundError:
    """Return an error that names the data, the folder, the variable and a remedy."""
    source = f"named by {DATA_VARIABLE}" if os.environ.get(DATA_VARIABLE) else f"{DATA_VARIABLE} is not set"
    return FileNotFoundError(f"No {what} below {str(folder)!r} ({source}); {remedy}.")


def stratified_split(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split indices so that every class gives the same share, whatever the global random state.

    Args:
        labels: Class of each example, shape `[n]`.
        share: Share of each class (rounded to whole examples) that the second part holds, in (0, 1).
        seed: Selects the split.

    Returns:
        Sorted indices of the first part and of the second.

    Raises:
        ValueError: The share is not inside (0, 1).

    Example:
        >>> rest, held_out = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), share=0.5)
        >>> len(rest), torch.tensor([0, 0, 0, 0, 1, 1])[held_out].tolist()
        (3, [0, 0, 1])
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"A split needs a share inside (0, 1), got {share}; 0.1 holds out a tenth.")
    generator = torch.Generator().manual_seed(seed)
    second = []
    for label in torch.unique(labels):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        second.append(members[order[: round(share * len(members))]])
    is_second = torch.zeros(len(labels), dtype=torch.bool)
    is_second[torch.cat(second)] = True
    return (~is_second).nonzero().flatten(), is_second.nonzero().flatten()


class ImageTensors(Dataset[Batch]):
    """Images and labels in memory; a whole batch is indexed, augmented and normalised at once.

    A value x of channel c becomes `(x / full_scale - mean[c]) / std[c]`.

    Args:
        images: Raw images, uint8, shape `[n, channels, height, width]`.
        labels: Classes, int64, shape `[n]`.
        mean: Mean of each channel, in shares of the full scale.
        std: Standard deviation of each channel, in shares of the full scale.
        full_scale: Raw value of white.
        augment: Crop at random from the image padded by four black pixels, and mirror half of the images.

    Example:
        >>> images = torch.full((3, 1, 8, 8), 16, dtype=torch.uint8)
        >>> x, y = ImageTensors(images, torch.arange(3), [0.5], [0.25], full_scale=16.0).__getitems__([0, 2])
        >>> x.shape, x.max().item(), y.tolist()
        (torch.Size([2, 1, 8, 8]), 2.0, [0, 2])
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        full_scale: float = 255.0,
        augment: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self._offset = (torch.tensor(mean) * full_scale).view(1, -1, 1, 1)
        self._factor = 1.0 / (torch.tensor(std) * full_scale).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.augment:
            images = _crop_and_mirror(images)
        return (images.float() - self._offset) * self._factor, self.labels[chosen]


def _crop_and_mirror(images: Tensor, padding: int = 4) -> Tensor:
    count, _, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    rows = torch.randint(2 * padding + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * padding + 1, (count, 1)) + torch.arange(width)
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count).view(-1, 1, 1)
    # Index tensors around a slice move the channels to the end.
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _as_is(batch: Any) -> Any:
    return batch


class TensorDataModule(LightningDataModule, ABC):
    """Train, validation and test sets in memory; the loaders need no worker processes.

    Args:
        batch_size: Examples per training and evaluation batch.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__} needs batch_size >= 1, got {batch_size}.")
        self.batch_size = batch_size
        self._sets: dict[str, ImageTensors] = {}

    @abstractmethod
    def load(self) -> dict[str, ImageTensors]:
        """Return the sets under `train`, `val` and `test`."""

    def setup(self, stage: str) -> None:
        """Load the data once, whatever the stage."""
        if not self._sets:
            self._sets = self.load()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled training batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches, a part of the training examples held out from training."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches, whose labels prediction ignores."""
        return self._loader("test")

    def _loader(self, name: str, shuffle: bool = False) -> DataLoader[Batch]:
        # __getitems__ already returns a whole batch, so nothing is left to collate.
        return DataLoader(self._sets[name], batch_size=self.batch_size, shuffle=shuffle, collate_fn=_as_is)
