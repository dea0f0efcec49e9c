"""Activations whose last dimension in memory is the batch: the numbers of one pixel, one per image, are neighbours.

Layers that take and give such activations copy and store whole vectors: nothing is transposed between them. To PyTorch
they are tensors with other strides. Rows of linear layers may be as many as fill vectors; images only as many as fill
one cache line, as more of them lie too far apart (batches of 32 took 3 to 37 % longer than in "nchw").
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from lightning_prune.kernels.workload import Pair, Workload

_VECTOR, _LINE = 8, 16
"""Numbers of a vector, and of a cache line."""


def lies_last(batch: int, *, images: bool) -> bool:
    """Whether so many images, or rows, can lie last."""
    return batch > 0 and batch % _VECTOR == 0 and not (images and batch > _LINE)


def refused(work: Workload) -> str | None:
    """Why the activations of a layer cannot lie with the batch last, or None if they can."""
    images = work.kind == "conv2d"
    if lies_last(work.batch, images=images):
        return None
    most = f", up to {_LINE}," if images else ""
    return f"batches of a multiple of {_VECTOR}{most} can lie last, not of {work.batch}"


def batch_last(x: Tensor) -> Tensor:
    """The same numbers, so that the first dimension is the last one in memory; contiguous where it cannot be.

    >>> import torch
    >>> batch_last(torch.zeros(8, 3, 4, 5)).stride(), batch_last(torch.zeros(7, 3)).stride()
    ((1, 160, 40, 8), (3, 1))
    """
    last = lies_last(len(x), images=x.ndim == 4)
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if last else x.contiguous()


def lanes_for(batch: int, widest: int) -> int:
    """Numbers of the widest vectors that a batch fills."""
    return next(lanes for lanes in (16, 8, 4) if lanes <= widest and batch % lanes == 0)


def arranged(work: Workload, widest: int) -> tuple[Workload, int]:
    """A layer call with batch-last activations as one that gives the same numbers in the same places.

    Pixels that have no neighbours, and rows of a linear layer, are pixels of one image, which lies as any other does.
    Otherwise a pixel's vectors lie beside each other, and are gone through as if they were pixels of a wider image; or
    one after the other where a stride would pass over some.

    Args:
        work: whose batch can lie last.
        widest: numbers of the machine's widest vectors.

    Returns:
        The call, and how many vectors of a pixel lie beside each other; 0 where it lies as others do.

    >>> print(*arranged(Workload("linear", 64, 512, 10), 8))
    conv2d 512->10 k1x1 1x64->1x64 b1 0
    >>> print(*arranged(Workload("conv2d", 16, 3, 8, (9, 9), (9, 9), (3, 3), padding=(1, 1)), 8))
    conv2d 3->8 k3x3 d1x2 9x18->9x18 b8 2
    """
    if work.kind == "linear":
        return Workload("conv2d", 1, work.inputs, work.outputs, (1, work.batch), (1, work.batch)), 0
    if work.pointwise:
        image = (work.input_size[0], work.input_size[1] * work.batch)
        return replace(work, batch=1, input_size=image, output_size=image), 0
    lanes = lanes_for(work.batch, widest)
    beside = work.batch // lanes if work.stride[1] == 1 else 1

    def wider(size: Pair) -> Pair:
        return (size[0], size[1] * beside)

    return replace(
        work,
        batch=work.batch // beside,
        input_size=wider(work.input_size),
        output_size=wider(work.output_size),
        padding=wider(work.padding),
        dilation=wider(work.dilation),
    ), beside


class BatchLast(nn.Module):
    """Runs a layer that knows no such activations, and gives its results so, as kernels of our own do.

    Args:
        layer: of PyTorch, linear or a convolution of images.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives."""
        y: Tensor = self.layer(x.contiguous())
        if isinstance(self.layer, nn.Linear) and y.numel():
            return batch_last(y.reshape(-1, y.shape[-1])).view(y.shape)
        return batch_last(y) if y.ndim == 4 else y
