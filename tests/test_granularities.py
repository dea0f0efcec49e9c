"""Granularities: what they refuse, and with which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_prune import NM, Block, Channel, Filter, Kernel, Unstructured, Vector
from lightning_prune.granularities import Granularity
from lightning_prune.masks import Part, check, masks
from lightning_prune.targets import Layout
from tests.contracts.tables import GRANULARITIES


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Vector(-1), "Vector needs a dimension >= 0, counted from the front, got dim=-1"),
        (lambda: Vector(1.0), "got dim=1.0"),  # type: ignore[arg-type]
        (lambda: Vector(math.nan), "got dim=nan"),  # type: ignore[arg-type]
        (lambda: Vector(True), "got dim=True"),
        (lambda: Block(0, 4), "Block needs whole rows and cols >= 1, got rows=0, cols=4"),
        (lambda: Block(4, -1), "got rows=4, cols=-1"),
        (lambda: Block(1.5, 2), "got rows=1.5, cols=2"),  # type: ignore[arg-type]
        (lambda: Block(2, "2"), "got rows=2, cols='2'"),  # type: ignore[arg-type]
        (lambda: NM(0, 4), "NM needs whole numbers 1 <= n < m, got n=0, m=4"),
        (lambda: NM(4, 4), "got n=4, m=4"),
        (lambda: NM(4, 2), "got n=4, m=2"),
        (lambda: NM(2, 4.0), "got n=2, m=4.0"),  # type: ignore[arg-type]
        (lambda: NM(True, 4), "got n=True, m=4"),
    ],
)
def test_sizes_that_are_none(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_smallest_sizes() -> None:
    assert Block(1, 1).groups(torch.Size([3, 5])) == (3, 5)
    assert NM(1, 2).sparsity == 0.5
    assert Vector(0).groups(torch.Size([3])) == ()


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (Vector(2), (4, 3), "it has 2 dimensions, so there is no dimension 2"),
        (Kernel(), (4, 3), "only weights of convolutions have kernels; use Unstructured"),
        (Filter(), (), r"a single number has no filters; use Unstructured\(\)"),
        (Channel(), (4,), r"fewer than two dimensions has no input side; use Filter\(\)"),
        (Channel(), (4, 1, 3, 3), r"it has a single input channel, all or nothing; use Filter\(\)"),
        (Block(2, 2), (4,), "blocks of 2 outputs by 2 inputs do not divide it; leave it out of the plan or"),
        (Block(3, 1), (4, 3), "blocks of 3 outputs by 1 inputs do not divide it"),
        (Block(1, 2), (4, 3), "blocks of 1 outputs by 2 inputs do not divide it"),
        (NM(2, 4), (4,), "groups of 4 do not divide its 0 inputs"),
        (NM(2, 4), (4, 6), "groups of 4 do not divide its 6 inputs; leave it out of the plan or choose an m"),
    ],
    ids=str,
)
def test_weights_that_have_no_such_groups(granularity: Granularity, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        granularity.groups(torch.Size(shape))
    part = Part(torch.Size(shape), granularity)
    target = granularity.sparsity if isinstance(granularity, NM) else 0.5
    with pytest.raises(ValueError, match=f"on 'w' of shape .*: .*{message}"):
        check({"w": part}, {"w": target}, "local")


@pytest.mark.parametrize(
    ("granularity", "shape", "within"),
    [
        (Unstructured(), (4, 3), True),
        (Unstructured(), (4, 1), False),
        (Unstructured(), (4,), False),
        (Unstructured(), (), False),
        (Kernel(), (4, 3, 2, 2), True),
        (Kernel(), (4, 1, 3, 3), False),
        (Vector(1), (4, 3, 2), True),
        (Vector(0), (4, 3, 2), False),
        (Vector(0), (4, 4, 2), False),
        (Filter(), (4, 3, 2, 2), False),
        (Channel(), (4, 4, 2, 2), False),
        (Block(1, 2), (4, 4), True),
        (Block(2, 2), (4, 4), False),
        (NM(2, 4), (4, 8), True),
    ],
    ids=str,
)
def test_groups_within_filters(granularity: Granularity, shape: tuple[int, ...], within: bool) -> None:
    assert granularity.within_filter(torch.Size(shape)) == within


@pytest.mark.parametrize("sparsity", [0.25, 0.49, 0.51, 0.75, 1.0])
def test_nm_has_two_targets_only(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"NM\(n=2, m=4\) removes exactly 0\.5 of a weight, not {sparsity:g}; ask"):
        NM(2, 4).require_reachable(sparsity)


def test_nm_targets_may_carry_rounding_errors() -> None:
    NM(2, 3).require_reachable(1 / 3)
    NM(2, 3).require_reachable(0.3333333)
    NM(2, 4).require_reachable(0.0)
    NM(2, 4).require_reachable(0.5)


def test_pooled_scores_are_means() -> None:
    scores = torch.arange(32.0).reshape(2, 4, 2, 2)
    assert Filter().pool(scores).tolist() == [7.5, 23.5]
    assert Channel().pool(scores).tolist() == [9.5, 13.5, 17.5, 21.5]
    assert Kernel().pool(scores)[1, 2].item() == scores[1, 2].mean().item()
    assert Vector(3).pool(scores)[0, 1, 1].item() == 6.5
    assert Block(2, 2).pool(scores)[0, 1, 1, 0].item() == scores[:, 2:, 1, 0].mean().item()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("layout", [Layout(), Layout(transposed=True)], ids=repr)
def test_masks_are_whole_tensors_of_their_own(granularity: Granularity, layout: Layout) -> None:
    """A mask that is an expanded view can neither be sent to other ranks nor be written to."""
    kept = masks(
        {"w": torch.randn(8, 8, 2, 2)}, {"w": 0.5}, parts={"w": Part(torch.Size([8, 8, 2, 2]), granularity, layout)}
    )
    assert kept["w"].is_contiguous()
    assert kept["w"].untyped_storage().nbytes() == 8 * 8 * 2 * 2


def test_masks_come_in_the_order_of_the_scores_whoever_competes() -> None:
    scores = {name: torch.randn(4) for name in "abc"}
    assert list(masks(scores, dict.fromkeys(scores, 0.5), groups=[("c",), ("b", "a")])) == ["a", "b", "c"]


def test_a_shared_fraction_is_taken_of_the_total() -> None:
    # round(0.1 * 25) is 2, but 0.1 * 1 + 0.1 * 24 is a little more than 2.5.
    scores = {"a": torch.randn(1), "b": torch.randn(24)}
    kept = masks(scores, {"a": 0.1, "b": 0.1}, groups=[("a", "b")])
    assert sum(int((~mask).sum()) for mask in kept.values()) == 2


def test_a_vector_is_its_own_filters() -> None:
    kept = masks({"b": torch.tensor([3.0, 1.0, 2.0])}, {"b": 1 / 3}, parts={"b": Part(torch.Size([3]), Filter())})
    assert kept["b"].tolist() == [True, False, True]
