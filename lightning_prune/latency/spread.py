"""Layer shapes around those of a network, so that a profile also answers for others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.kernels import Workload

_CHANNELS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048)
_IMAGES = (2, 4, 7, 8, 14, 16, 28, 32, 56, 64)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def around(works: Sequence[Workload], count: int, seed: int = 0) -> tuple[Workload, ...]:
    """Shapes near the given ones: channels, image sizes and rows up to one size up or down, batches alike.

    Args:
        works: calls of the network.
        count: how many.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(value: int, sizes: Sequence[int]) -> int:
        nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - value))
        moved = nearest + int(torch.randint(-2, 3, (), generator=generator))
        return value if value < 4 else sizes[min(max(moved, 0), len(sizes) - 1)]

    known = set(works)
    found: dict[Workload, None] = {}
    sources = list(dict.fromkeys(works))
    for _ in range(20 * count):
        if len(found) == count or not sources:
            break
        work = sources[int(torch.randint(len(sources), (), generator=generator))]
        if work.kind == "linear":
            new = Workload(
                "linear", near(work.batch, _ROWS), near(work.inputs, _CHANNELS), near(work.outputs, _CHANNELS)
            )
        else:
            inputs, outputs = near(work.inputs, _CHANNELS), near(work.outputs, _CHANNELS)
            groups = 1
            if work.groups > 1:
                inputs = outputs = groups = near(work.inputs, _CHANNELS)
            side = near(work.output_size[0], _IMAGES)
            new = convolution(work, inputs, outputs, groups, side)
        if new.macs <= 4 * max(w.macs for w in works) and new not in known:
            found[new] = None
    return tuple(found)


def convolution(like: Workload, inputs: int, outputs: int, groups: int, side: int) -> Workload:
    """A convolution with another's window, and these channels and sides."""
    reach = [d * (w - 1) for d, w in zip(like.dilation, like.window, strict=True)]
    size = [(side - 1) * s + 1 + r - 2 * p for s, r, p in zip(like.stride, reach, like.padding, strict=True)]
    return Workload(
        "conv2d",
        like.batch,
        inputs,
        outputs,
        (max(size[0], 1), max(size[1], 1)),
        (side, side),
        like.window,
        like.stride,
        like.padding,
        like.dilation,
        groups,
    )
