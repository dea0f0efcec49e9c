"""Two plain convolutional networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class SmallCNN(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU, halved in between, averaged and classified.

    Fully convolutional, so that the same network takes the 8x8 digits and the 28x28 ones of MNIST.

    Args:
        in_channels: Channels of the image.
        channels: Output channels of each convolution; the image is halved before every one but the first.
        num_classes: Classes.

    Shapes:
        `[batch, in_channels, height, width]` -> `[batch, num_classes]`; height and width are
        at least `2 ** (len(channels) - 1)`.

    Example:
        >>> import torch
        >>> SmallCNN()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int = 1, channels: Sequence[int] = (16, 32, 64), num_classes: int = 10) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ValueError(
                f"SmallCNN needs at least one convolution of >= 1 channels, got channels={list(channels)}; "
                "give one number per convolution, such as [16, 32, 64]."
            )
        inputs = [in_channels, *channels[:-1]]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in zip(inputs, channels, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in channels)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape `[batch, num_classes]`."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if index:
                x = functional.max_pool2d(x, 2)
            x = norm(conv(x)).relu()
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class HanCNN(nn.Module):
    """The five-layer MNIST network of Han-style pruning results: 228,010 parameters, biases included.

    Convolutions 1-32-32-64 of 5x5 without padding, 2x2 max pooling after the second and the third
    (28 -> 24 -> 20 -> 10 -> 6 -> 3), then 576-256-10.

    Args:
        dropout: Probability that a value is dropped after each pooling and after the first linear layer.

    Shapes:
        `[batch, 1, 28, 28]` -> `[batch, 10]`.

    Example:
        >>> sum(p.numel() for p in HanCNN().parameters())
        228010
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5)
        self.conv2 = nn.Conv2d(32, 32, 5)
        self.conv3 = nn.Conv2d(32, 64, 5)
        self.fc1 = nn.Linear(576, 256)
        self.fc2 = nn.Linear(256, 10)
        self.dropout = nn.Dropout(dropout)
        # As modules, which `accelerate` can put something faster in the place of.
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape `[batch, 10]`."""
        x = self.relu(self.conv1(x))
        x = self.dropout(self.relu(self.pool(self.conv2(x))))
        x = self.dropout(self.relu(self.pool(self.conv3(x))))
        x = self.dropout(self.relu(self.fc1(x.flatten(1))))
        return self.fc2(x)  # type: ignore[no-any-return]
