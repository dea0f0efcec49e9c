"""Masks of one layer pruned alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune import targets
from lightning_prune.criteria import Criterion
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.pruner import Pruner


def one_shot_masks(model: nn.Module, name: str, entries: Sequence[PlanEntry], criterion: Criterion) -> list[Tensor]:
    """Which weights of one layer are kept when it alone is pruned, for each entry.

    Args:
        model: it is not changed.
        name: of the weight.
        entries: sparsity and granularity.
        criterion: which weights go first; one that looks at weights alone.
    """
    weight = targets.parameters(model)[name]
    dense = weight.detach().clone()
    found = []
    for entry in entries:
        if entry.sparsity == 0.0:
            found.append(torch.ones_like(dense, dtype=torch.bool))
            continue
        pruner = Pruner(model, SparsityPlan({name: entry}), criterion=criterion, scope="local")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a layer without weights is a level here
                pruner.update(level=1.0)
        finally:
            with torch.no_grad():
                weight.copy_(dense)
        found.append(pruner.masks[name])
    return found
