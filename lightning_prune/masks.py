"""Masks: which weights are kept, chosen exactly from scores and a plan.

Counts are exact. A pool is a set of parameters that compete for the same budget, in weights:

    T = sum_i s_i * n_i

with `s_i` the sparsity and `n_i` the number of weights of parameter `i`. Where all groups of the pool are of one size
`g`, exactly `round(T / g)` groups are removed. Where sizes differ (filters of several layers), the lowest groups are
removed one after another as long as that brings the number of removed *weights* closer to `T`. Ties go by position:
the first parameter, then the lowest index, is removed first.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_prune.granularities import NM, Granularity, Unstructured
from lightning_prune.selection import lowest, lowest_per_row
from lightning_prune.targets import Layout, closest

Masks: TypeAlias = dict[str, Tensor]
"""Parameter name -> bool tensor shaped like the weight, True where the weight is kept."""

Scope: TypeAlias = Literal["global", "local", "filter"] | Mapping[str, Sequence[str]]
"""Who competes with whom: see `pools`."""


@dataclass(frozen=True)
class Part:
    """One parameter as the masks see it.

    Args:
        shape: of the weight, as stored.
        granularity: which of its weights live and die together.
        layout: how its layer stores it.
    """

    shape: torch.Size
    granularity: Granularity = field(default_factory=Unstructured)
    layout: Layout = field(default_factory=Layout)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape.numel()

    @property
    def seen(self) -> torch.Size:
        """The shape that the granularity sees, outputs first."""
        return self.layout.output_first(torch.empty(self.shape, device="meta")).shape

    @property
    def group_size(self) -> int:
        """Weights per group."""
        return self.numel // max(self.granularity.groups(self.seen).numel(), 1)

    def pooled(self, scores: Tensor) -> Tensor:
        """Scores per weight -> scores per group."""
        return self.granularity.pool(self.layout.output_first(scores))

    def alive(self, mask: Tensor) -> Tensor:
        """Which groups a mask keeps."""
        seen = self.layout.output_first(mask)
        return seen if self.group_size == 1 else self.granularity.pool(seen.float()) > 0

    def mask(self, removed: Tensor) -> Tensor:
        """Removed groups -> kept weights."""
        kept = self.granularity.expand(~removed, self.seen)
        return self.layout.stored(kept).contiguous()


def pools(scope: Scope, matched: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Which parameters compete with one another.

    - `"global"`: those that share an entry of the plan; a plan of one number is one entry for all of them.
    - `"local"`: every parameter for itself.
    - `"filter"`: every filter of every parameter for itself.
    - a map of group names to name patterns: those of one group, whatever entries they have.

    Args:
        scope: one of the above.
        matched: parameter name -> the entry of the plan that holds for it (`SparsityPlan.match`).

    Raises:
        ValueError: if the scope is unknown, or its groups leave a parameter out or name it twice.

    >>> pools("global", {"a.weight": "*", "b.weight": "*", "fc.weight": "fc.weight"})
    [('a.weight', 'b.weight'), ('fc.weight',)]
    """
    if isinstance(scope, Mapping):
        return _named_pools(scope, list(matched))
    if scope not in ("global", "local", "filter"):
        raise ValueError(f"scope is 'global', 'local', 'filter' or a map of group names to patterns, got {scope!r}")
    if scope != "global":
        return [(name,) for name in matched]
    by_entry: dict[str, list[str]] = {}
    for name, entry in matched.items():
        by_entry.setdefault(entry, []).append(name)
    return [tuple(names) for names in by_entry.values()]


