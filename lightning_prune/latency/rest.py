"""The part of a pass that is not spent in layers, as a line over the time that is."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_LEAST_S = 1e-6
"""Passes that are shorter say nothing."""

_LEVEL = 1e-3
"""What a share counts beside the mean relative error, so that one pass alone gives a constant rest."""


@lru_cache(maxsize=256)
def rest_of(passes: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """How long a pass takes beside its layers: `whole = a + (1 + b) layers`, with a and b at least 0.

        minimise over a, b   mean_i |a + (1 + b) t[i] - w[i]| / w[i] + 0.001 b

    Absolute errors, and not their squares: a pass that something disturbed says little.

    Args:
        passes: t, seconds that the layers of a pass add up to, and w, seconds of the whole pass.

    Returns:
        a, seconds, and b.

    >>> a, b = rest_of(((1.0, 1.3), (2.0, 2.4), (4.0, 4.6), (3.0, 9.0)))
    >>> round(a, 6), round(b, 6)
    (0.2, 0.1)
    >>> rest_of(((1.0, 1.25),))
    (0.25, 0.0)
    """
    from scipy.optimize import linprog  # takes a while, and only those who estimate need it

    known = np.array([pair for pair in passes if pair[1] > _LEAST_S]).reshape(-1, 2)
    if not len(known):
        return 0.0, 0.0
    layers, whole = known.T
    count = len(known)
    # Unknown are a, b, and by how much each pass is missed at most.
    sides = np.stack([1.0 / whole, layers / whole], axis=1)
    missed = np.block([[sides, -np.eye(count)], [-sides, -np.eye(count)]])
    room = np.concatenate([(whole - layers) / whole, (layers - whole) / whole])
    found = linprog([0.0, _LEVEL, *([1.0 / count] * count)], A_ub=missed, b_ub=room, bounds=(0.0, None))
    return float(found.x[0]), float(found.x[1])
