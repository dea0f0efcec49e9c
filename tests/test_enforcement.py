"""Masks on weights, gradients, optimizer state and copies, whatever their dtype, layout and owner."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import Filter, Pruner, SparsityPlan
from lightning_prune.enforcement import Enforcer


def half(shape: Any, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def watched(weight: nn.Parameter, mask: Tensor) -> Enforcer:
    enforcer = Enforcer({"weight": weight})
    enforcer.set({"weight": mask})
    return enforcer


class MasterAdam(torch.optim.Adam):
    """Keeps its moments in float32, whatever the dtype of the parameters."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["mean"], state["square"] = (torch.zeros(parameter.shape) for _ in range(2))
                gradient = parameter.grad.float()
                state["step"] += 1
                state["mean"].lerp_(gradient, 0.1)
                state["square"].lerp_(gradient.square(), 0.01)
                with torch.no_grad():
                    parameter.sub_((0.1 * state["mean"] / (state["square"].sqrt() + 1e-3)).to(parameter.dtype))
        return None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_of_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, mask = nn.Parameter(torch.randn(6, 5).to(dtype)), half((6, 5))
    kept = weight.detach().clone()
    enforcer, optimizer = watched(weight, mask), torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    assert torch.equal(weight.detach(), kept * mask)
    enforcer.attach([optimizer])
    for _ in range(3):
        gradient = torch.randn(6, 5).to(dtype)
        weight.grad = gradient.clone()
        enforcer.mask_gradients(optimizer)
        assert torch.equal(weight.grad, gradient * mask)
        optimizer.step()
        assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_of_another_dtype_than_the_parameter(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, mask = nn.Parameter(torch.randn(6, 5).to(dtype)), half((6, 5))
    enforcer, optimizer = Enforcer({"weight": weight}), MasterAdam([weight])
    enforcer.attach([optimizer])
    weight.grad = torch.randn(6, 5).to(dtype)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if key != "step"}
    enforcer.set({"weight": mask})
    enforcer.mask_state([optimizer])
    for key, value in before.items():
        assert torch.equal(optimizer.state[weight][key], value * mask)
    assert optimizer.state[weight]["step"] == 1
    weight.grad = torch.randn(6, 5).to(dtype)
    optimizer.step()  # no optimizer that is known to keep zeros, and its gradients were not masked
    assert torch.equal(weight != 0, mask)


def test_state_that_is_no_tensor_or_of_another_shape_is_left_alone() -> None:
    weight, other = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    enforcer, optimizer = watched(weight, half((4, 4))), torch.optim.Adam([weight, other])
    weight.grad, other.grad = torch.ones(4, 4), torch.ones(4, 4)
    optimizer.step()
    optimizer.state[weight]["row"], optimizer.state[weight]["note"] = torch.ones(4), "a word"
    optimizer.state["everything"] = [1, 2]  # type: ignore[index]  # some optimizers keep what is nobody's
    optimizer.state[weight]["exp_avg"].fill_(1.0)
    enforcer.mask_state([optimizer])
    assert optimizer.state[weight]["step"] == 1
    assert optimizer.state[weight]["row"].tolist() == [1.0] * 4
    assert torch.equal(optimizer.state[weight]["exp_avg"], half((4, 4)).float())
    assert optimizer.state[other]["exp_avg"].all()


def test_masking_turns_every_number_into_zero() -> None:
    weight = nn.Parameter(torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 5.0, math.nan]))
    watched(weight, torch.tensor([False] * 5 + [True, True]))
    assert weight[:5].tolist() == [0.0] * 5
    assert not torch.signbit(weight[:5]).any()
    assert weight[5] == 5.0
    assert torch.isnan(weight[6])


