"""Constant inputs are done without: outputs stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.kernels import Dense
from lightning_prune.preparation import Prepared
from tests.latency.profiles import residual

ACTIVATIONS: list[nn.Module] = [
    nn.CELU(),
    nn.ELU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardshrink(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.Hardtanh(),
    nn.LeakyReLU(),
    nn.LogSigmoid(),
    nn.LogSoftmax(dim=1),
    nn.Mish(),
    nn.PReLU(),
    nn.RReLU(),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.SELU(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.Softmax(dim=1),
    nn.Softmin(dim=1),
    nn.Softplus(),
    nn.Softshrink(),
    nn.Softsign(),
    nn.Tanh(),
    nn.Tanhshrink(),
    nn.Threshold(0.1, 20.0),
]


def kill(model: nn.Module, share: float, seed: int = 0) -> None:
    """Set filters to zero, and give biases and BatchNorms something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                dead = torch.rand(len(module.weight), generator=generator) < share
                module.weight[dead] = 0.0
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                module.bias.normal_(generator=generator)


def prepared(model: nn.Module, example: Any) -> Prepared:
    return Prepared.of(model, example)


def outputs(done: Prepared, *inputs: Any) -> Tensor:
    """Of the network with its borders."""
    network = done.network("nchw", {name: Dense() for name in done.layers})
    with torch.no_grad():
        y: Tensor = network(*inputs)
        return y


def assert_same(model: nn.Module, done: Prepared, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(outputs(done, *inputs), model.eval()(*inputs), rtol=1e-9, atol=1e-11)


def met(layer: Any) -> int:
    """Inputs that a layer still reads."""
    weight = layer.weight
    return int((weight != 0).flatten(2).any(2).any(0).sum() if weight.ndim > 2 else (weight != 0).any(0).sum())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_every_activation(activation: nn.Module, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12, bias), activation, nn.Linear(12, 8), copy.deepcopy(activation), nn.Linear(8, 3)
    )
    model = model.double().eval()
    kill(model, 0.4)
    done = prepared(model, torch.randn(5, 6).double())
    assert_same(model, done, torch.randn(7, 6).double())
    first: Any = model[0]
    dead = int((first.weight == 0).all(1).sum())
    assert dead
    mixes = "Soft" in str(activation) and "dim" in str(activation)
    assert met(done.layers["2"]) == (12 if mixes else 12 - dead)


def test_no_activation_of_torch_is_forgotten() -> None:
    names = set(nn.modules.activation.__all__) - {"GLU", "MultiheadAttention", "Softmax2d"}
    names = {name for name in names if name != "LogSoftmax"}
    assert names <= {type(module).__name__ for module in ACTIVATIONS}


