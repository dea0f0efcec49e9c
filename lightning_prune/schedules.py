"""Schedules: how far from the initial plan to the target plan, as a function of one number.

A schedule is a pure shape on [0, 1]. When pruning begins, ends and how often masks are updated is the
business of whoever calls it (`lightning_prune.callbacks.Pruning`). The sparsity of a layer follows as

    s(p) = s_i + (s_f - s_i) * f(p)

with `s_i` its initial and `s_f` its target sparsity, `p` the share of the pruning window that has passed and
`f` the schedule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["AGP", "Cosine", "Iterative", "Linear", "OneCycle", "OneShot", "Schedule"]


@dataclass(frozen=True)
class Schedule(ABC):
    """A shape on [0, 1]: `schedule(progress)` is how far from the initial to the target plan.

    A schedule of your own is a frozen dataclass with the method `shape`:

    >>> @dataclass(frozen=True)
    ... class Sqrt(Schedule):
    ...     def shape(self, progress: float) -> float:
    ...         return progress ** 0.5
    >>> Sqrt()(0.25)
    0.5
    """

    stepwise: ClassVar[bool] = False
    """Whether the shape is a staircase: masks change a few times, with plain training in between."""

    @abstractmethod
    def shape(self, progress: float) -> float:
        """The share of the way that has been gone at `progress`, both in [0, 1]."""

    def __call__(self, progress: float) -> float:
        """`shape(progress)`, and exactly 1.0 at 1.0.

        Raises:
            ValueError: if `progress` lies outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"{self} needs progress in [0, 1], got {progress!r}; pass the share of the pruning window")
        return 1.0 if progress == 1.0 else self.shape(progress)


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once, at the beginning of the window: `f(p) = 1`.

    >>> OneShot()(0.0)
    1.0
    """

    stepwise: ClassVar[bool] = True

    def shape(self, progress: float) -> float:
        """See the class."""
        return 1.0


@dataclass(frozen=True)
class Iterative(Schedule):
    """A staircase of equal steps: `f(p) = floor(n * p) / n`, with `n = steps`.

    Training comes first: the first step is taken when the share `1 / n` of the window has passed, the last one at its
    end.

    Args:
        steps: number of steps, at least 1.

    Source: the iterative pruning of Han et al., "Learning both Weights and Connections" (2015), section 3.

    >>> [Iterative(steps=4)(p) for p in (0.0, 0.1, 0.25, 0.3, 0.8, 1.0)]
    [0.0, 0.0, 0.25, 0.25, 0.75, 1.0]
    """

    steps: int = 5
    stepwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a number of steps that is no count."""
        if self.steps < 1 or self.steps != int(self.steps):
            raise ValueError(f"Iterative needs a whole number of steps >= 1, got steps={self.steps!r}")

    def shape(self, progress: float) -> float:
        """See the class."""
        # Rounded so that a product a little below a whole number, for want of precision, is not the step before.
        return math.floor(round(progress * self.steps, 9)) / self.steps


@dataclass(frozen=True)
class AGP(Schedule):
    """Automated gradual pruning: fast at first, ever slower later: `f(p) = 1 - (1 - p)^power`.

    Args:
        power: the exponent, 3 in the paper; above 0.

    Source: Zhu & Gupta, "To prune, or not to prune" (2017), equation 1.

    >>> AGP()(0.5)
    0.875
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        """Refuse an exponent without a meaning."""
        if not (self.power > 0 and math.isfinite(self.power)):
            raise ValueError(f"AGP needs a finite power above 0, got power={self.power!r}")
        object.__setattr__(self, "power", float(self.power))

    def shape(self, progress: float) -> float:
        """See the class."""
        return float(1.0 - (1.0 - progress) ** self.power)


@dataclass(frozen=True)
class Linear(Schedule):
    """The same amount all along: `f(p) = p`.

    >>> Linear()(0.3)
    0.3
    """

    def shape(self, progress: float) -> float:
        """See the class."""
        return progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Slow at both ends: `f(p) = (1 - cos(pi p)) / 2`.

    >>> round(Cosine()(0.5), 12)
    0.5
    """

    def shape(self, progress: float) -> float:
        """See the class."""
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class OneCycle(Schedule):
    """One cycle: `f(p) = (1 + e^(-a + b)) / (1 + e^(-a p + b))`, with steepness `a` and offset `b`.

    Note that `f(0)` is a little above 0 (0.0025 with the defaults): the first update removes some weights at once.

    Args:
        steepness: `a`, above 0.
        offset: `b`.

    Source: Hubens et al., "One-Cycle Pruning" (2021), equation 3.

    >>> round(OneCycle()(0.5), 4)
    0.7313
    """

    steepness: float = 14.0
    offset: float = 6.0

    def __post_init__(self) -> None:
        """Refuse a cycle that does not rise."""
        if not (self.steepness > 0 and math.isfinite(self.steepness) and math.isfinite(self.offset)):
            raise ValueError(
                f"OneCycle needs a finite steepness above 0 and a finite offset, got steepness={self.steepness!r}, "
                f"offset={self.offset!r}"
            )

    def shape(self, progress: float) -> float:
        """See the class."""
        a, b = self.steepness, self.offset
        return (1.0 + math.exp(-a + b)) / (1.0 + math.exp(-a * progress + b))
