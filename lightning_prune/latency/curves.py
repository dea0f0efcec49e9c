"""Piecewise linear functions of one or two shares, many at once, as products of small matrices."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

SPARSITY_KNOTS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
"""Close where times change fast; those of usual plans among them, so that they are met exactly."""

LIVING_KNOTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of inputs that are not silent."""


class Curves:
    """Functions `[curves]` of sparsity and, where inputs may be silent, of the living share, per layer.

        f(s, c) = sum_ij a_ij r_i(1 - s) q_j(c),   r_0 = 1,
        r_i(k) = min(1, max(0, (k - knot_(i-1)) / (knot_i - knot_(i-1)))),   q alike

    which is the function that is linear (bilinear) between its values at the knots; `a` are differences of those. What
    is kept adds to them, so that small times of sparse layers are not what is left of large ones, for which float32
    has no digits.

    Args:
        values: `[layers, curves, sparsity knots, living knots]`, one living knot for functions of sparsity alone.
        knots: `[layers, sparsity knots]`, ascending from 0 to 1; `SPARSITY_KNOTS` unless given.
    """

    def __init__(self, values: Tensor, knots: Tensor | None = None) -> None:
        self.layers, self.count = values.shape[:2]
        self.two = values.shape[3] > 1
        if knots is None:
            knots = torch.tensor(SPARSITY_KNOTS, dtype=torch.float64).expand(self.layers, -1)
        self._kept = 1.0 - knots.flip(1)
        steps = _steps(_steps(values.double().flip(2), 2), 3)
        self._values = steps.flatten(2)
        self._cast: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def __call__(self, sparsity: Tensor, living: Tensor | None = None) -> Tensor:
        """`[layers, n]` (and as many living shares) -> `[layers, curves, n]`."""
        values, kept, width, living_knots, living_width = self._as(sparsity.dtype)
        basis = _ramps(1.0 - sparsity, kept, width)
        if self.two:
            share = torch.ones_like(sparsity) if living is None else living
            basis = (basis.unsqueeze(2) * _ramps(share, living_knots, living_width).unsqueeze(1)).flatten(1, 2)
        return torch.bmm(values, basis)

    def _as(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype not in self._cast:
            living = torch.tensor(LIVING_KNOTS, dtype=torch.float64)[None]
            parts = [self._values]
            for knots in (self._kept, living):
                parts += [knots[:, :-1, None], knots.diff(dim=1).reciprocal()[:, :, None]]
            self._cast[dtype] = tuple(part.to(dtype) for part in parts)
        return self._cast[dtype]


def _ramps(x: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    """`[layers, n]` -> `[layers, knots, n]`: 1, then a ramp from 0 to 1 behind each knot but the last."""
    basis = x.new_empty(x.shape[0], knots.shape[1] + 1, x.shape[1])
    basis[:, 0] = 1.0
    ramps = basis[:, 1:]
    torch.sub(x.unsqueeze(1), knots, out=ramps).mul_(slopes).clamp_(0.0, 1.0)
    return basis


def _steps(values: Tensor, dim: int) -> Tensor:
    """Values at knots -> the first one, then how much each differs from the one before."""
    return torch.cat([values.narrow(dim, 0, 1), values.diff(dim=dim)], dim=dim)


def filter_knots(outputs: int, width: int = 16) -> Tensor:
    """Knots where whole filters go: convolutions work on vectors of them, so that times are stairs.

    Each stair has a knot at its last filter and at the first of the next, of the most even stairs if there are many.

    >>> kept = (64 * (1 - filter_knots(64))).round().tolist()
    >>> [count for count in (64, 49, 48, 33, 32, 17, 16, 0) if count in kept]
    [64, 49, 48, 33, 32, 17, 16, 0]
    """
    count = len(SPARSITY_KNOTS)
    stairs = list(range(outputs - (outputs % width or width), 0, -width))
    step = -(-len(stairs) * 2 // (count - 3)) if stairs else 1
    edges = [float(kept) for stair in stairs[::step] for kept in (stair + 1, stair)]
    found = sorted({0.0, 1.0, *((outputs - kept) / outputs for kept in edges)})
    while len(found) < count:  # fill the widest gaps
        gaps = [right - left for left, right in itertools.pairwise(found)]
        widest = gaps.index(max(gaps))
        found.insert(widest + 1, (found[widest] + found[widest + 1]) / 2)
    return torch.tensor([*found[: count - 1], 1.0], dtype=torch.float64)
