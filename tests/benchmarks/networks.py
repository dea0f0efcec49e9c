"""The networks that latency is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from lightning_prune.zoo import MLP, CIFARResNet, HanCNN

NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": lambda: (MLP([784, 1024, 1024, 512, 10]), torch.randn(64, 784)),
    "resnet20": lambda: (CIFARResNet(20), torch.randn(16, 3, 32, 32)),
    "mobilenet": lambda: (torchvision.models.mobilenet_v2(num_classes=10), torch.randn(8, 3, 64, 64)),
    "han": lambda: (HanCNN(), torch.randn(64, 1, 28, 28)),
    "resnet18": lambda: (torchvision.models.resnet18(), torch.randn(1, 3, 224, 224)),
    "resnet50": lambda: (torchvision.models.resnet50(), torch.randn(1, 3, 224, 224)),
}
