"""Folding of BatchNorm: the same results, and hands off wherever something else looks on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision import models

from lightning_prune.folding import fold_batch_norm

IMAGE = (2, 3, 8, 8)


def trained(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and affine parameters as after a training, negative scales included."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def assert_same(model: nn.Module, x: Any, names: list[str]) -> nn.Module:
    """Folds exactly these, which changes no result; the folded copy is returned."""
    trained(model)
    folded = copy.deepcopy(model)
    assert fold_batch_norm(folded, x) == names
    for name, module in folded.named_modules():
        assert isinstance(module, nn.Identity) or name not in names
        assert not module.training
    with torch.no_grad():
        expected, results = model(x), folded(x)
    for y, z in zip(*((r if isinstance(r, tuple) else (r,)) for r in (expected, results)), strict=True):
        assert (y - z).abs().max() <= 1e-5 * y.abs().max()
    return folded


@pytest.mark.parametrize(
    ("name", "count", "kept"),
    [("resnet18", 20, 0), ("mobilenet_v3_small", 34, 0), ("densenet121", 59, 62), ("shufflenet_v2_x0_5", 56, 0)],
)
def test_networks(name: str, count: int, kept: int) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    image = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        model(image)
        model.eval()
        before = model(image)
        assert len(fold_batch_norm(model, image)) == count
        assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == kept
        assert (model(image) - before).abs().max() <= 1e-5 * before.abs().max()


class Net(nn.Module):
    """A convolution and a BatchNorm, and a forward to be said."""

    def __init__(self, run: Callable[[Any, Tensor], Any], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3, padding=1)
        self.bn: nn.Module = nn.BatchNorm2d(4)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], IMAGE),
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)], IMAGE),
        ([nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), nn.BatchNorm2d(4)], IMAGE),
        ([nn.Conv2d(3, 6, 4, padding="same", groups=3, dilation=2), nn.BatchNorm2d(6, eps=0.1)], IMAGE),
        ([nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)], IMAGE),
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (2, 3, 8)),
        ([nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)], (2, 3, 4, 5, 6)),
        ([nn.Linear(3, 4), nn.BatchNorm1d(4)], (5, 3)),
        ([nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False)], (5, 3)),
        ([nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4)], (1, 3)),
    ],
    ids=str,
)
def test_layers(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    folded = assert_same(nn.Sequential(*layers, nn.ReLU()), torch.randn(shape), [str(len(layers) - 1)])
    assert {name for name, _ in folded.named_parameters()} == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: net.bn(net.conv(x)),
        lambda net, x: net.bn(input=net.conv(input=x)),
        lambda net, x: net.bn(net.conv(x)) + x.mean(),
        lambda net, x: net.bn(net.conv(x)).relu_() + 1,
        lambda net, x: (lambda y: net.bn(y).view(y.shape[0], y.size(1), y.numel() // (len(y) * y.shape[1])))(
            net.conv(x)
        ),
        lambda net, x: (lambda y: net.bn(y) * torch.ones(y.shape, dtype=y.dtype, device=y.device))(net.conv(x)),
        lambda net, x: (lambda y: net.bn(y) if y.dim() == 4 and y.is_contiguous() else y)(net.conv(x)),
        lambda net, x: {"out": net.bn(net.conv(x))}["out"],
    ],
    ids=range(8),
)
def test_what_does_not_read_the_numbers_does_no_harm(run: Callable[[Any, Tensor], Any]) -> None:
    assert_same(Net(run), torch.randn(IMAGE), ["bn"])


@dataclass
class Output:
    """Of a model, and no pytree."""

    first: Tensor
    second: Tensor


class Doubled(torch.autograd.Function):
    """Not seen by modes that watch Python functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 2


def both(read: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Any]:
    def run(net: Any, x: Tensor) -> Any:
        y = net.conv(x)
        return net.bn(y) + read(net, y)

    return run


def kept_in_a_list(net: Any, x: Tensor) -> Any:
    seen = [net.conv(x)]
    return net.bn(seen[0]) + sum(y.sum() for y in seen)


def changed_in_place(net: Any, x: Tensor) -> Any:
    y = net.conv(x)
    y += 1.0
    return net.bn(y)


@pytest.mark.parametrize(
    "run",
    [
        both(lambda net, y: y),
        both(lambda net, y: y.mT.sum()),
        both(lambda net, y: y.data.sum()),
        both(lambda net, y: y.detach()[0, 0, 0, 0]),
        both(lambda net, y: torch.cat([y, y]).sum()),
        both(lambda net, y: Doubled.apply(y)),
        both(lambda net, y: torch.ops.aten.mul(y, 3)),
        both(lambda net, y: torch.tensor(float(y.sum()))),
        both(lambda net, y: torch.tensor(y.cpu().numpy().sum())),
        both(lambda net, y: net.bn(y)),
        lambda net, x: net.bn(net.conv(net.conv(x)[:, :3])),
        lambda net, x: net.bn(net.conv(x)) + net.conv(x),
        lambda net, x: net.bn(net.conv(x)) + net.conv.forward(x),
        lambda net, x: net.bn(net.conv(x)) + net.conv.weight.square().sum(),
        lambda net, x: net.bn(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1),
        lambda net, x: net.bn(net.conv(x).relu()),
        lambda net, x: net.bn(F.relu(net.conv(x), inplace=True)),
        lambda net, x: net.bn(net.conv(x).flatten(2).unflatten(2, x.shape[2:])),
        lambda net, x: net.bn(net.conv(x) * 2),
        lambda net, x: (lambda y: (net.bn(y), y))(net.conv(x)),
        kept_in_a_list,
        changed_in_place,
    ],
    ids=range(22),
)
def test_outputs_that_something_else_reads(run: Callable[[Any, Tensor], Any]) -> None:
    net = Net(run)
    assert_same(net, torch.randn(IMAGE), [])


