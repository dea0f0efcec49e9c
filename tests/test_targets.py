"""Which weights are pruned by default, what they are called, and how they are laid out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import Channel, Filter, Kernel, Pruner, SparsityPlan
from lightning_prune.granularities import Granularity
from lightning_prune.targets import Layout, aliases, closest, layouts, parameters, plain_name, prunable

CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.decoder = nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight
        self.again = self.decoder


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *TRANSPOSED])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_pruned_without_their_biases(layer: Any, groups: int) -> None:
    assert list(prunable(layer(4, 6, 3, groups=groups))) == ["weight"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.Embedding(4, 3),
        nn.EmbeddingBag(4, 3),
        nn.LSTM(4, 3, num_layers=2, bidirectional=True),
        nn.GRU(4, 3),
        nn.LSTMCell(4, 3),
        nn.PReLU(4),
        nn.ReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_pruned_only_by_name(layer: nn.Module) -> None:
    assert prunable(layer) == {}


def test_attention_is_made_of_linear_layers() -> None:
    assert list(prunable(nn.MultiheadAttention(4, 2))) == ["in_proj_weight", "out_proj.weight"]
    separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
    assert list(prunable(separate)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    whole = nn.TransformerEncoderLayer(4, 2, 8)
    assert list(prunable(whole)) == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]


def test_in_the_models_order_and_the_parameters_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    assert list(prunable(model)) == ["0.weight", "3.weight"]
    assert prunable(model)["3.weight"] is model[3].weight
    assert list(parameters(model)) == [name for name, _ in model.named_parameters()]


def test_a_weight_tied_to_a_linear_layer_is_one_weight_of_a_linear_layer() -> None:
    model = Tied()
    assert list(prunable(model)) == ["embedding.weight"]
    assert list(parameters(model)) == ["embedding.weight"]
    assert aliases(model) == dict.fromkeys(("embedding.weight", "decoder.weight", "again.weight"), "embedding.weight")


def test_compiled_names_are_plain() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ConvTranspose1d(2, 3, 1))
    part: Any = torch.compile(inner, backend="eager")
    compiled: Any = torch.compile(nn.Sequential(part), backend="eager")
    assert list(prunable(compiled)) == ["0.0.weight", "0.1.weight"]
    assert list(layouts(compiled)) == ["0.1.weight"]
    assert aliases(compiled) == {name: name for name in parameters(compiled)}
    assert plain_name("_orig_mod.net._orig_mod.0.weight") == "net.0.weight"
    assert plain_name("net.0.weight") == "net.0.weight"


def test_closest_always_says_something() -> None:
    assert closest("xyz", ["fc.weight"]) == "'fc.weight'"
    assert closest("xyz", []) == "none: the model has no parameters"
    assert closest("fc.wight", ["a", "fc.bias", "fc.weight", "b"], count=1) == "'fc.weight'"


def test_layouts_are_those_of_transposed_layers() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(4, 4))
    assert layouts(model) == {"1.weight": Layout(transposed=True, groups=2)}


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(), (2,), (2, 3)], ids=len)
def test_layout_puts_outputs_first(groups: int, kernel: tuple[int, ...]) -> None:
    inputs, outputs = 2 * groups, 3 * groups
    stored = torch.arange(float(inputs * 3 * torch.Size(kernel).numel())).reshape(inputs, 3, *kernel)
    seen = Layout(transposed=True, groups=groups).output_first(stored)
    assert seen.shape == (outputs, 2, *kernel)
    for group, out, inp in itertools.product(range(groups), range(3), range(2)):
        assert torch.equal(seen[group * 3 + out, inp], stored[group * 2 + inp, out])
    assert torch.equal(Layout(transposed=True, groups=groups).stored(seen), stored)


def test_layout_leaves_other_layers_alone() -> None:
    weight = torch.randn(4, 3, 2)
    assert Layout().output_first(weight) is weight
    assert Layout(groups=2).stored(weight) is weight


@pytest.mark.parametrize("layer", TRANSPOSED)
@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_transposed_layers_are_outputs(layer: Any, groups: int) -> None:
    torch.manual_seed(0)
    model = layer(4, 8, 3, groups=groups, bias=False)
    Pruner(model, SparsityPlan({"*": 0.5}), granularity=Filter()).update(1.0)
    image = torch.randn(2, 4, *[5] * (model.weight.ndim - 2))
    silent = (model(image) == 0).flatten(2).all(dim=2)
    assert silent.sum(dim=1).tolist() == [4, 4]  # half of the eight outputs, whatever the input
    assert int((model.weight == 0).sum()) == model.weight.numel() // 2


def test_channels_of_transposed_layers_are_inputs() -> None:
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 8, 3, bias=False)
    Pruner(model, SparsityPlan({"*": 0.5}), granularity=Channel()).update(1.0)
    deaf = [int(model(torch.eye(4)[i].reshape(1, 4, 1, 1)).count_nonzero()) == 0 for i in range(4)]
    assert sum(deaf) == 2


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("granularity", [Filter(), Channel(), Kernel()], ids=repr)
def test_transposed_layers_lose_what_their_mirror_images_lose(granularity: Granularity, groups: int) -> None:
    """A transposed convolution of mirrored weights chooses the same groups as the convolution."""
    torch.manual_seed(0)
    plain, turned = nn.Conv2d(4, 8, 3, groups=groups), nn.ConvTranspose2d(4, 8, 3, groups=groups)
    layout = Layout(transposed=True, groups=groups)
    with torch.no_grad():
        turned.weight.copy_(layout.stored(plain.weight))
    for model in (plain, turned):
        Pruner(model, SparsityPlan({"*": 0.5}), granularity=granularity).update(1.0)
    assert torch.equal(layout.output_first(turned.weight), plain.weight)
    assert (plain.weight == 0).any()
