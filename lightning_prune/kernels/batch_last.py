"""Activations whose last dimension in memory is the batch: the numbers of one pixel, one per image, are neighbours.

Where batches fill vectors, layers that take and give such activations need no place for a pixel's neighbours, and copy
and store whole vectors: nothing is transposed between them. To PyTorch they are tensors with other strides.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from lightning_prune.kernels.workload import Pair, Workload

FILLS = 8
"""Batches of a multiple of so many fill vectors."""

_ROW = 2
"""Vectors of a pixel that fill a cache line and are gone through together, as if they were pixels of a wider image."""


def fills_vectors(batch: int) -> bool:
    """Whether images or rows of a batch can lie in vectors."""
    return batch > 0 and batch % FILLS == 0


def batch_last(x: Tensor) -> Tensor:
    """The same numbers, so that the first dimension is the last one in memory; contiguous where it fills no vectors.

    >>> import torch
    >>> batch_last(torch.zeros(8, 3, 4, 5)).stride(), batch_last(torch.zeros(7, 3)).stride()
    ((1, 160, 40, 8), (3, 1))
    """
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if fills_vectors(len(x)) else x.contiguous()


def lanes_for(batch: int, widest: int) -> int:
    """Numbers of the widest vectors that a batch fills."""
    return next(lanes for lanes in (16, 8, 4) if lanes <= widest and batch % lanes == 0)


def arranged(work: Workload, widest: int) -> tuple[Workload, bool]:
    """A layer call with batch-last activations as one that gives the same numbers in the same places.

    Pixels that have no neighbours, and rows of a linear layer, are pixels of one image, which lies as any other does.
    Otherwise the images of a vector are a batch, of which every pixel lies together.

    Args:
        work: whose batch fills vectors.
        widest: numbers of the machine's widest vectors.

    Returns:
        The call, and whether its batch lies last.

    >>> print(*arranged(Workload("linear", 64, 512, 10), 8))
    conv2d 512->10 k1x1 1x64->1x64 b1 False
    >>> print(*arranged(Workload("conv2d", 16, 3, 8, (9, 9), (9, 9), (3, 3), padding=(1, 1)), 8))
    conv2d 3->8 k3x3 p1x2 d1x2 9x18->9x18 b8 True
    """
    if work.kind == "linear":
        return Workload("conv2d", 1, work.inputs, work.outputs, (1, work.batch), (1, work.batch)), False
    if work.pointwise:
        image = (work.input_size[0], work.input_size[1] * work.batch)
        return replace(work, batch=1, input_size=image, output_size=image), False
    lanes = lanes_for(work.batch, widest)
    vectors = work.batch // lanes
    if work.stride[1] > 1 or vectors > _ROW:
        return work, True

    def wider(size: Pair) -> Pair:
        return (size[0], size[1] * vectors)

    return replace(
        work,
        batch=lanes,
        input_size=wider(work.input_size),
        output_size=wider(work.output_size),
        padding=wider(work.padding),
        dilation=wider(work.dilation),
    ), True


class BatchLast(nn.Module):
    """Runs a layer that knows no such activations, and gives its results so.

    Args:
        layer: of PyTorch.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives."""
        y: Tensor = self.layer(x.contiguous())
        return batch_last(y) if y.ndim == 4 else y