def test_channels_last_weights_keep_their_layout() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)
    weight, mask = model.get_parameter("weight"), half((6, 4, 3, 3))
    before = weight.detach().clone()
    enforcer, optimizer = watched(weight, mask), torch.optim.Adam([weight], lr=0.1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight.detach(), before * mask)
    enforcer.attach([optimizer])
    for contiguous in (False, True):
        gradient = torch.randn(6, 4, 3, 3)
        weight.grad = gradient.clone() if contiguous else gradient.to(memory_format=torch.channels_last)
        enforcer.mask_gradients(optimizer)
        assert torch.equal(weight.grad, gradient * mask)
        optimizer.step()
        assert torch.equal(weight != 0, mask)
    enforcer.set({"weight": half((6, 4, 3, 3), seed=1)})
    enforcer.mask_state([optimizer])
    assert not optimizer.state[weight]["exp_avg"][~half((6, 4, 3, 3), seed=1)].any()


def test_pruning_a_channels_last_network_end_to_end() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    twin = nn.Conv2d(4, 8, 3)
    twin.load_state_dict(model.state_dict())
    for network in (model, twin):
        Pruner(network, SparsityPlan({"*": 0.5}), granularity=Filter()).update(1.0)
    assert torch.equal(model.weight, twin.weight)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients(momentum: float) -> None:
    torch.manual_seed(0)
    embedding, mask = nn.Embedding(10, 4, sparse=True), half((10, 4))
    enforcer = watched(embedding.get_parameter("weight"), mask)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=momentum)
    enforcer.attach([optimizer])
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 3, 3])).square().sum().backward()
        enforcer.mask_gradients(optimizer)
        optimizer.step()
        assert torch.equal(embedding.weight != 0, mask)


def test_sparse_and_dense_gradients_in_one_optimizer() -> None:
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4, bias=False)
    masks = {"embedding": half((10, 4)), "linear": half((4, 4), seed=1)}
    enforcer = Enforcer({"embedding": embedding.get_parameter("weight"), "linear": linear.get_parameter("weight")})
    enforcer.set(masks)
    optimizer = torch.optim.SGD([embedding.weight, linear.weight], lr=0.1)
    enforcer.attach([optimizer])
    linear(embedding(torch.tensor([1, 3])) + 1).square().sum().backward()
    enforcer.mask_gradients(optimizer)
    optimizer.step()
    assert torch.equal(embedding.weight != 0, masks["embedding"])
    assert torch.equal(linear.weight != 0, masks["linear"])


def test_parameters_that_join_an_optimizer_later() -> None:
    first, second = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
    masks = {"first": half(8), "second": half(8, seed=1)}
    enforcer = Enforcer({"first": first, "second": second})
    enforcer.set(masks)
    optimizer = torch.optim.Adam([first], lr=0.1, weight_decay=0.1)
    enforcer.attach([optimizer])
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [second], "lr": 0.5})
        first.grad, second.grad = torch.randn(8), torch.randn(8)
        enforcer.mask_gradients(optimizer)
        optimizer.step()
        assert torch.equal(first != 0, masks["first"])
        assert torch.equal(second != 0, masks["second"])
    assert set(enforcer.owned(optimizer)) == {"first", "second"}
    assert not optimizer.state[second]["exp_avg"][~masks["second"]].any()


def test_frozen_and_unwatched_parameters_have_no_gradient_to_mask() -> None:
    weight, frozen, stranger = (nn.Parameter(torch.randn(4)) for _ in range(3))
    dense = nn.Parameter(torch.randn(4))
    enforcer = Enforcer({"weight": weight, "frozen": frozen, "dense": dense})
    enforcer.set({"weight": half(4)})
    optimizer = torch.optim.SGD([weight, frozen, stranger, dense], lr=0.1)
    weight.grad, stranger.grad, dense.grad = torch.ones(4), torch.ones(4), torch.ones(4)
    assert list(enforcer.owned(optimizer)) == ["weight", "dense"]
    enforcer.mask_gradients(optimizer)
    assert stranger.grad.tolist() == dense.grad.tolist() == [1.0] * 4