def _named_pools(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[tuple[str, ...]]:
    owner: dict[str, str] = {}
    for group, patterns in groups.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(
                    f"scope group {group!r} names {pattern!r}, which matches no pruned parameter; "
                    f"closest: {closest(pattern, names)}"
                )
            for name in matched:
                if owner.setdefault(name, group) != group:
                    raise ValueError(f"{name!r} is in two scope groups, {owner[name]!r} and {group!r}; name it once")
    missing = [name for name in names if name not in owner]
    if missing:
        raise ValueError(f"no scope group holds {missing[0]!r} ({len(missing)} such); add a group for it")
    return [tuple(name for name in names if owner[name] == group) for group in groups]


def check(
    parts: Mapping[str, Part], target: Mapping[str, float], scope: Scope, groups: Iterable[Sequence[str]] = ()
) -> None:
    """Refuse combinations that make no sense, before any work starts.

    Args:
        parts: the parameters to be pruned.
        target: the sparsity each is to reach.
        scope: who competes with whom.
        groups: the pools that follow from it.

    Raises:
        ValueError: naming the parameter, the granularity and what it does not go with.
    """
    for name, part in parts.items():
        where = f"{part.granularity} on {name!r} of shape {list(part.shape)}"
        try:
            part.granularity.groups(part.seen)
            part.granularity.require_reachable(target[name])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if scope == "filter" and not part.granularity.within_filter(part.seen):
            raise ValueError(
                f"{where} does not go with scope='filter': its groups are not parts of one filter; use scope='local' "
                "or 'global', or a granularity within filters such as Unstructured() or Kernel()"
            )
    for pool in groups:
        patterns = {(str(parts[name].granularity), target[name]): name for name in pool}
        if len(patterns) > 1 and any(isinstance(parts[name].granularity, NM) for name in pool):
            (first, one), (second, other) = list(patterns.items())[:2]
            raise ValueError(
                f"{one!r} ({first[0]} at {first[1]:g}) and {other!r} ({second[0]} at {second[1]:g}) share a budget, so "
                "no N:M pattern would come out; use scope='local', or groups of one pattern and sparsity"
            )


def masks(
    scores: Mapping[str, Tensor],
    sparsity: Mapping[str, float],
    *,
    parts: Mapping[str, Part] | None = None,
    groups: Iterable[Sequence[str]] | None = None,
    per_filter: bool = False,
    previous: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Choose which weights are kept: exactly as many as the plan says, those with the highest scores.

    Args:
        scores: parameter name -> one score per weight; the lowest are removed.
        sparsity: parameter name -> fraction removed, of the original count.
        parts: granularity and layout of each; unstructured where absent.
        groups: which parameters compete (`pools`); each for itself where absent.
        per_filter: every filter competes only within itself and loses `round(s * size)` of its groups.
        previous: masks to grow from: what they removed stays removed. None allows regrowth.

    Raises:
        ValueError: if a score is NaN (the network has diverged), naming the parameter.

    >>> kept = masks({"w": torch.tensor([0.3, 0.1, 0.1, 0.2])}, {"w": 0.5})
    >>> kept["w"].tolist()
    [True, False, False, True]
    """
    parts = parts or {name: Part(score.shape) for name, score in scores.items()}
    kept: Masks = {}
    for names in groups if groups is not None else [(name,) for name in scores]:
        pool = [parts[name] for name in names]
        dead = [None if previous is None else ~parts[name].alive(previous[name]) for name in names]
        pooled = [_pooled(name, parts[name], scores[name], gone) for name, gone in zip(names, dead, strict=True)]
        shares = [sparsity[name] for name in names]
        if per_filter:
            removed = [_lowest_in_rows(*args) for args in zip(pooled, shares, dead, strict=True)]
        else:
            count = _count(pooled, pool, shares)
            removed = lowest(pooled, max(count, sum(int(gone.sum()) for gone in dead if gone is not None)))
        for name, part, gone in zip(names, pool, removed, strict=True):
            kept[name] = part.mask(gone)
    return {name: kept[name] for name in scores if name in kept}


def _pooled(name: str, part: Part, scores: Tensor, dead: Tensor | None) -> Tensor:
    """Scores of groups: -inf where already removed, inf where the granularity protects them."""
    nan = torch.isnan(scores)
    if nan.any():
        raise ValueError(
            f"{int(nan.sum())} of {scores.numel()} scores of {name!r} are NaN: the network has diverged; "
            "lower the learning rate, clip gradients, or resume from an earlier checkpoint"
        )
    pooled = part.pooled(scores)
    if dead is not None:
        pooled = pooled.masked_fill(dead, -math.inf)
    protected = part.granularity.protected(pooled)
    return pooled if protected is None else pooled.masked_fill(protected, math.inf)


def _lowest_in_rows(pooled: Tensor, share: float, dead: Tensor | None) -> Tensor:
    rows = pooled.reshape(pooled.shape[0], -1)
    already = 0 if dead is None else int(dead.reshape(rows.shape).sum(dim=1).max())
    return lowest_per_row(rows, max(round(share * rows.shape[1]), already)).reshape(pooled.shape)


def _count(pooled: Sequence[Tensor], pool: Sequence[Part], shares: Sequence[float]) -> int:
    """How many groups the pool's budget removes."""
    # One shared fraction is multiplied by the total, so that round(s * n) is what a user would compute.
    budget = (
        shares[0] * sum(part.numel for part in pool)
        if len(set(shares)) == 1
        else math.fsum(share * part.numel for share, part in zip(shares, pool, strict=True))
    )
    sizes = [part.group_size for part in pool]
    if len(set(sizes)) == 1:
        return round(budget / sizes[0])
    flat = torch.cat([score.flatten() for score in pooled])
    weights = torch.cat([torch.full((score.numel(),), size) for score, size in zip(pooled, sizes, strict=True)])
    removed = weights.to(flat.device)[flat.argsort(stable=True)].cumsum(0).double()
    removed = torch.cat([removed.new_zeros(1), removed])
    return int((removed - budget).abs().argmin())  # the first minimum: of two equally close counts, the lower
