"""What every valid combination of schedule, criterion, granularity and scope promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import NM, Filter, Pruner, SparsityPlan, criteria, granularities
from lightning_prune.criteria import Criterion, Evidence
from lightning_prune.granularities import Granularity
from lightning_prune.masks import Part, Scope, masks, pools
from lightning_prune.schedules import Schedule
from tests.contracts import reference
from tests.contracts.tables import CRITERIA, GRANULARITIES, SCHEDULES, SCOPES, defined

pytestmark = pytest.mark.filterwarnings("ignore:all weights of")  # tiny networks at 70 % may lose a layer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(8, 10, 2, bias=False))


def target(granularity: Granularity) -> float:
    return granularity.sparsity if isinstance(granularity, NM) else 0.7


def valid(granularity: Granularity, scope: Scope) -> bool:
    return scope != "filter" or all(granularity.within_filter(p.shape) for p in network().parameters() if p.ndim == 4)


COMBINATIONS = [
    (granularity, scope) for granularity, scope in itertools.product(GRANULARITIES, SCOPES) if valid(granularity, scope)
]


def build(granularity: Granularity, scope: Scope, criterion: Criterion, model: nn.Module) -> Pruner:
    plan = SparsityPlan({"*": target(granularity)})
    return Pruner(model, plan, criterion=criterion, granularity=granularity, scope=scope)


def train_a_little(model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    pruner.observe(optimizer)
    optimizer.step()


def removed(pruner: Pruner) -> int:
    return sum(int((~mask).sum()) for mask in pruner.masks.values())


def test_tables_are_complete() -> None:
    assert {type(c) for c in CRITERIA} == defined(criteria, Criterion)
    assert {type(g) for g in GRANULARITIES} == defined(granularities, Granularity)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize(("granularity", "scope"), COMBINATIONS, ids=str)
def test_whole_way(schedule: Schedule, criterion: Criterion, granularity: Granularity, scope: Scope) -> None:
    model = network()
    pruner = build(granularity, scope, criterion, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    pruner.attach(optimizers=[optimizer])
    pruner.begin()
    before: dict[str, torch.Tensor] = {}
    for step, progress in enumerate((0.1, 0.4, 0.8, 1.0)):
        train_a_little(model, pruner, optimizer, step)
        pruner.update(schedule(progress))
        pruner.enforce([optimizer])
        for name, mask in pruner.masks.items():
            weight = model.get_parameter(name)
            assert mask.shape == weight.shape
            assert torch.equal(weight == 0, ~mask)  # removed weights are 0, kept ones are not
            if before:
                assert not (mask & ~before[name]).any()  # monotone
            alive = Part(weight.shape, granularity).alive(mask)
            assert torch.equal(Part(weight.shape, granularity).mask(~alive), mask)  # groups live and die together
        before = pruner.masks
    train_a_little(model, pruner, optimizer, 99)
    weights = sum(parameter.numel() for parameter in pruner.parameters.values())
    sizes = [Part(p.shape, granularity).group_size for p in pruner.parameters.values()]
    assert abs(removed(pruner) - target(granularity) * weights) <= (
        sum(p.shape[0] * size for p, size in zip(pruner.parameters.values(), sizes, strict=True))
        if scope == "filter"
        else sum(sizes)
    )
    for name, mask in pruner.masks.items():
        assert not model.get_parameter(name)[~mask].any()  # still 0 after a step
        assert not optimizer.state[model.get_parameter(name)]["momentum_buffer"][~mask].any()
        if isinstance(granularity, NM):
            per_group = mask.movedim(1, -1).reshape(-1, granularity.m).sum(dim=1)
            assert (per_group == granularity.n).all()


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_resumes_bit_for_bit(criterion: Criterion, granularity: Granularity) -> None:
    def continued(interrupt: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        pruner = build(granularity, "global", criterion, model)
        pruner.begin()
        for step, level in enumerate((0.2, 0.5, 0.9, 1.0)):
            if interrupt and step == 2:
                state = pruner.state_dict()
                fresh, moments = network(seed=1), optimizer.state_dict()
                fresh.load_state_dict(model.state_dict())
                optimizer = torch.optim.Adam(fresh.parameters())
                optimizer.load_state_dict(moments)
                pruner.detach()
                model, pruner = fresh, build(granularity, "global", criterion, fresh)
                pruner.load_state_dict(state)
            pruner.attach([optimizer])
            train_a_little(model, pruner, optimizer, step)
            pruner.update(level)
            pruner.enforce([optimizer])
        return dict(model.state_dict()), pruner.masks

    for straight, resumed in zip(continued(False), continued(True), strict=True):
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(("granularity", "scope"), COMBINATIONS, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_masks_equal_the_reference(granularity: Granularity, scope: Scope, data: st.DataObject) -> None:
    shapes = {"0.weight": (4, 4, 2, 2), "1.weight": (2, 8, 1, 2)}
    share = data.draw(st.sampled_from([0.0, target(granularity)])) if isinstance(granularity, NM) else None
    sparsity = dict.fromkeys(shapes, data.draw(st.floats(0, 1)) if share is None else share)
    # Few distinct whole numbers: many ties, and means that are exact whoever computes them.
    drawn = {
        name: np.array(data.draw(st.lists(st.integers(-3, 3), min_size=math.prod(s), max_size=math.prod(s))))
        .reshape(s)
        .astype(float)
        for name, s in shapes.items()
    }
    contests = pools(scope, dict.fromkeys(shapes, "*"))
    expected = reference.choose(drawn, sparsity, granularity, contests, scope == "filter")
    found = masks(
        {name: torch.tensor(score) for name, score in drawn.items()},
        sparsity,
        parts={name: Part(torch.Size(shape), granularity) for name, shape in shapes.items()},
        groups=contests,
        per_filter=scope == "filter",
    )
    for name in shapes:
        assert np.array_equal(found[name].numpy(), expected[name])


@given(n=st.integers(1, 400), share=st.floats(0, 1))
def test_ask_for_k_get_k(n: int, share: float) -> None:
    kept = masks({"w": torch.zeros(n)}, {"w": share})["w"]
    assert int((~kept).sum()) == round(share * n)
    assert not kept[: round(share * n)].any()  # ties: the lowest index goes first


def test_kept_scores_are_not_below_removed_ones() -> None:
    scores = {"a": torch.randn(40), "b": torch.randn(60)}
    kept = masks(scores, {"a": 0.35, "b": 0.35}, groups=[("a", "b")])
    low = torch.cat([scores[n][~kept[n]] for n in scores])
    high = torch.cat([scores[n][kept[n]] for n in scores])
    assert len(low) == 35
    assert low.max() <= high.min()


def test_global_structured_targets_count_weights() -> None:
    # Filters of 2 and of 50 weights, 40 and 4 of them: half of the 280 weights are 140.
    scores = {"thin": torch.ones(40, 2), "thick": torch.full((4, 50), 2.0)}
    parts = {name: Part(score.shape, Filter()) for name, score in scores.items()}
    kept = masks(scores, dict.fromkeys(scores, 0.5), parts=parts, groups=[tuple(scores)])
    assert int((~kept["thin"]).sum()) == 80  # all thin ones score lowest
    assert int((~kept["thick"]).sum()) == 50  # 130 weights are closer to 140 than 180


def test_regrowth_is_on_request_only() -> None:
    first = masks({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"w": 0.5})
    scores = {"w": torch.tensor([9.0, 8.0, 1.0, 2.0])}
    assert masks(scores, {"w": 0.5}, previous=first)["w"].tolist() == [False, False, True, True]
    assert masks(scores, {"w": 0.5})["w"].tolist() == [True, True, False, False]


def test_a_users_criterion_is_a_few_lines() -> None:
    class Largest(Criterion):
        def score(self, evidence: Evidence) -> torch.Tensor:
            return -evidence.weight.abs()

    model = network()
    weight = model.get_parameter("0.weight")
    largest = weight.detach().abs().argmax()
    Pruner(model, SparsityPlan({"0.weight": 0.1}), criterion=Largest()).update(1.0)
    assert weight.flatten()[largest] == 0
