"""scikit-learn's handwritten digits, the embedded default."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from lightning_prune.zoo.datasets import ImageTensors, TensorDataModule, stratified_split


class Digits(TensorDataModule):
    """The 1,797 handwritten digits that scikit-learn carries: images `[1, 8, 8]`, 10 classes, no download.

    Every class gives a fifth to the test set and a fifth to the validation set.

    Args:
        batch_size: Examples per batch.
        split_seed: Selects the split, which does not depend on the seed of the run.

    Source:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI.

    Example:
        >>> digits = Digits(batch_size=32)
        >>> digits.setup("fit")
        >>> images, labels = next(iter(digits.train_dataloader()))
        >>> images.shape
        torch.Size([32, 1, 8, 8])
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0) -> None:
        super().__init__(batch_size)
        self.split_seed = split_seed

    def load(self) -> dict[str, ImageTensors]:
        """Return the three sets."""
        bunch = load_digits()
        images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        rest, test = stratified_split(labels, 0.2, self.split_seed)
        # A quarter of the remaining four fifths is a fifth of everything.
        train, val = stratified_split(labels[rest], 0.25, self.split_seed)
        parts = {"train": rest[train], "val": rest[val], "test": test}
        return {
            name: ImageTensors(images[part], labels[part], [0.305], [0.376], full_scale=16.0)
            for name, part in parts.items()
        }