@st.composite
def convolutions(draw: Any) -> tuple[nn.Sequential, Tensor]:
    """A stack of convolutions of all sorts."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(draw(st.integers(2, 4))):
        window, dilation = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
        padding: Any = (
            draw(st.sampled_from([0, 1, (0, 1), "same", "valid"])) if window > 1 else draw(st.sampled_from([0, 1]))
        )
        if window == 2 and padding == "same":
            padding = 1
        stride = 1 if padding == "same" else draw(st.sampled_from([1, 1, 2]))
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
        out = draw(st.sampled_from([4, 6]))
        groups = draw(st.sampled_from([1, 1, channels, 2]))
        if channels % groups or out % groups:
            groups, out = (channels, channels) if groups == channels else (1, out)
        layers.append(nn.Conv2d(channels, out, window, stride, padding, dilation, groups, draw(st.booleans()), mode))
        channels = out
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(channels))
        layers.append(
            draw(st.sampled_from([nn.ReLU(), nn.Sigmoid(), nn.Identity(), nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(2, 1)]))
        )
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)).double().eval()
    kill(model, draw(st.sampled_from([0.3, 0.7, 1.0])), draw(st.integers(0, 2**20)))
    return model, torch.randn(2, 3, 33, 31).double()


@settings(max_examples=60)
@given(case=convolutions())
def test_convolutions(case: tuple[nn.Sequential, Tensor]) -> None:
    model, x = case
    done = prepared(model, x)
    assert_same(model, done, torch.randn_like(x))
    if not any(isinstance(module, nn.AvgPool2d) for module in model):  # its borders reach as far as they reach
        assert_same(model, done, torch.randn(1, 3, 34, 32).double())
    assert_same(model, done, torch.randn(3, 33, 31).double().unsqueeze(0))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**20), share=st.sampled_from([0.2, 0.5, 0.9]))
def test_residual_networks(seed: int, share: float) -> None:
    model, x = residual()
    model.double()
    kill(model, share, seed)
    assert_same(model, prepared(model, x.double()), torch.randn(5, 3, 8, 8).double())


class Gated(nn.Module):
    """Squeeze-and-excitation, concatenation, normalisation, upsampling, attention and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.shared = nn.Conv2d(16, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.after = nn.Conv2d(16, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.a(x), self.b(x).relu()], dim=1)
        h = h * self.excite(self.squeeze(h.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        h = self.shared(self.shared(h).relu())
        h = self.norm(h)
        h = nn.functional.interpolate(self.after(h), scale_factor=2, mode="nearest").flatten(2).transpose(1, 2)
        h, _ = self.attention(h, h, h, need_weights=False)
        y: Tensor = self.out(h.mean(1))
        return y


@pytest.mark.parametrize("seed", range(5))
def test_everything_else(seed: int) -> None:
    torch.manual_seed(seed)
    model = Gated().double().eval()
    kill(model, 0.5, seed)
    x = torch.randn(2, 3, 6, 6).double()
    done = prepared(model, x)
    assert_same(model, done, torch.randn(3, 3, 6, 6).double())
    assert met(done.layers["squeeze"]) < 16


def decisive(decide: Callable[[Tensor], Tensor]) -> nn.Module:
    class Decisive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(decide(self.first(x)))
            return y

    return Decisive()


def by_sum(h: Tensor) -> Tensor:
    return h if h.sum() > 0 else -h


def by_item(h: Tensor) -> Tensor:
    return h * (1.0 if h.mean().item() > 0 else 2.0)


def by_float(h: Tensor) -> Tensor:
    return h * max(float(h.mean()), 0.0)


def by_truth(h: Tensor) -> Tensor:
    return h if h[0, 0].round() else h + 1


def by_list(h: Tensor) -> Tensor:
    first: float = h.flatten().tolist()[0]
    return h + max(first, 0.0)


def by_index(h: Tensor) -> Tensor:
    return h.gather(1, h.argsort(dim=1))


DECISIONS: list[Callable[[Tensor], Tensor]] = [
    by_sum,
    by_item,
    by_float,
    by_truth,
    by_list,
    by_index,
    lambda h: torch.where(h > 0, h, h * 0.5),
    lambda h: h.masked_fill(h < 0, 3.0),
    lambda h: h.sign(),
    lambda h: h.clone().sgn_(),
    lambda h: h.nan_to_num(1.0),
    lambda h: torch.fmax(h, torch.zeros_like(h)),
    lambda h: h * (h >= h.mean()),
    lambda h: h + h.argmax(1, keepdim=True),
    lambda h: h + h.topk(2).indices.sum(),
    lambda h: h + h.max(1, keepdim=True).values,
    lambda h: h + h.sort(1).values,
    lambda h: h + h.round().long(),
    lambda h: h + h.to(torch.bool),
    lambda h: h + torch.copysign(torch.ones_like(h), h),
    lambda h: h + torch.heaviside(h, torch.ones_like(h)),
    lambda h: h + torch.from_numpy(h.detach().numpy().clip(0)),
    lambda h: h.clone().gt_(0.0),
    lambda h: h.detach().isnan() + h,
]


@pytest.mark.parametrize("decide", DECISIONS, ids=range(len(DECISIONS)))
def test_what_loses_the_unknown_is_left_alone(decide: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = decisive(decide).double().eval()
    kill(model, 0.5)
    done = prepared(model, torch.randn(3, 4).double())
    for _ in range(5):
        assert_same(model, done, torch.randn(3, 4).double())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.last(self.first(self.embedding(tokens)))
        return y if scale is None else y * scale


@pytest.mark.parametrize("scaled", [False, True])
def test_whole_numbers_cannot_be_unknown(scaled: bool) -> None:
    torch.manual_seed(0)
    model = Tokens().double().eval()
    kill(model, 0.5)
    inputs: tuple[Tensor, ...] = (torch.randint(0, 9, (3, 4)),)
    inputs += (torch.ones(1).double(),) if scaled else ()
    assert_same(model, prepared(model, inputs), torch.randint(0, 9, (2, 5)))


def test_scripts_are_left_alone() -> None:
    torch.manual_seed(0)

    class Scripted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, torch.zeros_like(x))

    with pytest.warns(Warning, match="script"):
        inner = torch.jit.script(Scripted())
    model = nn.Sequential(nn.Linear(4, 8), inner, nn.Linear(8, 3)).double().eval()
    kill(model, 0.5)
    done = prepared(model, torch.randn(3, 4).double())
    assert met(done.layers["2"]) == 8
    assert_same(model, done, torch.randn(3, 4).double())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.mean.mul_(0.5).add_(0.5 * h.mean(0))
        y: Tensor = self.last(h - self.mean)
        return y


def test_buffers_do_not_become_unknown() -> None:
    model = Counting().eval()
    kill(model, 0.5)
    done = prepared(model, torch.randn(3, 4))
    assert all(torch.isfinite(value).all() for value in done.model.state_dict().values())


def test_constants_go_into_the_bias() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 1, 3, padding=1)
    ).eval()
    with torch.no_grad():
        model[0].weight[1:] = 0.0
        model[0].bias[1:] = torch.tensor([2.0, -2.0])
        model[2].weight[1] = 0.0
    done = prepared(model, torch.ones(1, 1, 6, 6))
    assert met(done.layers["2"]) == 1
    second = done.layers["2"]
    assert second.bias is not None
    torch.testing.assert_close(second.bias, torch.tensor([2.0 * model[2].weight[0, 1].sum().item(), 0.0]))
    assert met(done.layers["3"]) == 1
    assert "3" not in done.borders  # a channel that is zero adds nothing, inside or at the border
    assert model[2].bias is None


def test_loud_constants_have_borders() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[1:] = 0.0
        model[0].bias[1:] = torch.tensor([2.0, 0.0])
    done = prepared(model, torch.ones(1, 1, 6, 6))
    assert list(done.borders) == ["1"]
    assert done.borders["1"].values.tolist() == [2.0]
    assert met(done.layers["1"]) == 1
    for layout in ("nchw", "nhwc"):
        network = done.network(layout, {"1": Dense(layout)})
        x = torch.randn(2, 1, 5, 7)
        with torch.no_grad():
            torch.testing.assert_close(network(x), model(x))
            torch.testing.assert_close(network(x[0]), model(x[0]))
