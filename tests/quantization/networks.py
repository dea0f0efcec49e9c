"""Networks whose accuracy in integers is looked at."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune.zoo import MNIST, CIFARResNet
from lightning_prune.zoo.datasets import data_folder
from lightning_prune.zoo.weights import load_weights

WEIGHTS = data_folder() / "cifar_resnets/resnet20-12fca82f.th"


def resnet20() -> nn.Module:
    """Pretrained on CIFAR-10."""
    model = CIFARResNet(20).eval()
    load_weights(model, WEIGHTS)
    return model


def mnist_network(data: MNIST, steps: int = 300) -> nn.Module:
    """Two strided convolutions with BatchNorm and a linear layer, trained for a moment."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number, (x, y) in enumerate(data.train_dataloader()):
        if number == steps:
            break
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
