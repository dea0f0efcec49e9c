"""Sparsity plans for users who write their own Optuna objective."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from lightning_prune.granularities import Granularity
from lightning_prune.layers import LayerTable
from lightning_prune.plan import PlanEntry, SparsityPlan
from lightning_prune.search.space import REACH, Floats
from lightning_prune.targets import closest

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

__all__ = ["suggest_plan"]


def suggest_plan(
    trial: BaseTrial,
    table: LayerTable,
    *,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    overall: bool = False,
    low: float = 0.0,
    high: float = 0.95,
    step: float | None = None,
    granularity: Granularity | None = None,
) -> SparsityPlan:
    """Let a trial choose how sparse each layer is.

    By default a sparsity per group, the parameters `sparsity.<group>` in [low, high]. With `overall` one parameter
    `sparsity` in [low, high] for all weights together, and per group a coefficient `weight.<group>`, in
    [exp(-3), exp(3)] and logarithmic, that says how much of it is kept:

        density_l = clip(eps * weight_g(l), 1 - high, 1)    with eps such that
        sum_l density_l * params_l = (1 - sparsity) * sum_l params_l

    `params_l` counts the weights of layer l, and the sums run over the layers in groups. Twice the coefficient keeps
    twice the share, up to the whole layer.

    Args:
        trial: of Optuna; a `FixedTrial` rebuilds the plan from a trial's parameters.
        table: the layers, from `layer_table(model, example_inputs)`.
        groups: name -> layers that share one sparsity or coefficient, by name or pattern; layers in no group stay
            dense. By default each layer is a group of its own, under its own name.
        overall: whether to choose one sparsity and coefficients.
        low: least sparsity.
        high: largest sparsity, also of a single layer.
        step: between the sparsities that may be chosen; None for any.
        granularity: written into the plan; None leaves it to whoever prunes.

    Raises:
        ValueError: the bounds are no sparsities, the table or a group is empty, or a layer is in two groups.

    >>> from optuna.trial import FixedTrial
    >>> from lightning_prune.layers import LayerCall, LayerSpec
    >>> call = LayerCall((1, 4), (1, 8), macs=32)
    >>> table = LayerTable(tuple(LayerSpec(name, "linear", (8, 4), (call,)) for name in ("a.weight", "b.weight")))
    >>> suggest_plan(FixedTrial({"sparsity.a.weight": 0.5, "sparsity.b.weight": 0.9}), table)
    SparsityPlan({'a.weight': 0.5, 'b.weight': 0.9})
    >>> suggest_plan(FixedTrial({"sparsity.all": 0.75}), table, groups={"all": "*"})
    SparsityPlan({'a.weight': 0.75, 'b.weight': 0.75})
    >>> chosen = FixedTrial({"sparsity": 0.7, "weight.a.weight": 2.0, "weight.b.weight": 1.0})
    >>> {name: round(share, 6) for name, share in suggest_plan(chosen, table, overall=True).items()}
    {'a.weight': 0.6, 'b.weight': 0.8}
    """
    for what, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= value <= 1.0:
            raise ValueError(f"suggest_plan: {what} is a sparsity, the fraction removed, in [0, 1], got {value!r}")
    if not low <= high:
        raise ValueError(f"suggest_plan needs low <= high, got low={low}, high={high}; lower low or raise high")
    if step is not None and not 0.0 < step <= 1.0:
        raise ValueError(f"suggest_plan: step is between sparsities, in (0, 1], or None, got {step!r}")
    members = _members(table, groups)
    if overall:
        sparsity = trial.suggest_float("sparsity", low, high, step=step)
        reach = math.exp(REACH)
        coefficients = {name: trial.suggest_float(f"weight.{name}", 1 / reach, reach, log=True) for name in members}
        layers = [(layer, coefficients[name]) for name, group in members.items() for layer in group]
        params = np.array([table[layer].params for layer, _ in layers], dtype=np.float64)
        density = _densities(params, np.array([weight for _, weight in layers]), 1.0 - sparsity, 1.0 - high)
        shares = {layer: 1.0 - float(kept) for (layer, _), kept in zip(layers, density, strict=True)}
    else:
        chosen = {name: trial.suggest_float(f"sparsity.{name}", low, high, step=step) for name in members}
        shares = {layer: float(chosen[name]) for name, group in members.items() for layer in group}
    ordered = {layer: shares[layer] for layer in table.names if layer in shares}
    return SparsityPlan({layer: PlanEntry(min(1.0, max(0.0, x)), granularity) for layer, x in ordered.items()})


def _densities(params: Floats, weights: Floats, density: float, least: float) -> Floats:
    """Shares kept, `clip(eps * weights, least, 1)`, whose average over weights is `density`.

    The average grows with eps, in pieces between the points at which a layer reaches a bound, on which it is linear.
    """

    def kept(eps: float) -> Floats:
        clipped: Floats = np.clip(eps * weights, least, 1.0)
        return clipped

    total = density * params.sum()
    points = np.unique(np.concatenate([least / weights, 1.0 / weights]))
    sums = np.array([(kept(eps) * params).sum() for eps in points])
    return kept(float(np.interp(total, sums, points)))


def _members(table: LayerTable, groups: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[str]]:
    """Group -> its layers."""
    if not len(table):
        raise ValueError("suggest_plan: the layer table has no layers; give layer_table(model, example_inputs)")
    if groups is None:
        return {name: [name] for name in table.names}
    if not groups:
        raise ValueError("suggest_plan: groups is empty, so nothing would be pruned; leave it out for one per layer")
    owner: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for group, patterns in groups.items():
        found[group] = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            layers = [name for name in table.names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
            if not layers:
                raise ValueError(
                    f"suggest_plan: group {group!r} names {pattern!r}, which matches no layer; "
                    f"closest: {closest(pattern, table.names)}"
                )
            found[group] += [name for name in layers if name not in found[group]]
        if not found[group]:
            raise ValueError(f"suggest_plan: group {group!r} has no layers; name some, or leave it out")
        for layer in found[group]:
            if layer in owner:
                raise ValueError(
                    f"suggest_plan: {layer!r} is in the groups {owner[layer]!r} and {group!r}; leave it in one"
                )
            owner[layer] = group
    return found
