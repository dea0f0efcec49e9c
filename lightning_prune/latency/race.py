"""Finds the fastest of several networks on a machine that becomes slower and faster meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_prune.latency.timing import repeated

_TURNS, _IN_A_ROW = 9, 3
"""All run in turn: so often, so many times each."""

_TIED, _MORE = 1.04, 3
"""Where the first two are this close, all run again, at most so often."""


@dataclass(frozen=True)
class Race:
    """What came out.

    Args:
        winner: name of the fastest.
        best_s: least seconds by name.
    """

    winner: str
    best_s: Mapping[str, float]


def race(runs: Mapping[str, Callable[[], object]], handicaps: Mapping[str, float]) -> Race:
    """Run alternatives in turn; the fastest is the one with the least median ratio to the first of them.

    A slow spell meets all alternatives of a turn, so that ratios within a turn hold where least times do not.

    Args:
        runs: by name.
        handicaps: by name, factors on the ratios; 1 where none is given.

    Raises:
        ValueError: there is nothing to run.

    >>> import time
    >>> race({"slow": lambda: time.sleep(0.002), "fast": lambda: None}, {}).winner
    'fast'
    """
    if not runs:
        raise ValueError("a race needs something to run, got no alternatives")
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = times[next(iter(runs))]
    ranks: list[tuple[float, str]] = []
    for _ in range(1 + _MORE):
        for _ in range(_TURNS):
            for name, run in runs.items():
                times[name].append(repeated(run, _IN_A_ROW).best_s)
        ranks = sorted(
            (handicaps.get(name, 1.0) * statistics.median(a / b for a, b in zip(own, first, strict=True)), name)
            for name, own in times.items()
        )
        if len(ranks) < 2 or ranks[1][0] > _TIED * ranks[0][0]:
            break
    return Race(ranks[0][1], {name: min(own) for name, own in times.items()})
