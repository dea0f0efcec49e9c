"""What a search may do to a layer: the levels, and the patterns of zeros among which it chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from lightning_prune import targets
from lightning_prune.granularities import NM, Block, Filter, Granularity, Unstructured
from lightning_prune.input_statistics import repairable
from lightning_prune.layers import LayerTable
from lightning_prune.plan import PlanEntry, SparsityPlan

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
"""Shares removed among which a search chooses, by default; every layer may also stay dense."""

SCHEMES: dict[str, tuple[Granularity, ...]] = {
    "unstructured": (Unstructured(),),
    "block": (Block(4, 4),),
    "nm": (NM(2, 4),),
    "filter": (Filter(),),
    "mixed": (Unstructured(), Block(4, 4), Filter()),
}
"""Name on the command line -> patterns of zeros that a layer may have."""


def granularities_of(scheme: str | Granularity | Sequence[Granularity]) -> tuple[Granularity, ...]:
    """The patterns of a scheme.

    Args:
        scheme: a name of `SCHEMES`, a granularity, or several of which each layer takes one.

    Raises:
        ValueError: it is none of these.

    >>> granularities_of("block")
    (Block(rows=4, cols=4),)
    """
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise ValueError(f"scheme is one of {sorted(SCHEMES)} or a granularity, got {scheme!r}")
        return SCHEMES[scheme]
    found = (scheme,) if isinstance(scheme, Granularity) else tuple(scheme)
    if not found or not all(isinstance(one, Granularity) for one in found):
        raise ValueError(f"scheme is one of {sorted(SCHEMES)} or granularities, got {scheme!r}")
    return found


def entries_of(
    model: nn.Module,
    table: LayerTable,
    scheme: str | Granularity | Sequence[Granularity],
    levels: Sequence[float] = LEVELS,
    names: str | Sequence[str] | None = None,
) -> dict[str, tuple[PlanEntry, ...]]:
    """The choices of every layer that a search may prune, equally many, the first one dense.

    A level that a layer cannot have in a pattern (an N:M beyond its own, filters of the network's last layer, blocks
    of a depthwise convolution) repeats the dense choice.

    Args:
        model: whose parameters the plan names.
        table: its layers.
        scheme: as for `granularities_of`.
        levels: shares removed, in (0, 1).
        names: weights or patterns; all linear and conv2d weights of the table by default.

    Raises:
        ValueError: a level outside (0, 1), a name that matches nothing or whose weights cannot be repaired, or no
            layer is left to prune.
    """
    patterns = granularities_of(scheme)
    if not levels or not all(0.0 < level < 1.0 for level in levels):
        raise ValueError(f"levels are shares removed, in (0, 1), got {list(levels)!r}")
    suitable, reasons = repairable(model)
    wanted = set(suitable)
    if names is not None:
        given = [names] if isinstance(names, str) else list(names)
        wanted &= set(SparsityPlan(dict.fromkeys(given, 0.0)).match(model))
        for name in set(given) & set(targets.parameters(model)):
            if name not in wanted:
                raise ValueError(f"{name!r} cannot be searched: {reasons[name]}; leave it out of names")
    shapes = {name: weight.shape for name, weight in targets.parameters(model).items()}
    last = table.names[-1] if len(table) else None
    dense = PlanEntry(0.0)
    found = {}
    for spec in table:
        if spec.name not in wanted:
            continue
        row = [dense]
        for pattern in patterns:
            fits = not (isinstance(pattern, Filter) and spec.name == last)
            wished = {pattern.sparsity} if isinstance(pattern, NM) else set(levels)
            row += [_entry(pattern, level, shapes[spec.name]) if fits else dense for level in sorted(wished)]
        if any(entry.sparsity > 0 for entry in row):
            found[spec.name] = tuple(row)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer that can be pruned so; name others or choose another scheme"
        )
    return found


def _entry(pattern: Granularity, level: float, shape: torch.Size) -> PlanEntry:
    dense = PlanEntry(0.0)
    try:
        pattern.require_reachable(level)
        groups = math.prod(pattern.groups(shape))
    except ValueError:
        return dense
    if groups < 2 or round(level * groups) >= groups:  # nothing would be left
        return dense
    return PlanEntry(level, None if isinstance(pattern, Unstructured) else pattern)