def test_a_step_that_saw_no_masked_gradients_is_made_up_for() -> None:
    """Masked gradients are good for one step only."""
    weight, mask = nn.Parameter(torch.randn(8)), half(8)
    enforcer, optimizer = watched(weight, mask), torch.optim.SGD([weight], lr=0.1)
    enforcer.attach([optimizer])
    weight.grad = torch.ones(8)
    enforcer.mask_gradients(optimizer)
    optimizer.step()
    weight.grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(weight != 0, mask)


def test_gradients_masked_before_attaching_anew_are_forgotten() -> None:
    weight, mask = nn.Parameter(torch.randn(8)), half(8)
    enforcer, optimizer = watched(weight, mask), torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(8)
    enforcer.mask_gradients(optimizer)
    enforcer.attach([optimizer])
    weight.grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(weight != 0, mask)


def test_gradients_masked_for_one_optimizer_say_nothing_of_another() -> None:
    one, two = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
    masks = {"one": half(8), "two": half(8, seed=1)}
    enforcer = Enforcer({"one": one, "two": two})
    enforcer.set(masks)
    first, second = torch.optim.SGD([one], lr=0.1), torch.optim.SGD([two], lr=0.1)
    enforcer.attach([first, second])
    one.grad, two.grad = torch.ones(8), torch.ones(8)
    enforcer.mask_gradients(first)
    second.step()
    assert torch.equal(two != 0, masks["two"])


def test_a_closure_that_computes_gradients_within_the_step() -> None:
    torch.manual_seed(0)
    weight, mask = nn.Parameter(torch.randn(8)), half(8)
    enforcer = watched(weight, mask)
    optimizer = torch.optim.LBFGS([weight], lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    enforcer.attach([optimizer])

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (weight - torch.arange(8.0)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert not weight[~mask].any()
    assert weight[mask].any()
    assert enforcer.stepped


def test_attaching_again_lets_go_of_what_was_attached() -> None:
    weight = nn.Parameter(torch.randn(8))
    enforcer = watched(weight, half(8))
    first, second = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1)
    enforcer.attach([first])
    enforcer.attach([second])
    weight.grad = torch.zeros(8)
    first.step()
    assert not enforcer.stepped
    second.step()
    assert enforcer.stepped
    enforcer.stepped = False
    enforcer.detach()
    second.step()
    assert not enforcer.stepped


def test_new_masks_replace_old_ones() -> None:
    weight, optimizer_mask = nn.Parameter(torch.randn(8)), half(8)
    enforcer, optimizer = watched(weight, optimizer_mask), torch.optim.SGD([weight], lr=0.1)
    enforcer.set({"weight": ~optimizer_mask})
    assert not weight.any()  # removed by one or the other
    weight.grad = torch.ones(8)
    enforcer.mask_gradients(optimizer)
    assert torch.equal(weight.grad != 0, ~optimizer_mask)


class Inner(nn.Module):
    """A model whose child has the name that torch's averages give to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), Inner, lambda: nn.Sequential(nn.Linear(4, 4))])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, AveragedModel, lambda m: torch.compile(m, backend="eager")])
def test_copies_of_the_model(build: Any, duplicate: Any) -> None:
    model = build()
    masks = {name: half((4, 4), seed=i) for i, (name, p) in enumerate(model.named_parameters()) if p.ndim == 2}
    twin = duplicate(copy.deepcopy(model))
    enforcer = Enforcer({name: model.get_parameter(name) for name in masks})
    enforcer.set(masks)
    enforcer.mask_copy(twin)
    copied = {
        name.removeprefix("_orig_mod.").removeprefix("module." if isinstance(twin, AveragedModel) else ""): parameter
        for name, parameter in twin.named_parameters()
    }
    for name, parameter in copied.items():
        assert torch.equal(parameter != 0, masks.get(name, torch.ones(parameter.shape, dtype=torch.bool)))


def test_modules_that_are_no_copy_are_left_alone() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 3)
    enforcer = Enforcer(dict(model.named_parameters()))
    enforcer.set({"weight": half((4, 4))})
    for stranger in (other, nn.ReLU(), nn.Conv1d(4, 4, 1)):
        enforcer.mask_copy(stranger)
        assert all(parameter.all() for parameter in stranger.parameters())