def test_outputs_in_a_dataclass() -> None:
    net = trained(Net(lambda net, x: (lambda y: Output(net.bn(y), y))(net.conv(x))))
    assert fold_batch_norm(net, torch.randn(IMAGE)) == []


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (2, 4, 3)),
        (nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), (3, 4)),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4), (3, 4, 4)),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
        (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), IMAGE),
        (nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), IMAGE),
        (nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), IMAGE),
        (parametrizations.orthogonal(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), IMAGE),
        (parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), (5, 3)),
        (torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), IMAGE),
        (type("Mine", (nn.Conv2d,), {})(3, 4, 3), nn.BatchNorm2d(4), IMAGE),
        (nn.Conv2d(3, 4, 3), type("Mine", (nn.BatchNorm2d,), {})(4), IMAGE),
    ],
    ids=str,
)
def test_layers_that_are_none_of_its_business(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    assert_same(nn.Sequential(layer, norm), torch.randn(shape), [])


def test_masked_by_a_hook() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    torch.nn.utils.prune.l1_unstructured(model.get_submodule("0"), "weight", 0.5)
    assert fold_batch_norm(model, torch.randn(IMAGE)) == []
    assert set(dict(model.get_submodule("0").named_buffers())) == {"weight_mask"}


def test_batch_norm_in_training_goes_on_training() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model.get_submodule("1").train()
    before = copy.deepcopy(model.state_dict())
    assert fold_batch_norm(model, torch.randn(IMAGE)) == ["3"]
    assert [module.training for module in model.modules()] == [False, False, True, False, False]
    for name, value in model.state_dict().items():
        assert name.startswith("2.") or torch.equal(value, before[name]), name


@pytest.mark.parametrize("shared", ["weight", "bias", "layer"])
def test_shared_weights(shared: str) -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    if shared == "layer":
        second = first
    else:
        setattr(second, shared, getattr(first, shared))
    model = nn.Sequential(first, nn.BatchNorm2d(4), second)
    assert_same(model, torch.randn(2, 4, 5, 5), [] if shared != "bias" else ["1"])


def test_a_batch_norm_of_two_names_goes_under_both() -> None:
    net = Net(lambda net, x: net.layers(x))
    net.layers = nn.Sequential(net.conv, net.bn)
    folded = assert_same(net, torch.randn(IMAGE), ["bn"])
    assert isinstance(folded.get_submodule("layers.1"), nn.Identity)


def test_zeros_stay_zeros() -> None:
    layer = nn.Conv2d(3, 8, 3)
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape) < 0.5] = 0.0
        layer.weight[2] = 0.0
    model = trained(nn.Sequential(layer, norm))
    assert (norm.weight < 0).any()
    zero = (layer.weight == 0).clone()
    fold_batch_norm(model, torch.randn(IMAGE))
    assert torch.equal(layer.weight == 0, zero)
    assert not torch.signbit(layer.weight[zero]).any()


def test_hooks_are_kept_and_see_what_they_saw() -> None:
    registrations: list[Callable[[Net, Callable[..., None]], object]] = [
        lambda net, hook: net.conv.register_forward_hook(hook),
        lambda net, hook: net.conv.register_forward_pre_hook(hook),
        lambda net, hook: net.bn.register_forward_hook(hook),
        lambda net, hook: net.bn.register_forward_pre_hook(hook),
        lambda net, hook: net.conv.register_full_backward_hook(hook),
        lambda net, hook: net.bn.register_full_backward_pre_hook(hook),
    ]
    for register in registrations:
        net = Net(lambda net, x: net.bn(net.conv(x)))
        trained(net)
        register(net, lambda *args: None)
        before = {name: {k: dict(v) for k, v in vars(m).items() if "hooks" in k} for name, m in net.named_modules()}
        assert fold_batch_norm(net, torch.randn(IMAGE)) == []
        after = {name: {k: dict(v) for k, v in vars(m).items() if "hooks" in k} for name, m in net.named_modules()}
        assert after == before


def test_leaves_all_else_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.frozen = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.after = nn.BatchNorm2d(4)
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            self.calls += 1
            self.last = x.mul_(scale)
            y: Tensor = self.after(self.frozen(self.bn(self.conv(x)))) + torch.randn(())
            return y

    model = Noisy()
    model.frozen.requires_grad_(False)
    trained(model)
    x = torch.randn(IMAGE)
    before, state = x.clone(), torch.get_rng_state()
    assert fold_batch_norm(model, {"x": x, "scale": 3.0}) == ["bn", "after"]
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert not hasattr(model, "last")
    assert [p.requires_grad for p in (model.conv.weight, model.conv.bias)] == [True, True]  # type: ignore[union-attr]
    assert [p.requires_grad for p in (model.frozen.weight, model.frozen.bias)] == [False, False]  # type: ignore[union-attr]
    assert torch.is_grad_enabled()
    assert not model.conv._forward_hooks
    assert model.conv.weight.is_leaf


def test_twice_is_once() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    x = torch.randn(IMAGE)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norm(model, x) == ["1"]
        assert fold_batch_norm(model, x) == ["2"]
        assert fold_batch_norm(model, x) == []
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norm(model, x) == ["1"]
        y = model(x)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


def test_memory_format_is_kept() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    fold_batch_norm(model, torch.randn(IMAGE))
    weight = model.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_a_model_that_does_not_run() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(RuntimeError, match="channels"):
        fold_batch_norm(model, torch.randn(1, 5, 8, 8))
    assert not model.get_submodule("0")._forward_hooks
