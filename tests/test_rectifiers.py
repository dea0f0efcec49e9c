"""Layers that rectify their own outputs, and poolings in two steps: nobody can tell."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import pooling
from lightning_prune.kernels import SIMD, native
from lightning_prune.kernels.simd import SparseLayer
from lightning_prune.pooling import SeparablePool, separate_pools
from lightning_prune.preparation import Prepared, in_layout
from lightning_prune.rectifiers import Rectifier, mark_rectified, rectified_layers, skip_rectified
from lightning_prune.runtime import AcceleratedModel, assembled

compiled = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


class Wired(nn.Module):
    """Two layers and a ReLU module, wired up by a function."""

    def __init__(self, wiring: Any, inplace: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.relu, self.wiring = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace), wiring

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


def added_in_place(m: Wired, x: Tensor) -> Tensor:
    y = m.relu(m.one(x))
    y += m.two(x)
    return m.relu(y)  # type: ignore[no-any-return]


def changed_before(m: Wired, x: Tensor) -> Tensor:
    y = m.one(x)
    y -= 1.0
    return m.two(m.relu(y))  # type: ignore[no-any-return]


def read_twice(m: Wired, x: Tensor) -> Tensor:
    y = m.one(x)
    return m.relu(y) - y  # type: ignore[no-any-return]


def read_before(m: Wired, x: Tensor) -> Tensor:
    y = m.one(x)
    z = y * 2.0
    return m.relu(y) - z  # type: ignore[no-any-return]


def read_afterwards(m: Wired, x: Tensor) -> Tensor:
    y = m.one(x)
    z = m.relu(y)
    return z + m.two(z) + y  # type: ignore[no-any-return]


def returned(m: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.one(x)
    return m.relu(y), y


def called_twice(m: Wired, x: Tensor) -> Tensor:
    return m.relu(m.one(m.relu(m.one(x))))  # type: ignore[no-any-return]


def twice_rectified(m: Wired, x: Tensor) -> Tensor:
    return m.relu(m.two(m.relu(m.one(x))))  # type: ignore[no-any-return]


WIRINGS: dict[str, tuple[Any, list[str], list[str]]] = {
    "added in place": (added_in_place, ["one"], ["one"]),
    "changed before": (changed_before, [], []),
    "read twice": (read_twice, [], ["one"]),
    "read before": (read_before, [], []),
    "read afterwards": (read_afterwards, [], ["one"]),
    "returned": (returned, [], ["one"]),
    "twice rectified": (twice_rectified, ["one", "two"], ["one", "two"]),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", list(WIRINGS))
def test_only_what_nobody_sees_is_rectified(name: str, inplace: bool) -> None:
    wiring, kept, in_place = WIRINGS[name]
    model = Wired(wiring, inplace).eval()
    assert rectified_layers(model, torch.randn(3, 4), ["one", "two"]) == (in_place if inplace else kept)


@compiled
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", [*WIRINGS, "called twice"])
def test_networks_give_the_same(name: str, inplace: bool) -> None:
    torch.manual_seed(0)
    wiring = called_twice if name == "called twice" else WIRINGS[name][0]
    model = Wired(wiring, inplace).eval().requires_grad_(False)
    prepared = Prepared.of(model, torch.randn(3, 4))
    fast = prepared.network("nchw", {layer: SIMD() for layer in prepared.layers})
    for _ in range(20):
        x = torch.randn(5, 4)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@compiled
def test_a_residual_network_with_shared_relus(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval().requires_grad_(False)
    x = torch.randn(2, 3, 40, 40)
    chosen = {n: SIMD() for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    fast: Any = assembled(model, x, chosen)
    rectified = [n for n, m in fast.network.named_modules() if isinstance(m, SparseLayer) and m.relu]
    assert rectified == ["conv1", *(f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2))]
    assert not any(type(m) is nn.ReLU for m in fast.network.modules())
    assert isinstance(fast.network.maxpool, SeparablePool)
    fast.save(tmp_path / "fast.pt")
    loaded = AcceleratedModel.load(tmp_path / "fast.pt", torchvision.models.resnet18(num_classes=7))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 40, 40)
        expected = model(x)
        networks: list[Any] = [fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded]
        for network in networks:
            assert float((network(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@compiled
def test_constants_are_added_before_anything_is_rectified() -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    first.weight[:4], first.bias[:4] = 0.0, 1.0  # type: ignore[index]
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    prepared = Prepared.of(model, x)
    assert list(prepared.borders) == ["2"]
    fast = prepared.network("nchw", {"0": SIMD(), "2": SIMD()})
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_without_such_a_layer_relus_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    fast: Any = assembled(model, torch.ones(1, 4), {})
    assert type(fast.network[1]) is nn.ReLU


def test_a_mark_holds_for_one_look() -> None:
    relu = Rectifier()
    x = mark_rectified(torch.tensor([-1.0, 1.0]))
    assert relu(x) is x
    assert relu(x).tolist() == [0.0, 1.0]
    assert not hasattr(x + 1, "rectified")
    y = torch.tensor([-1.0])
    assert Rectifier(inplace=True)(y) is y
    assert y.item() == 0.0


def test_watched_relus_stay() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU(True), nn.ReLU6())
    model[0].register_forward_hook(lambda *_: None)
    skip_rectified(model)
    assert [type(m) for m in model] == [nn.ReLU, Rectifier, nn.ReLU6]
    assert model[1].inplace


@pytest.mark.parametrize("shape", [(2, 16, 9, 11), (1, 8, 6, 6), (3, 4, 8, 8), (16, 9, 9), (0, 8, 6, 6)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"stride": [2]}, {"stride": 1, "padding": (1,)}, {"ceil_mode": True, "dilation": 2}], ids=str
)
def test_pooling_is_the_same(shape: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_FEWEST_NUMBERS", 0)
    pool = nn.MaxPool2d(3, **options)
    model = nn.Sequential(copy.deepcopy(pool))
    separate_pools(model)
    assert isinstance(model[0], SeparablePool)
    x = torch.randn(shape)
    x.flatten()[:3] = torch.nan
    y, expected = model(x), pool(x)
    assert torch.equal(y.nan_to_num(9), expected.nan_to_num(9))
    assert y.stride() == expected.stride()
    if x.ndim == 4:
        lying = x.to(memory_format=torch.channels_last)
        assert torch.equal(model(lying).nan_to_num(9), expected.nan_to_num(9))


@settings(max_examples=150)
@given(data=st.data())
def test_pooling_of_any_window_is_the_same(data: st.DataObject) -> None:
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.integers(least, most)), data.draw(st.integers(least, most))

    window, stride, size = pair(1, 5), pair(1, 4), pair(1, 12)
    padding = (data.draw(st.integers(0, window[0] // 2)), data.draw(st.integers(0, window[1] // 2)))
    assume(all(n + 2 * p >= w for n, p, w in zip(size, padding, window, strict=True)))
    pool = nn.MaxPool2d(window, stride, padding, ceil_mode=data.draw(st.booleans()))
    separable = SeparablePool(pool)
    x = torch.randn(1, 2, *size)
    x[0, 0, 0, 0] = torch.nan
    before = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "_FEWEST_NUMBERS", 0)
        y = separable(x)
        if all(map(pooling._Step.fits, separable.steps, size)):
            patch.setattr(nn.MaxPool2d, "forward", lambda *_: pytest.fail("this was not left to PyTorch"))
            separable(x)
    assert torch.equal(y.nan_to_num(9), pool(x).nan_to_num(9))
    assert y.is_contiguous()
    y.fill_(7.0)
    assert torch.equal(x.nan_to_num(9), before.nan_to_num(9))


def test_poolings_are_replaced_in_one_layout_only() -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2))
    assert [type(m) for m in in_layout(model, "nchw").children()] == [SeparablePool, nn.MaxPool2d, nn.AvgPool2d]
    assert [type(m) for m in in_layout(model, "nhwc").children()] == [nn.MaxPool2d, nn.MaxPool2d, nn.AvgPool2d]
    assert type(model[0]) is nn.MaxPool2d
