"""Which range of values a quantiser covers: all, the average of batches, a percentile, or the one of least error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.quantization import observers
from lightning_prune.quantization.schemes import Grid

Bounds = tuple[Tensor, Tensor]


class Range(ABC):
    """Finds the least and the greatest value that a quantiser represents; every range then widens to contain 0."""

    @abstractmethod
    def bounds(self, values: Tensor, grid: Grid) -> Bounds:
        """Ranges of values that are all at hand, such as weights.

        Args:
            values: float32, finite, `[ranges, examples, n]`.
            grid: that they are quantised to.

        Returns:
            Least and greatest value, `[ranges]` each.
        """

    @abstractmethod
    def observer(self) -> observers.Observer:
        """What gathers values that come batch by batch, such as activations."""

    def observed(self, observer: observers.Observer, grid: Grid) -> Bounds:
        """The range of what an observer of this range's has seen, scalars."""
        return observer.minimum, observer.maximum


@dataclass(frozen=True)
class MinMax(Range):
    """All values: nothing is clipped.

    >>> low, high = MinMax().bounds(torch.tensor([[[1.0, -2.0, 3.0]]]), Grid())
    >>> low.item(), high.item()
    (-2.0, 3.0)
    """

    def bounds(self, values: Tensor, grid: Grid) -> Bounds:
        """Least and greatest of all."""
        return values.amin((1, 2)), values.amax((1, 2))

    def observer(self) -> observers.Observer:
        """Remembers the least and the greatest."""
        return observers.Extremes()


@dataclass(frozen=True)
class AveragedMinMax(Range):
    """The least and the greatest value of each example, averaged over examples, which clips outliers.

    With momentum `m`, `bound <- m * bound + (1 - m) * average of the batch`, which follows a network that is trained.

    Args:
        momentum: in [0, 1); None weighs all examples alike.

    Raises:
        ValueError: momentum outside [0, 1).

    >>> low, high = AveragedMinMax().bounds(torch.tensor([[[0.0, 2.0], [-1.0, 4.0]]]), Grid())
    >>> low.item(), high.item()
    (-0.5, 3.0)
    """

    momentum: float | None = None

    def __post_init__(self) -> None:
        """Refuse a momentum that never forgets or never learns."""
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"AveragedMinMax needs a momentum in [0, 1), got momentum={self.momentum!r}")

    def bounds(self, values: Tensor, grid: Grid) -> Bounds:
        """Of weights, each row (the weights of one output) is an example."""
        return values.amin(2).mean(1), values.amax(2).mean(1)

    def observer(self) -> observers.Observer:
        """Keeps the averages."""
        return observers.Averages(self.momentum)


class _OfDistribution(Range):
    """Looks at how values are distributed: at all of them, or at a histogram."""

    @abstractmethod
    def weighed(self, values: Tensor, counts: Tensor, grid: Grid) -> Bounds:
        """Ranges of values that occur `counts` times: float32, ascending, and float64, both `[ranges, n]`."""

    def bounds(self, values: Tensor, grid: Grid) -> Bounds:
        """Of the very values."""
        ordered = values.flatten(1).sort(dim=1).values
        return self.weighed(ordered, torch.ones_like(ordered, dtype=torch.float64), grid)

    def observer(self) -> observers.Observer:
        """Counts values in a histogram of 8,192 bins, whose width doubles as the range grows."""
        return observers.Histogram()

    def observed(self, observer: observers.Observer, grid: Grid) -> Bounds:
        """Of the centres of bins: exact to half a bin, within the extremes."""
        if not isinstance(observer, observers.Histogram):
            raise TypeError(f"{type(self).__name__} reads the observer that it makes, got {type(observer).__name__}")
        centres, counts = observer.occupied()
        low, high = self.weighed(centres[None], counts[None], grid)
        return low[0].clamp(min=observer.minimum), high[0].clamp(max=observer.maximum)


@dataclass(frozen=True)
class Percentile(_OfDistribution):
    """The middle share of values: of `n`, the `floor(n (1 - share) / 2)` least and as many greatest are clipped.

    Args:
        share: in (0, 1].

    Raises:
        ValueError: share outside (0, 1].

    >>> low, high = Percentile(0.5).bounds(torch.tensor([[[0.0, 10.0, 20.0, 30.0]]]), Grid())
    >>> low.item(), high.item()
    (10.0, 20.0)
    """

    share: float = 0.999

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"Percentile needs a share of values in (0, 1], got share={self.share!r}")

    def weighed(self, values: Tensor, counts: Tensor, grid: Grid) -> Bounds:
        """The first values that are not clipped, from either end."""
        total = counts[0].sum().item()
        clipped = int(total * (1.0 - self.share) / 2 + 1e-6)  # a whole number that came out a trifle less is meant
        below, above = counts.cumsum(1), counts.flip(1).cumsum(1)
        low = (below <= clipped).sum(1)
        high = values.shape[1] - 1 - (above <= clipped).sum(1)
        return values.gather(1, low[:, None])[:, 0], values.gather(1, high[:, None])[:, 0]


@dataclass(frozen=True)
class MeanSquaredError(_OfDistribution):
    """The range of least squared error, among shares of the whole one: `k / candidates` of it, for `k` from 1 up.

        error = sum_i (x^_i - x_i)^2,   with x^ from `Grid`

    Of equal errors the widest range wins.

    Args:
        candidates: how many, at least 1.

    Raises:
        ValueError: no candidate.

    >>> values = torch.cat([torch.linspace(-1.0, 1.0, 999), torch.tensor([4.0])])
    >>> low, high = MeanSquaredError().bounds(values.view(1, 1, -1), Grid(4))
    >>> -1.0 < low.item() < 0.0 < high.item() < 4.0
    True
    """

    candidates: int = 100

    def __post_init__(self) -> None:
        """Refuse a search among nothing."""
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"MeanSquaredError needs at least one candidate, got candidates={self.candidates!r}")

    def weighed(self, values: Tensor, counts: Tensor, grid: Grid) -> Bounds:
        """Tries all candidates, the widest first."""
        whole = values[:, 0].clamp(max=0.0), values[:, -1].clamp(min=0.0)
        best, least = whole, torch.full_like(whole[0], torch.inf, dtype=torch.float64)
        for k in range(self.candidates, 0, -1):
            bounds = whole[0] * (k / self.candidates), whole[1] * (k / self.candidates)
            scale, zero_point = (x[:, None] for x in grid.scale_and_zero_point(*bounds))
            difference = (grid.fake_quantized(values, scale, zero_point) - values).double()
            error = (difference.square() * counts).sum(1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, bounds[0], best[0]), torch.where(better, bounds[1], best[1])
        return best
