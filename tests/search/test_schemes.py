"""What a search may do to each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.granularities import NM, Block, Filter, Granularity, Unstructured
from lightning_prune.layers import layer_table
from lightning_prune.plan import PlanEntry
from lightning_prune.search.schemes import LEVELS, SCHEMES, entries_of, granularities_of


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 4),
    )


def entries(scheme: Any, model: nn.Module | None = None, **options: Any) -> dict[str, list[tuple[float, Any]]]:
    model = model or network()
    found = entries_of(model, layer_table(model, torch.zeros(1, 4, 6, 6)), scheme, **options)
    assert len({len(row) for row in found.values()}) == 1
    assert all(row[0] == PlanEntry(0.0) for row in found.values())
    return {name: [(entry.sparsity, entry.granularity) for entry in row[1:]] for name, row in found.items()}


DENSE = (0.0, None)


def test_unstructured_levels_in_rising_order_once_each() -> None:
    found = entries("unstructured", levels=(0.9, 0.5, 0.5))
    assert found == {name: [(0.5, None), (0.9, None)] for name in ("0.weight", "1.weight", "5.weight")}


def test_a_level_that_would_leave_nothing_is_dense() -> None:
    # 32 weights of the linear layer: 0.99 of them are all; two groups of 4 x 4: 0.9 of them are both.
    assert entries("unstructured", levels=(0.5, 0.99))["5.weight"] == [(0.5, None), DENSE]
    assert entries(Block(4, 4), levels=(0.5, 0.9))["5.weight"] == [(0.5, Block(4, 4)), DENSE]


def test_filters_of_the_last_layer_are_its_outputs() -> None:
    found = entries("filter", levels=(0.5,))
    assert found == {"0.weight": [(0.5, Filter())], "1.weight": [(0.5, Filter())]}


def test_blocks_do_not_fit_depthwise_convolutions() -> None:
    found = entries("block", levels=(0.5,))
    assert found == {"0.weight": [(0.5, Block(4, 4))], "5.weight": [(0.5, Block(4, 4))]}


def test_n_of_m_has_one_level() -> None:
    assert entries("nm")["5.weight"] == [(0.5, NM(2, 4))]
    assert entries(NM(1, 4), levels=(0.1,))["0.weight"] == [(0.75, NM(1, 4))]


def test_mixed_offers_every_pattern_and_repeats_dense_where_one_does_not_fit() -> None:
    found = entries("mixed", levels=(0.5,))
    assert found["0.weight"] == [(0.5, None), (0.5, Block(4, 4)), (0.5, Filter())]
    assert found["1.weight"] == [(0.5, None), DENSE, (0.5, Filter())]
    assert found["5.weight"] == [(0.5, None), (0.5, Block(4, 4)), DENSE]


def test_names_and_patterns() -> None:
    assert set(entries("unstructured", names=["5.weight"])) == {"5.weight"}
    assert set(entries("unstructured", names="[01].*")) == {"0.weight", "1.weight"}
    with pytest.raises(ValueError, match=r"'9\.weight', which matches no parameter of Sequential; closest"):
        entries("unstructured", names=["9.weight"])
    with pytest.raises(ValueError, match=r"'4\.weight' cannot be searched: no weight of a Linear or Conv2d layer"):
        entries("unstructured", names=["5.weight", "4.weight"])


def test_schemes_by_name() -> None:
    assert set(SCHEMES) == {"unstructured", "block", "nm", "filter", "mixed"}
    assert granularities_of(Filter()) == (Filter(),)
    assert granularities_of([Filter(), Unstructured()]) == (Filter(), Unstructured())
    with pytest.raises(ValueError, match=r"one of \['block', 'filter', 'mixed', 'nm', 'unstructured'\].*got 'blocks'"):
        granularities_of("blocks")
    for wrong in ([], ["block"], 4):
        with pytest.raises((ValueError, TypeError)):
            granularities_of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [(), (0.0,), (0.5, 1.0), (-0.1,), (float("nan"),)])
def test_levels_outside_their_range(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels are shares removed, in \(0, 1\)"):
        entries("unstructured", levels=levels)


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="Sequential has no layer that can be pruned so; name others or choose"):
        entries("block", nn.Sequential(nn.Flatten(), nn.Linear(144, 3)))


@pytest.mark.parametrize("pattern", [one for scheme in SCHEMES.values() for one in scheme])
def test_every_choice_can_be_pruned_to(pattern: Granularity) -> None:
    from lightning_prune.criteria import Magnitude
    from lightning_prune.search.one_shot import one_shot_masks

    model = network()
    found = entries_of(model, layer_table(model, torch.zeros(1, 4, 6, 6)), pattern, LEVELS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, row in found.items():
        masks = one_shot_masks(model, name, row, Magnitude())
        for entry, mask in zip(row, masks, strict=True):
            groups = mask.numel() if entry.granularity is None else round(entry.sparsity * mask.numel())
            assert mask.any()
            if entry.granularity is None:
                assert int((~mask).sum()) == round(entry.sparsity * groups)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
