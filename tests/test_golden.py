"""Counts that others have published, met to the weight."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune import Filter, Pruner, SparsityPlan, compression_ratio, layer_table, theoretical_speedup
from lightning_prune.zoo import HanCNN


def nonzeros(model: nn.Module, smallest: int = 1) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim >= smallest)


def test_resnet50_pruned_by_agp() -> None:
    """DeGirum's `_70`: first layers dense, other convolutions at 70 %, the classifier at 87 %."""
    model = torchvision.models.resnet50()
    dense = dict.fromkeys(("conv1.weight", "layer1*", "layer2.0.conv1.weight"), 0.0)
    Pruner(model, SparsityPlan({"*": 0.7, **dense, "fc.weight": 0.87}), scope="local").update(1.0)
    assert nonzeros(model, smallest=2) == 7_481_332
    table = layer_table(model, torch.zeros(1, 3, 224, 224))
    assert table.total_macs / theoretical_speedup(model, table) == pytest.approx(1.85e9, rel=1e-3)


def test_han_style_plan_on_the_mnist_network() -> None:
    model = HanCNN()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.sign(parameter) + 1e-3)  # no weight or bias is 0 by chance
    shares = {"conv1": 0.65, "conv2": 0.95, "conv3": 0.98, "fc1": 0.98, "fc2": 0.90}
    Pruner(model, SparsityPlan({f"{name}.weight": share for name, share in shares.items()})).update(1.0)
    assert sum(p.numel() for p in model.parameters()) == 228_010
    assert nonzeros(model) == 6_183
    assert compression_ratio(model) == pytest.approx(36.88, abs=0.005)


@pytest.mark.parametrize(
    ("plan", "removed"),
    [
        (SparsityPlan({"weight": 0.4}), 2_765),
        (SparsityPlan({"weight": (0.4, Filter())}), 2_754),
        (SparsityPlan({"weight": (0.41479, Filter())}), 2_862),
    ],
)
def test_first_layer_of_a_cifar_network(plan: SparsityPlan, removed: int) -> None:
    layer = nn.Conv2d(3, 256, 3)
    Pruner(layer, plan).update(1.0)
    assert int((layer.weight == 0).sum()) == removed


def test_weight_and_bias_share_a_budget_in_one_group() -> None:
    layer = nn.Conv2d(3, 256, 3)
    Pruner(layer, SparsityPlan({"weight": 0.4, "bias": 0.4}), scope={"all": ["*"]}).update(1.0)
    assert sum(int((p == 0).sum()) for p in layer.parameters()) == 2_867
