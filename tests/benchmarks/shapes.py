"""Layer shapes that people use: those of known networks at several image sizes and batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from lightning_prune import layer_table
from lightning_prune.kernels import Workload
from lightning_prune.kernels.kernel import family
from lightning_prune.kernels.workload import runnable
from lightning_prune.zoo import MLP, CIFARResNet, HanCNN, SmallCNN

IMAGENET = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "vgg16",
    "squeezenet1_1",
    "densenet121",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
)
SIZES = ((224, 1), (128, 1), (128, 4), (64, 1), (64, 4), (64, 16), (32, 16))
WIDTHS = (
    (784, 300, 100, 10),
    (784, 1024, 1024, 512, 10),
    (256, 256, 256, 10),
    (64, 300, 100, 10),
    (1024, 2048, 512, 128, 10),
    (2048, 768, 384, 192, 10),
)
LARGEST_MACS, LARGEST_ELEMENTS = 60e6, 1e6  # so that a run takes minutes


def layer_shapes(count: int, seed: int = 0) -> list[Workload]:
    """A sample of the distinct shapes: linear layers, 1x1, larger and grouped convolutions in equal shares."""
    found: dict[Workload, None] = {}

    def add(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
        with torch.device("meta"):
            model = build().eval()
        for works in runnable(layer_table(model, torch.empty(shape, device="meta"))).values():
            found.update(dict.fromkeys(works))

    for name in IMAGENET:
        for side, batch in SIZES:
            if not (side == 32 and name in ("squeezenet1_1", "densenet121")):  # too small for them
                add(lambda name=name: torchvision.models.get_model(name, weights=None), (batch, 3, side, side))  # type: ignore[misc]
    for batch in (1, 4, 16, 64):
        add(lambda: CIFARResNet(20), (batch, 3, 32, 32))
        add(HanCNN, (batch, 1, 28, 28))
        add(SmallCNN, (batch, 1, 8, 8))
    for widths in WIDTHS:
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            add(lambda widths=widths: MLP(widths), (batch, widths[0]))  # type: ignore[misc]
    small = [
        work
        for work in found
        if work.macs <= LARGEST_MACS and max(work.input_elements, work.output_elements) <= LARGEST_ELEMENTS
    ]
    small.sort(key=str)
    random.Random(seed).shuffle(small)
    families: dict[str, list[Workload]] = {}
    for work in small:
        families.setdefault(family(work), []).append(work)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*families.values()))
    return [work for work in in_turn if work is not None][:count]
