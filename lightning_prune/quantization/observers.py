"""What is remembered of activations that come batch by batch; the state lies in buffers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

BINS = 8192


class Observer(nn.Module, ABC):
    """Gathers values; `minimum` and `maximum` are what a range without clipping needs."""

    minimum: Tensor
    maximum: Tensor
    seen: Tensor

    def __init__(self, minimum: float = torch.inf, maximum: float = -torch.inf) -> None:
        super().__init__()
        self.register_buffer("minimum", torch.tensor(minimum, dtype=torch.float32))
        self.register_buffer("maximum", torch.tensor(maximum, dtype=torch.float32))
        self.register_buffer("seen", torch.tensor(0))  # examples

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in a batch.

        Args:
            x: floating point, `[examples, ...]`.

        Raises:
            ValueError: a value is NaN or infinite, also if only in float32.
        """
        if x.numel() == 0:
            return
        values = x.detach().float().reshape(x.shape[0] if x.ndim else 1, -1)
        low, high = torch.aminmax(values)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(f"values from {low:.3g} to {high:.3g} have no finite range")
        self.take(values, low, high)
        self.seen += values.shape[0]

    @abstractmethod
    def take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Remember finite values, float32, `[examples, n]`, of which the least and the greatest are known."""


class Extremes(Observer):
    """The least and the greatest value ever."""

    def take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Widen."""
        self.minimum.copy_(torch.minimum(self.minimum, low))
        self.maximum.copy_(torch.maximum(self.maximum, high))


class Averages(Observer):
    """The least and the greatest value of an example, averaged over all examples or, with momentum, the late ones."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__(0.0, 0.0)
        self.momentum = momentum

    def take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Move the averages."""
        seen, new = int(self.seen), values.shape[0]
        weight = new / (seen + new) if self.momentum is None or seen == 0 else 1.0 - self.momentum
        lows, highs = torch.aminmax(values, dim=1)
        self.minimum += weight * (lows.mean() - self.minimum)
        self.maximum += weight * (highs.mean() - self.maximum)


class Histogram(Extremes):
    """Counts in bins of equal width over `[-limit, limit)`, where `limit` is a power of two, or 0 as long as all is 0.

    A greater value doubles the limit, and pairs of bins become one: no count is ever split. Zero is a border of bins.
    """

    counts: Tensor
    limit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))
        self.register_buffer("limit", torch.tensor(0.0, dtype=torch.float64))

    def take(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Count, after making room."""
        super().take(values, low, high)
        peak = torch.maximum(-low, high).double().item()
        limit = self.limit.item()
        if peak > 0.0:
            needed = math.ldexp(1.0, math.frexp(peak)[1])  # the power of two above
            while 0.0 < limit < needed:
                limit *= 2.0
                quarter = torch.zeros_like(self.counts[: BINS // 4])
                self.counts.copy_(torch.cat([quarter, self.counts.view(-1, 2).sum(1), quarter]))
            limit = max(limit, needed)
            self.limit.fill_(limit)
        per_unit = BINS / 2 / limit if limit else 0.0
        bins = (values.double() * per_unit).floor_().long() + BINS // 2
        self.counts += torch.bincount(bins.flatten(), minlength=BINS)

    def occupied(self) -> tuple[Tensor, Tensor]:
        """Centres, float32, and counts, float64, of the bins that hold something, in ascending order."""
        bins = self.counts.nonzero()[:, 0]
        centres = (bins - BINS // 2 + 0.5).double() * (2 * self.limit / BINS)
        return centres.float(), self.counts[bins].double()
