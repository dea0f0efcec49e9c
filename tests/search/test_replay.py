"""Replayed passes are those of the whole network, bit by bit, and run no more than they must."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.search.replay import CannotReplayError, Recording
from lightning_prune.targets import plain_name
from tests.search.networks import FLAT, IMAGES, InPlace, Moody, Random, Residual, Shared, batch_for, build, mlp


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    # As a scan does: a fused kernel of attention would call other modules than the recorded pass.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(True)


def halved(parameter: Tensor) -> None:
    parameter.view(-1)[::2] = 0.0


@pytest.mark.parametrize("make", [each for each in FLAT + IMAGES if each.__name__ != "Counting"])
def test_a_replay_is_a_whole_pass_bit_by_bit(make: Any) -> None:
    network, (x, _) = build(make), batch_for(make)
    reference = copy.deepcopy(network)
    recording = Recording(network, lambda: network(x.clone()))
    assert torch.equal(recording.result, reference(x.clone()))
    different = 0
    for name, parameter in network.named_parameters():
        # First the check, so that what a replay finds left behind is of the pass before, with another pruned layer.
        assert torch.equal(recording.replay(name, lambda: network(x.clone()), check=True), recording.result)
        dense = parameter.clone()
        halved(parameter)
        halved(reference.get_parameter(name))
        expected = reference(x.clone())
        for _ in range(2):  # the recording survives being used
            assert torch.equal(recording.replay(name, lambda: network(x.clone())), expected), name
        different += not torch.equal(expected, recording.result)
        parameter.copy_(dense)
        reference.get_parameter(name).copy_(dense)
    assert different >= 4  # pruning was felt at all
    assert not any("forward" in module.__dict__ for module in network.modules())


class Ran:
    """Which modules really compute."""

    def __init__(self, network: nn.Module) -> None:
        self.names: list[str] = []
        for name, module in network.named_modules():
            if not list(module.children()):
                module.forward = self._noted(name, module.forward)

    def _noted(self, name: str, forward: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return forward(*args, **kwargs)

        return noted

    def during(self, run: Any) -> list[str]:
        self.names.clear()
        run()
        return list(self.names)


def test_only_what_comes_after_is_run() -> None:
    network, (x, _) = build(Residual), batch_for(Residual)
    ran = Ran(network)
    recording = Recording(network, lambda: network(x))

    def of(name: str) -> list[str]:
        return ran.during(lambda: recording.replay(name, lambda: network(x)))

    whole = ran.during(lambda: network(x))
    assert of("stem.weight") == whole
    assert of("head.weight") == ["head"]
    assert of("blocks.1.conv2.weight") == ["blocks.1.conv2", "blocks.1.bn2", "head"]
    assert of("blocks.1.conv1.weight") == whole[whole.index("blocks.1.conv1") :]
    assert of("blocks.0.bn2.bias") == whole[whole.index("blocks.0.bn2") :]
    assert of("no such weight") == whole
    assert [type(call.module).__name__ for call in recording.reused("head.weight")] == ["Conv2d", "Sequential"]


def test_a_weight_counts_from_its_first_use_wherever_that_is() -> None:
    network, (x, _) = build(Shared), batch_for(Shared)
    ran = Ran(network)
    recording = Recording(network, lambda: network(x))
    whole = ran.during(lambda: network(x))
    assert whole == ["before", "again", "again", "again", "tied", "loose", "head"]
    assert ran.during(lambda: recording.replay("loose.weight", lambda: network(x))) == whole[1:]
    assert ran.during(lambda: recording.replay("again.weight", lambda: network(x))) == whole[1:]
    assert ran.during(lambda: recording.replay("loose.bias", lambda: network(x))) == whole[5:]


def test_overwritten_outputs_are_recorded_as_they_were() -> None:
    network, (x, _) = build(InPlace), batch_for(InPlace)
    recording = Recording(network, lambda: network(x))
    assert recording.passes == 2  # the first one showed what is overwritten
    ran = Ran(network)
    names = ran.during(lambda: recording.replay("third.weight", lambda: network(x)))
    assert "first" not in names
    assert "second" not in names
    assert "relu" in names  # its effect on its input is needed
    assert Recording(build(mlp), lambda: None).passes == 1


def test_shares_are_those_of_flops() -> None:
    network = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 6)), nn.Linear(6, 3))
    x = torch.randn(5, 8)
    recording = Recording(network, lambda: network(x))
    assert recording.share_run("2.weight") == 1.0  # not counted yet
    recording.count(lambda: network(x))
    macs = [8 * 4, 4 * 6, 6 * 3]
    assert recording.total_flops == 2 * 5 * sum(macs)
    for place, name in enumerate(["0.weight", "1.1.weight", "2.weight"]):
        assert recording.share_run(name) == pytest.approx(sum(macs[place:]) / sum(macs))
    assert recording.share_run("unknown") == 1.0


def test_randomness_shows_in_a_check() -> None:
    network, (x, _) = build(Random), batch_for(Random)
    recording = Recording(network, lambda: network(x))
    with pytest.raises(CannotReplayError, match="another output of Linear: it is random, or keeps state"):
        recording.replay("first.weight", lambda: network(x), check=True)
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_another_order_is_noticed() -> None:
    network, (x, _) = build(Moody), batch_for(Moody)
    recording = Recording(network, lambda: network(x))
    with pytest.raises(CannotReplayError, match="called in another order"):
        recording.replay("head.weight", lambda: network(x))
    recording = Recording(network, lambda: network(x))
    with pytest.raises(CannotReplayError, match="called in another order"):
        recording.count(lambda: network(x))


def test_writing_into_a_recorded_output_is_noticed() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    network, x, inplace = nn.Sequential(first, second), torch.randn(2, 8), [False]

    def run() -> Tensor:
        between = first(x)
        return second(between.relu_() if inplace[0] else between.relu())  # type: ignore[no-any-return]

    recording = Recording(network, run)
    inplace[0] = True
    with pytest.raises(CannotReplayError, match="an output was written into"):
        recording.replay("1.weight", run)


def test_a_forward_of_ones_own_is_put_back() -> None:
    network = build(mlp)
    own = network.forward
    network.forward = own
    Recording(network, lambda: network(torch.ones(1, 8)))
    assert network.__dict__["forward"] == own
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Recording(network, lambda: network(torch.ones(1, 9)))
    assert network.__dict__["forward"] == own


def test_scripted_parts_run_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, but there
        scripted = torch.jit.script(nn.Linear(8, 8))
    network, x = nn.Sequential(nn.Linear(8, 8), scripted, nn.Linear(8, 3)), torch.randn(2, 8)
    recording = Recording(network, lambda: network(x))
    assert recording.reused("1.weight") == []  # nobody saw it being used
    assert len(recording.reused("2.weight")) == 1
    halved(network.get_parameter("1.weight"))
    assert torch.equal(recording.replay("1.weight", lambda: network(x)), network(x))


def test_names_are_plain() -> None:
    network = build(mlp)
    assert {plain_name(name) for name, _ in network.named_parameters()} == set(
        Recording(network, lambda: network(torch.ones(1, 8)))._first_use
    )
