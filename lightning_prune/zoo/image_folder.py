"""Any classification set that lies in one folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightning_prune.zoo.datasets import stratified_split

# Of the networks that torchvision offers pretrained weights for.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolderData(LightningDataModule):
    """Images as `FOLDER/train/CLASS/*.jpg`, with `FOLDER/val` and `FOLDER/test` beside where they exist.

    Without `val`, validation examples are held out from `train`; `test` is never touched for it.

    Args:
        folder: The folder above `train`.
        image_size: Height and width of the images that the network sees.
        batch_size: Examples per batch.
        augment: Random crops and mirror images while training.
        val_share: Share of every training class to hold out where there is no `val`, in (0, 1).
        num_workers: Processes that decode images.
        split_seed: Selects the held-out examples, whatever the seed of the run.

    Raises:
        FileNotFoundError: There is no `train` with a folder per class.
        ValueError: `val` or `test` holds other classes than `train`.
    """

    def __init__(
        self,
        folder: str,
        image_size: int = 224,
        batch_size: int = 64,
        augment: bool = True,
        val_share: float = 0.1,
        num_workers: int = 2,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.val_share = val_share
        self.num_workers = num_workers
        self.split_seed = split_seed
        finish = [transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
        # The centre of an image enlarged by 256/224 is what published accuracies are measured on.
        plain = [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)]
        random = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
        self._plain = transforms.Compose([*plain, *finish])
        self._train = transforms.Compose([*(random if augment else plain), *finish])
        self._sets: dict[str, Dataset[Any]] = {}

    def setup(self, stage: str) -> None:
        """List the images once, whatever the stage."""
        if self._sets:
            return
        train = self._images("train", self._train)
        self._sets["train"] = train
        for part in ("val", "test"):
            if (self.folder / part).is_dir():
                images = self._images(part, self._plain)
                if images.classes != train.classes:
                    raise ValueError(
                        f"{str(self.folder / part)!r} holds the classes {images.classes} but train holds "
                        f"{train.classes}; give both the same folders."
                    )
                self._sets[part] = images
        if "val" not in self._sets:
            rest, val = stratified_split(torch.tensor(train.targets), self.val_share, self.split_seed)
            self._sets["train"] = Subset(train, rest.tolist())
            self._sets["val"] = Subset(self._images("train", self._plain), val.tolist())

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test batches, whose labels prediction ignores."""
        return self._loader("test")

    def _images(self, part: str, transform: transforms.Compose) -> ImageFolder:
        try:
            return ImageFolder(str(self.folder / part), transform)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"No images below {str(self.folder / part)!r} ({error}); "
                f"set data.folder to the folder that holds {part}/CLASS/IMAGE."
            ) from error

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any]:
        if part not in self._sets:
            raise FileNotFoundError(f"No {str(self.folder / part)!r}; add it with one folder per class.")
        return DataLoader(
            self._sets[part],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
