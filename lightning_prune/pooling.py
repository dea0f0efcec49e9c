"""Max pooling of NCHW images, which PyTorch does several times faster in NHWC than as they lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prune.folding import replace_module, unwatched

_FEWEST_CHANNELS = 8
"""With fewer, PyTorch's own way is faster."""


class ThroughNHWC(nn.Module):
    """Max pooling of the same images in the other memory layout; its results are contiguous again.

    Args:
        pool: how.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """What the pooling gives."""
        if x.ndim != 4 or x.shape[1] < _FEWEST_CHANNELS or x.device.type != "cpu" or not x.is_contiguous():
            return self.pool(x)  # type: ignore[no-any-return]
        y: Tensor = self.pool(x.contiguous(memory_format=torch.channels_last))
        return y.contiguous()


def pool_through_nhwc(model: nn.Module) -> None:
    """Put a `ThroughNHWC` in the place of every max pooling of images.

    >>> model = nn.Sequential(nn.MaxPool2d(2))
    >>> pool_through_nhwc(model)
    >>> model(torch.arange(4.0).view(1, 1, 2, 2))
    tensor([[[[3.]]]])
    """
    for module in list(model.modules()):
        if type(module) is nn.MaxPool2d and unwatched(module) and not module.return_indices:
            replace_module(model, module, ThroughNHWC(module))
