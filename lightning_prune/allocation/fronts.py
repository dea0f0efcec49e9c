"""What an allocator knows before budget and coefficients: each item's Pareto front and the hull below it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Fronts:
    """The choices worth making, item after item, and the segments of the lower convex hulls.

    A choice is dropped if another of its item is no slower and no worse. That, and which points lie on the hull,
    stays true whatever non-negative coefficient an item's errors are multiplied with.

    Args:
        items: how many.
        item: of each point, `[points]`; points are ordered by item, then by growing time and falling error.
        choice: of each point, its column in the tables given, `[points]`.
        error: `[points]`.
        time: `[points]`.
        start: of each item, its first point, which is its fastest, `[items]`.
        hull: of each segment, the point at its slower, better end, `[segments]`; ordered as the points.
        owner: of each segment, its item, `[segments]`.
        gain: how much error a segment saves, above 0, `[segments]`.
        pace: the time it takes, above 0, `[segments]`.
        slope: gain / pace, falling along the segments of an item, `[segments]`.
    """

    items: int
    item: Ints
    choice: Ints
    error: Floats
    time: Floats
    start: Ints
    hull: Ints
    owner: Ints
    gain: Floats
    pace: Floats
    slope: Floats

    @classmethod
    def of(cls, errors: Floats, times: Floats) -> Fronts:
        """The fronts of tables `[items, choices]`, each row with a choice that is finite in both.

        Raises:
            ValueError: a slope of a hull exceeds float64.
        """
        points: list[tuple[int, int]] = []
        segments: list[tuple[int, int]] = []
        start = []
        for item in range(len(errors)):
            first = len(points)
            start.append(first)
            front = _front(errors[item], times[item])
            points += [(item, choice) for choice in front]
            hull = _hull([(float(times[item, choice]), float(errors[item, choice])) for choice in front])
            segments += [(first + left, first + right) for left, right in pairwise(hull)]
        row, column = np.array(points, dtype=np.int64).T
        error, time = errors[row, column], times[row, column]
        left, right = np.array(segments, dtype=np.int64).reshape(-1, 2).T
        with np.errstate(over="ignore"):  # said in words below
            gain, pace = error[left] - error[right], time[right] - time[left]
            slope = gain / pace
        if not np.isfinite(slope).all():
            item = int(row[right[np.argmin(np.isfinite(slope))]])
            raise ValueError(
                f"errors[{item}] differ by too much, or times[{item}] by too little, for float64: rescale them"
            )
        return cls(len(errors), row, column, error, time, np.array(start), right, row[right], gain, pace, slope)


def _front(error: Floats, time: Floats) -> list[int]:
    """The columns that no other column dominates, the fastest first; of equals the leftmost."""
    usable = np.flatnonzero(np.isfinite(error) & np.isfinite(time))
    order = usable[np.lexsort((error[usable], time[usable]))]
    best = np.minimum.accumulate(error[order])
    return [int(order[0]), *(int(column) for column in order[1:][error[order[1:]] < best[:-1]])]


def _hull(points: list[tuple[float, float]]) -> list[int]:
    """Which points of a front lie on its lower convex hull: a monotone chain, slopes strictly falling."""
    chain: list[int] = []
    for place, point in enumerate(points):
        while len(chain) > 1 and _slope(points[chain[-2]], points[chain[-1]]) <= _slope(points[chain[-1]], point):
            chain.pop()
        chain.append(place)
    return chain


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (left[1] - right[1]) / (right[0] - left[0])
