"""Quantisers while a network is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.quantization import AveragedMinMax, MinMax, QuantizationSettings, quantize
from lightning_prune.quantization.quantizers import ActivationQuantizer, LayerQuantizers, layer_quantizers
from lightning_prune.quantization.schemes import Grid
from lightning_prune.quantization.settings import LayerBits


def of(layer: nn.Module, bits: int = 8, **options: Any) -> LayerQuantizers:
    return layer_quantizers(layer, QuantizationSettings(**options), LayerBits(bits, bits))


def switched_on(quantizers: LayerQuantizers) -> LayerQuantizers:
    for quantizer in quantizers.activations:
        quantizer.quantizing = True
    return quantizers


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 3), nn.Conv2d(6, 4, 1, groups=2), nn.ConvTranspose2d(6, 4, 1, groups=2), nn.Conv1d(6, 2, 1)],
    ids=str,
)
def test_a_frozen_run_is_the_twins(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer.bias.data.zero_()  # type: ignore[operator]
    shape = {nn.Linear: (5, 6), nn.Conv1d: (5, 6, 3)}.get(type(layer), (5, 6, 2, 2))
    x = torch.randn(shape)
    quantizers = of(layer, outputs=True)
    observed = quantizers.run(layer, x)
    assert quantizers.activations[1].observer.maximum == observed.max()
    quantizers = of(layer)
    quantizers.run(layer, x)
    quantizers.freeze()
    assert torch.equal(quantizers.run(layer, x), quantize(layer, [x])(x))


def test_gradients_reach_the_layers_own_parameters_in_their_order() -> None:
    layer = nn.Linear(4, 3)
    names, weight = [name for name, _ in layer.named_parameters()], layer.weight
    quantizers = switched_on(of(layer, 4))
    x = torch.randn(8, 4, requires_grad=True)
    quantizers.run(layer, x).square().sum().backward()
    assert [name for name, _ in layer.named_parameters()] == names
    assert layer.weight is weight
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().min() > 0
    assert x.grad is not None
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(RuntimeError):
        quantizers.run(layer, torch.ones(1, 5))
    assert layer.weight is weight


def test_training_at_four_bits_learns_and_keeps_zeros() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    mask = torch.rand(4, 16) < 0.5
    layer.weight.data[mask] = 0.0
    target = torch.randn(4, 16).masked_fill(mask, 0.0)
    quantizers = switched_on(of(layer, 4, ranges=AveragedMinMax(0.9)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for step in range(200):
        x = torch.randn(64, 16)
        loss = (quantizers.run(layer, x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.weight.data[mask] = 0.0
        assert (quantizers.weight(layer.weight)[mask] == 0).all()
        losses.append(loss.item())
        if step == 150:
            quantizers.freeze()
            frozen = {name: value.clone() for name, value in quantizers.state_dict().items()}
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert all(torch.equal(value, frozen[name]) for name, value in quantizers.state_dict().items())


def test_weight_ranges_follow_until_frozen() -> None:
    layer = nn.Linear(2, 1, bias=False)
    quantizers = of(layer)
    for width in (1.0, 4.0, 2.0):
        layer.weight.data = torch.tensor([[0.0, width]])
        quantizers.run(layer, torch.ones(1, 2))
        assert quantizers.weight.quantizer.scale.item() == 255 / width
    quantizers.freeze()
    layer.weight.data *= 10
    assert quantizers.weight(layer.weight).max() == 2.0


def test_state_goes_on_bit_for_bit() -> None:
    layer = nn.Linear(6, 3)
    seen = list(torch.randn(6, 5, 6))
    first, second = (switched_on(of(layer, outputs=True)) for _ in range(2))
    for x in seen[:3]:
        first.run(layer, x)
    second.load_state_dict(first.state_dict())
    for x in seen[3:]:
        assert torch.equal(first.run(layer, x), second.run(layer, x))


def test_observing_alone_changes_nothing_and_quantising_alone_observes_nothing() -> None:
    quantizer = ActivationQuantizer(Grid(2), MinMax())
    x = torch.linspace(0, 3, 10)
    assert quantizer(x) is x
    quantizer.freeze()
    y: Tensor = quantizer(x * 10)
    assert y.max() == 3.0
    assert quantizer.observer.maximum == 3.0


def test_freezing_before_anything_was_seen() -> None:
    with pytest.raises(ValueError, match="needs observed values, and there are none; run the layer while observing"):
        of(nn.Linear(2, 2)).freeze()


def test_representation() -> None:
    layer = nn.Linear(2, 3)
    assert "bits=4, scheme='symmetric', ranges=3" in repr(of(layer, 4, scheme="symmetric"))
