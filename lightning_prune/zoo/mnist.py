"""MNIST."""

from __future__ import annotations

from torchvision import datasets

from lightning_prune.zoo.datasets import (
    ImageTensors,
    TensorDataModule,
    data_folder,
    missing_data,
    stratified_split,
)


class MNIST(TensorDataModule):
    """70,000 handwritten digits, images `[1, 28, 28]`, 10 classes.

    Read from the folder named by `LIGHTNING_PRUNE_DATA` (default `./data`), in torchvision's layout.
    Validation examples are held out from the 60,000 training ones.

    Args:
        batch_size: Examples per batch.
        val_share: Share of every training class that is held out for validation, in (0, 1).
        download: Let torchvision download what is missing.
        split_seed: Selects the split, which does not depend on the seed of the run.

    Raises:
        FileNotFoundError: The files are missing and may not, or could not, be downloaded.

    Source:
        LeCun, Cortes, Burges, The MNIST database of handwritten digits.
    """

    def __init__(
        self, batch_size: int = 128, val_share: float = 0.1, download: bool = True, split_seed: int = 0
    ) -> None:
        super().__init__(batch_size)
        self.val_share = val_share
        self.download = download
        self.split_seed = split_seed

    def prepare_data(self) -> None:
        """Download what is missing, once per machine."""
        self._read(train=True, download=self.download)

    def load(self) -> dict[str, ImageTensors]:
        """Return the three sets."""
        train, test = self._read(train=True), self._read(train=False)
        rest, val = stratified_split(train.targets, self.val_share, self.split_seed)
        parts = {
            "train": (train.data[rest], train.targets[rest]),
            "val": (train.data[val], train.targets[val]),
            "test": (test.data, test.targets),
        }
        return {
            name: ImageTensors(images.unsqueeze(1), labels, [0.1307], [0.3081])
            for name, (images, labels) in parts.items()
        }

    def _read(self, train: bool, download: bool = False) -> datasets.MNIST:
        folder = data_folder()
        try:
            return datasets.MNIST(str(folder), train=train, download=download)
        except (OSError, RuntimeError) as error:
            raise missing_data(
                "readable MNIST (MNIST/raw/*-ubyte)",
                folder,
                "point the variable to a folder that holds it, or set download: true with a network",
            ) from error
