"""The small residual networks for CIFAR-10."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A of He et al.).

    Where the block widens, the shortcut takes every other pixel and pads the new channels with zeros,
    half of them before and half after the old ones.

    Shapes:
        `[batch, in_channels, h, w]` -> `[batch, channels, h / stride, w / stride]`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.pad = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches after a ReLU."""
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.pad:
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad))
        return (out + shortcut).relu()  # type: ignore[no-any-return]


class CIFARResNet(nn.Module):
    """Residual network of `6n + 2` layers with 16, 32 and 64 channels: ResNet-20, 32, 44, 56, 110.

    Parameters are named as in the published weights of akamaster/pytorch_resnet_cifar10, which
    `load_weights` (or `Classifier(initialize_from=...)`) reads.

    Args:
        depth: Layers, `6n + 2`.
        num_classes: Classes.

    Shapes:
        `[batch, 3, 32, 32]` -> `[batch, num_classes]`.

    Raises:
        ValueError: The depth is not `6n + 2`.

    Source:
        He et al., Deep Residual Learning for Image Recognition, section 4.2.

    Example:
        >>> sum(p.numel() for p in CIFARResNet(20).parameters())
        269722
    """

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"CIFARResNet needs a depth of 6n + 2, got depth={depth}; take 20, 32, 44 or 56.")
        blocks = depth // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape `[batch, num_classes]`."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))
