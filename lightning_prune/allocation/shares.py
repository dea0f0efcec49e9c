"""Sparsities from rules of thumb: uniform, Erdos-Renyi-Kernel, sensitivity thresholds, LAMP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_prune.granularities import Granularity
from lightning_prune.layers import LayerTable
from lightning_prune.masks import masks
from lightning_prune.plan import PlanEntry, SparsityPlan

__all__ = ["erk", "global_shares", "lamp", "sensitivity_threshold", "uniform"]


def uniform(table: LayerTable, sparsity: float, granularity: Granularity | None = None) -> SparsityPlan:
    """The same sparsity for every layer.

    Args:
        table: the layers; `LayerTable(table[1:])` leaves the first dense.
        sparsity: the fraction removed, in [0, 1].
        granularity: written into the plan; None leaves it open.

    Raises:
        ValueError: the sparsity is outside [0, 1], or the table is empty.

    >>> from lightning_prune.layers import LayerCall, LayerSpec
    >>> call = LayerCall((1, 4), (1, 8), macs=32)
    >>> uniform(LayerTable((LayerSpec("fc.weight", "linear", (8, 4), (call,)),)), 0.5)
    SparsityPlan({'fc.weight': 0.5})
    """
    share = _share("uniform", sparsity)
    _require_layers("uniform", table)
    return _plan({layer.name: share for layer in table}, granularity)


def erk(table: LayerTable, sparsity: float, granularity: Granularity | None = None) -> SparsityPlan:
    """Erdos-Renyi-Kernel: layers with many weights per channel are the sparser, and the whole has the sparsity asked.

    density_l = min(1, eps * sum(shape_l) / prod(shape_l))    with eps such that
    sum_l density_l * params_l = (1 - sparsity) * sum_l params_l

    `shape_l` is that of the weight as stored. Layers whose density would exceed 1 stay dense, and eps is found again
    for the others, until none does.

    Args:
        table: the layers.
        sparsity: the fraction removed of all their weights together, in [0, 1].
        granularity: written into the plan; None leaves it open.

    Raises:
        ValueError: the sparsity is outside [0, 1], or the table is empty.

    Source: Mocanu et al. (2018), for linear layers; Evci et al., "Rigging the Lottery" (2020), for kernels.

    >>> from lightning_prune.layers import LayerCall, LayerSpec
    >>> call = LayerCall((1, 4), (1, 8), macs=32)
    >>> shapes = {"a": (8, 8), "b": (16, 16), "c": (2, 2)}
    >>> table = LayerTable(tuple(LayerSpec(name, "linear", shape, (call,)) for name, shape in shapes.items()))
    >>> {name: round(share, 3) for name, share in erk(table, 0.5).items()}
    {'a': 0.177, 'b': 0.589, 'c': 0.0}
    """
    share = _share("erk", sparsity)
    _require_layers("erk", table)
    params = np.array([layer.params for layer in table], dtype=np.float64)
    raw = np.array([float(sum(layer.weight_shape)) for layer in table]) / params
    raw[[not layer.weight_shape for layer in table]] = 1.0  # a scalar has no shape to sum
    kept = (1.0 - share) * params.sum()
    dense = np.zeros(len(params), dtype=np.bool_)
    while True:
        density = np.ones(len(params))
        if not dense.all():
            density[~dense] = raw[~dense] * ((kept - params[dense].sum()) / (raw * params)[~dense].sum())
        # Making a layer dense takes from it, so the others' densities only grow: none that was dense is so in vain.
        exceeding = density > 1.0
        if not exceeding.any():
            sparsities = np.clip(1.0 - density, 0.0, 1.0)
            return _plan(dict(zip(table.names, sparsities.tolist(), strict=True)), granularity)
        dense |= exceeding


def sensitivity_threshold(
    names: Sequence[str],
    levels: npt.ArrayLike,
    drops: npt.ArrayLike,
    max_drop: float,
    granularity: Granularity | None = None,
) -> SparsityPlan:
    """Each layer as sparse as its own measured drop allows: its sparsest level that costs at most `max_drop`.

    sparsity_l = max {levels[l, k] : drops[l, k] <= max_drop}, and 0 where no level is allowed

    Drops are measured with one layer pruned at a time, so that all of them together cost more.

    Args:
        names: of the layers.
        levels: sparsities, `[levels]` for all layers alike or `[layers, levels]`, in any order.
        drops: of accuracy, `[layers, levels]`, higher is worse; +inf forbids a level, below 0 is a gain.
        max_drop: what a layer may cost, at least 0.
        granularity: written into the plan; None leaves it open.

    Raises:
        ValueError: shapes do not fit, a level is outside [0, 1], a drop is NaN, or `max_drop` is negative.

    Source: Han et al., "Learning both Weights and Connections" (2015), section 3.1.

    >>> sensitivity_threshold(["a", "b"], [0.5, 0.8, 0.9], [[0.0, 0.1, 0.4], [0.2, 0.3, 0.5]], max_drop=0.1)
    SparsityPlan({'a': 0.8, 'b': 0.0})
    """
    cost = np.asarray(drops, dtype=np.float64)
    if cost.ndim != 2 or len(cost) != len(names) or cost.size == 0:
        raise ValueError(f"drops have a row for each of {len(names)} layers and a column per level, got {cost.shape}")
    grid = np.asarray(levels, dtype=np.float64)
    if grid.shape not in (cost.shape, cost.shape[1:]):
        raise ValueError(f"levels are {list(cost.shape[1:])} or {list(cost.shape)}, as drops are; got {grid.shape}")
    if len(set(names)) < len(names):
        raise ValueError(f"a layer is named once, got {list(names)}")
    grid = np.broadcast_to(grid, cost.shape)
    for label, table, bad in (
        ("level", grid, ~((grid >= 0.0) & (grid <= 1.0))),
        ("drop", cost, np.isnan(cost) | (cost == -np.inf)),
    ):
        if bad.any():
            layer, level = np.argwhere(bad)[0]
            need = "a sparsity, in [0, 1]" if label == "level" else "a number, or +inf where the level is forbidden"
            raise ValueError(f"{label} {level} of {names[layer]!r} is {table[layer, level]!s}; it is {need}")
    if not (max_drop >= 0 and math.isfinite(max_drop)):
        raise ValueError(f"sensitivity_threshold needs a finite max_drop >= 0, got {max_drop!r}")
    best = np.where(cost <= max_drop, grid, 0.0).max(axis=1)
    return _plan(dict(zip(names, best.tolist(), strict=True)), granularity)


def global_shares(scores: Mapping[str, Tensor], sparsity: float) -> SparsityPlan:
    """What each layer would lose if all weights competed: the lowest scores of all go, `round(sparsity * n)` of them.

    Args:
        scores: parameter name -> one score per weight.
        sparsity: the fraction removed of all weights together, in [0, 1].

    Raises:
        ValueError: the sparsity is outside [0, 1], there are no scores, or one is NaN.

    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([0.1, 0.2])}
    >>> global_shares(scores, 0.5)
    SparsityPlan({'a': 0.25, 'b': 1.0})
    """
    share = _share("global_shares", sparsity)
    if not scores or any(score.numel() == 0 for score in scores.values()):
        raise ValueError(f"global_shares needs scores of at least one weight for every name, got {list(scores)}")
    kept = masks(scores, dict.fromkeys(scores, share), groups=[tuple(scores)])
    return SparsityPlan({name: 1 - int(mask.sum()) / mask.numel() for name, mask in kept.items()})


def lamp(weights: Mapping[str, Tensor], sparsity: float) -> SparsityPlan:
    """What each layer loses if weights compete by layer-adaptive magnitude.

    score(w_u) = w_u^2 / sum of w_v^2 over the weights v of the layer with |w_v| >= |w_u|

    The largest weight of a layer scores 1, so no layer is emptied before all others are down to one weight.

    Args:
        weights: parameter name -> weight.
        sparsity: the fraction removed of all weights together, in [0, 1].

    Raises:
        ValueError: as `global_shares`.

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (2021).

    >>> lamp({"a": torch.tensor([1.0, 1.0, 1.0, 1.0]), "b": torch.tensor([0.1, 0.001])}, 0.5)
    SparsityPlan({'a': 0.5, 'b': 0.5})
    """
    return global_shares({name: _lamp_scores(weight) for name, weight in weights.items()}, sparsity)


def _lamp_scores(weight: Tensor) -> Tensor:
    square = weight.detach().double().square().flatten()
    ascending, order = square.sort(stable=True)
    at_least = ascending.flip(0).cumsum(0).flip(0)
    # An all-zero tail has no share of anything; NaN weights stay NaN, for `masks` to refuse.
    score = torch.where(at_least == 0, torch.zeros_like(ascending), ascending / at_least)
    return torch.empty_like(score).scatter_(0, order, score).reshape(weight.shape)


def _plan(sparsity: Mapping[str, float], granularity: Granularity | None) -> SparsityPlan:
    return SparsityPlan({name: PlanEntry(share, granularity) for name, share in sparsity.items()})


def _share(who: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{who} needs the fraction removed, in [0, 1], got {value!r}")
    return float(value)


def _require_layers(who: str, table: LayerTable) -> None:
    if len(table) == 0:
        raise ValueError(f"{who} needs layers to spread the sparsity over, got an empty table")
