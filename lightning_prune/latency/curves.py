"""Piecewise linear functions of one or two shares, many at once, as products of small matrices."""

from __future__ import annotations

import torch
from torch import Tensor

SPARSITY_KNOTS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
"""Close where times change fast; those of usual plans among them, so that they are met exactly."""

LIVING_KNOTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of inputs that are not silent."""


class Curves:
    """Functions `[curves]` of sparsity and, where inputs may be silent, of the living share, per layer.

        f(s, c) = sum_ij a_ij h_i(s) h_j(c),   h_0 = 1,   h_i(s) = max(0, s - knot_(i-1))

    which is the function that is linear (bilinear) between its values at the knots.

    Args:
        values: `[layers, curves, sparsity knots, living knots]`, one living knot for functions of sparsity alone.
    """

    def __init__(self, values: Tensor) -> None:
        self.layers, self.count = values.shape[:2]
        self.two = values.shape[3] > 1
        slopes = _hinges(values.double(), 2, SPARSITY_KNOTS)
        if self.two:
            slopes = _hinges(slopes, 3, LIVING_KNOTS)
        self._slopes = slopes.flatten(2)
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, sparsity: Tensor, living: Tensor | None = None) -> Tensor:
        """`[layers, n]` (and as many living shares) -> `[layers, curves, n]`."""
        slopes, knots, living_knots = self._as(sparsity.dtype)
        basis = _basis(sparsity, knots)
        if self.two:
            share = torch.ones_like(sparsity) if living is None else living
            basis = (basis.unsqueeze(2) * _basis(share, living_knots).unsqueeze(1)).flatten(1, 2)
        return torch.bmm(slopes, basis)

    def _as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype not in self._cast:
            knots = (torch.tensor(knots[:-1], dtype=dtype).view(1, -1, 1) for knots in (SPARSITY_KNOTS, LIVING_KNOTS))
            self._cast[dtype] = (self._slopes.to(dtype), *knots)  # type: ignore[assignment]
        return self._cast[dtype]


def _basis(x: Tensor, knots: Tensor) -> Tensor:
    """`[layers, n]` -> `[layers, knots, n]`: 1, then what lies beyond each knot but the last."""
    basis = x.new_empty(x.shape[0], knots.shape[1] + 1, x.shape[1])
    basis[:, 0] = 1.0
    torch.clamp_min(x.unsqueeze(1) - knots, 0.0, out=basis[:, 1:])
    return basis


def _hinges(values: Tensor, dim: int, knots: tuple[float, ...]) -> Tensor:
    """Values at knots -> the first one, then the change of slope at each knot but the last."""
    steps = torch.tensor(knots, dtype=torch.float64).diff()
    slopes = values.diff(dim=dim).movedim(dim, -1) / steps
    changes = torch.cat([slopes[..., :1], slopes.diff(dim=-1)], dim=-1).movedim(-1, dim)
    return torch.cat([values.narrow(dim, 0, 1), changes], dim=dim)
