"""Sparsity, compression, speedup and churn against counts done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import metrics
from lightning_prune.layers import layer_table


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


def filled(module: nn.Module, value: float = 1.0) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def zero(module: nn.Module, name: str, index: object = ...) -> None:
    with torch.no_grad():
        module.get_parameter(name)[index] = 0.0  # type: ignore[index]


def small_network() -> nn.Sequential:
    """Conv 1 -> 2 with k = 3 on 6 x 6 (18 weights, 288 MACs), linear 32 -> 4 (128 weights, 128 MACs)."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 4))
    filled(network)
    return network


def test_sparsity_counts_the_weights_of_conv_and_linear_layers_only() -> None:
    network = small_network()
    zero(network, "0.weight", 0)  # 9 of 18
    zero(network, "0.bias")
    zero(network, "1.bias")
    zero(network, "3.weight", (slice(None), slice(16)))  # 64 of 128
    assert metrics.sparsity(network) == 73 / 146
    assert metrics.sparsity(network, ["0.weight", "0.bias"]) == 11 / 20
    assert metrics.parameter_sparsity(network) == {
        "0.weight": 0.5,
        "0.bias": 1.0,
        "1.weight": 0.0,
        "1.bias": 1.0,
        "3.weight": 0.5,
        "3.bias": 0.0,
    }


def test_compression_ratio_counts_every_parameter() -> None:
    network = small_network()
    total = 18 + 2 + 2 + 2 + 128 + 4
    assert metrics.compression_ratio(network) == 1.0
    zero(network, "3.weight")
    assert metrics.compression_ratio(network) == total / (total - 128)


def test_theoretical_speedup_weighs_each_layer_by_its_multiplications() -> None:
    network = small_network()
    table = layer_table(network, torch.zeros(1, 1, 6, 6))
    assert metrics.theoretical_speedup(network, table) == 1.0
    zero(network, "0.weight", 0)  # halves 288
    zero(network, "3.weight", 0)  # takes a quarter of 128
    assert metrics.theoretical_speedup(network, table) == (288 + 128) / (144 + 96)
    assert metrics.kept_macs(metrics.count(network), table) == {"0.weight": (288, 144.0), "3.weight": (128, 96.0)}


def test_two_layer_example() -> None:
    """56 x 56 x 64 through two strided 3 x 3 convolutions of 256 filters: half of either saves 57.8 M MACs."""
    first, second = nn.Conv2d(64, 256, 3, 2, 1, bias=False), nn.Conv2d(256, 256, 3, 2, 1, bias=False)
    network = filled(nn.Sequential(first, second))
    table = layer_table(network, torch.zeros(1, 64, 56, 56))
    zero(first, "weight", slice(128))
    assert metrics.theoretical_speedup(network, table) == 2 * 115_605_504 / (57_802_752 + 115_605_504)
    assert metrics.compression_ratio(network) == (147_456 + 589_824) / (73_728 + 589_824)


def test_tied_weights_are_counted_once() -> None:
    tied = filled(Tied())
    table = layer_table(tied, torch.zeros(1, 4))
    assert {name: each.total for name, each in metrics.count(tied).items()} == {"first.weight": 16}
    zero(tied, "first.weight", 0)
    assert metrics.sparsity(tied) == 0.25
    assert metrics.compression_ratio(tied) == 16 / 12
    assert metrics.kept_macs(metrics.count(tied), table) == {"first.weight": (32, 24.0)}


def test_all_zero_is_infinitely_small_and_nothing_is_not() -> None:
    empty, gone = nn.Sequential(nn.ReLU()), filled(nn.Sequential(nn.Linear(3, 2)), 0.0)
    assert metrics.sparsity(empty) == 0.0
    assert metrics.compression_ratio(empty) == 1.0
    assert metrics.parameter_sparsity(empty) == {}
    assert metrics.sparsity(gone) == 1.0
    assert metrics.compression_ratio(gone) == math.inf
    assert metrics.theoretical_speedup(gone, layer_table(gone, torch.zeros(1, 3))) == math.inf


def test_a_weight_that_is_not_a_number_is_not_a_zero() -> None:
    layer = filled(nn.Linear(2, 1), math.nan)
    assert metrics.sparsity(layer) == 0.0


def test_names_are_plain_under_compile() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    network[0] = torch.compile(network[0])  # type: ignore[assignment]
    assert list(metrics.count(network)) == ["0.weight", "0.bias"]


def test_unknown_names_list_the_closest() -> None:
    with pytest.raises(KeyError, match=r"no parameter 'wieght'; closest: 'weight'"):
        metrics.sparsity(nn.Linear(2, 2), ["wieght"])
    with pytest.raises(KeyError, match="build the table from this model"):
        metrics.theoretical_speedup(nn.Linear(2, 2), layer_table(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2)))


def test_counting_leaves_the_model_alone() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    metrics.count(layer)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert layer.weight.requires_grad
    assert layer.weight.grad is not None


masks = st.lists(st.booleans(), min_size=1, max_size=30).map(torch.tensor)


@given(masks)
def test_churn_is_the_share_of_changed_entries(mask: Tensor) -> None:
    flipped = mask.clone()
    flipped[::2] = ~flipped[::2]
    share = len(mask[::2]) / len(mask)
    assert metrics.churn({"w": mask}, {"w": flipped}) == share
    assert metrics.churn({"w": flipped}, {"w": mask}) == share
    assert metrics.churn({"w": mask}, {"w": mask.clone()}) == 0.0


def test_churn_takes_a_missing_mask_for_one_that_keeps_all() -> None:
    half = torch.tensor([True, False])
    assert metrics.churn({}, {"w": half}) == 0.5
    assert metrics.churn({"w": half}, {}) == 0.5
    assert metrics.churn({"w": half}, {"w": half, "v": torch.tensor([False, False])}) == 0.5
    assert metrics.churn({}, {}) == 0.0


def test_churn_refuses_masks_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"masks of 'w' differ in shape, \(2,\) before and \(3,\) after"):
        metrics.churn({"w": torch.ones(2, dtype=torch.bool)}, {"w": torch.ones(3, dtype=torch.bool)})
