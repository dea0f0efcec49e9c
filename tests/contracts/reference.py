"""An independent, slow and obvious way to choose masks, in NumPy, for networks small enough to enumerate groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lightning_prune import NM, Block, Channel, Filter, Kernel, Unstructured, Vector
from lightning_prune.granularities import Granularity

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Group = list[tuple[str, tuple[int, ...]]]


def group_of(granularity: Granularity, index: tuple[int, ...]) -> tuple[int, ...]:
    """The group that the weight at `index` of `[out, in, *kernel]` belongs to."""
    if isinstance(granularity, Vector):
        return tuple(i for dim, i in enumerate(index) if dim != granularity.dim)
    if isinstance(granularity, Kernel):
        return index[:2]
    if isinstance(granularity, Filter):
        return index[:1]
    if isinstance(granularity, Channel):
        return (index[1],)
    if isinstance(granularity, Block):
        return (index[0] // granularity.rows, index[1] // granularity.cols, *index[2:])
    if isinstance(granularity, Unstructured | NM):
        return index
    raise TypeError(f"the reference does not know {granularity}")


def removable(granularity: Granularity, scores: Array) -> Mask:
    """Which weights a pattern allows to be removed."""
    allowed = np.ones(scores.shape, dtype=bool)
    if isinstance(granularity, NM):
        for index in np.ndindex(scores.shape):
            first = index[1] // granularity.m * granularity.m
            mates = [(index[0], i, *index[2:]) for i in range(first, first + granularity.m)]
            order = sorted(mates, key=lambda mate: (scores[mate], mate[1]))
            allowed[index] = index in order[: granularity.m - granularity.n]
    return allowed


def choose(
    scores: Mapping[str, Array],
    sparsity: Mapping[str, float],
    granularity: Granularity,
    groups: Sequence[Sequence[str]],
    per_filter: bool,
) -> dict[str, Mask]:
    """Masks by definition: enumerate groups, sort them, remove the lowest."""
    kept = {name: np.ones(score.shape, dtype=bool) for name, score in scores.items()}
    for names in groups:
        contests: dict[tuple[object, ...], list[Group]] = {}
        for name in names:
            allowed = removable(granularity, scores[name])
            members: dict[tuple[int, ...], Group] = {}
            for index in np.ndindex(scores[name].shape):
                if allowed[index]:
                    members.setdefault(group_of(granularity, index), []).append((name, index))
            for where in sorted(members):
                contests.setdefault((name, where[0]) if per_filter else (), []).append(members[where])
        for contest, found in contests.items():
            ordered = sorted(found, key=lambda group: float(np.mean([scores[n][i] for n, i in group])))
            total = sum(scores[n].size * sparsity[n] for n in names)
            if contest:
                size = scores[names[0]][0].size
                total = round(sparsity[names[0]] * size / len(found[0])) * len(found[0])
            for group in ordered[: _how_many([len(group) for group in ordered], total)]:
                for name, index in group:
                    kept[name][index] = False
    return kept


def _how_many(sizes: Sequence[int], total: float) -> int:
    if len(set(sizes)) == 1:
        return round(total / sizes[0])
    return min(range(len(sizes) + 1), key=lambda count: abs(sum(sizes[:count]) - total))
