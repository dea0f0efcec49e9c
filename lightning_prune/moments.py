"""Points and intervals of training, and the window of training in which pruning happens."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Epochs", "Steps"]


@dataclass(frozen=True)
class Interval(ABC):
    """So many units of training: where it says when, counted from the start.

    Args:
        n: how many.
    """

    n: float


@dataclass(frozen=True)
class Epochs(Interval):
    """A point or interval of training, counted in epochs.

    >>> Epochs(2).n
    2
    """

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        if not (self.n >= 0 and math.isfinite(self.n)):
            raise ValueError(f"Epochs needs a finite n >= 0, got n={self.n!r}")


@dataclass(frozen=True)
class Steps(Interval):
    """A point or interval of training, counted in optimizer steps (in batches under manual optimization).

    >>> Steps(100).n
    100
    """

    def __post_init__(self) -> None:
        """Refuse what is no count."""
        if not (self.n >= 0 and math.isfinite(self.n) and self.n == int(self.n)):
            raise ValueError(f"Steps needs a whole n >= 0, got n={self.n!r}")


Unit: TypeAlias = Literal["steps", "epochs"]

Moment: TypeAlias = Interval | float
"""A point of training: after so many epochs, so many steps, or a share of the whole training in [0, 1]."""


@dataclass(frozen=True)
class Length:
    """What is known about the length of a training.

    Args:
        steps: in all; None if training has no known end.
        steps_per_epoch: None if the loader has no length.
        epochs: in all; None if only steps or time end the training.
    """

    steps: int | None
    steps_per_epoch: int | None
    epochs: int | None = None


@dataclass(frozen=True)
class Window:
    """When masks are updated: at `begin`, every so often, and at `end`, all in one unit.

    >>> window = Window(begin=10, end=25, every=10)
    >>> [window.progress(position) for position in (9, 10, 19, 20, 24, 25, 99)]
    [None, 0.0, 0.0, 0.6666666666666666, 0.6666666666666666, 1.0, 1.0]
    """

    begin: int
    end: int
    every: int
    unit: Unit = "steps"

    def progress(self, position: int) -> float | None:
        """The share of the window at the last update due at `position`; None before the window.

        It is 1.0 from `end` on, whatever the cadence.
        """
        if position < self.begin:
            return None
        if position >= self.end:
            return 1.0
        return (position - self.begin) // self.every * self.every / (self.end - self.begin)


def check_moment(what: str, moment: Moment) -> None:
    """Refuse a share outside [0, 1].

    Raises:
        ValueError: naming the argument and its value.
    """
    if not isinstance(moment, Interval) and not 0.0 <= moment <= 1.0:
        raise ValueError(f"{what} is a share of training in [0, 1], Epochs(n) or Steps(n), got {what}={moment!r}")


def check_order(begin: Moment, end: Moment) -> None:
    """Refuse a window that ends before it begins, as far as this can be told without knowing the training.

    Raises:
        ValueError: naming both ends.
    """
    kinds = {type(moment) if isinstance(moment, Interval) else float for moment in (begin, end)}
    if len(kinds) == 1 and _number(begin) >= _number(end):
        raise ValueError(f"Pruning needs begin < end, got begin={begin}, end={end}; lower begin or raise end")


def position_of(what: str, moment: Moment, length: Length, unit: Unit = "steps") -> int:
    """A moment as a number of steps, or of epochs where steps per epoch are unknown.

    Raises:
        ValueError: if the training has no length that a share or an epoch could be taken of.
    """
    if _number(moment) == 0:
        return 0
    if unit == "epochs" and isinstance(moment, Epochs):
        return math.ceil(moment.n)
    if unit == "steps" and isinstance(moment, Steps):
        return int(moment.n)
    if isinstance(moment, Interval):
        if unit == "steps" and length.steps_per_epoch is not None:
            return round(moment.n * length.steps_per_epoch)
        raise ValueError(
            f"{what}={moment} cannot be told in {unit}: the training loader has no length, or epochs differ in steps; "
            "give begin, end, every and rewind.to all in Epochs, or all in Steps"
        )
    if length.steps is None:
        raise ValueError(
            f"{what}={moment} is a share of training, but this training has no known length (unsized loader, no "
            f"max_epochs, or accumulation that changes); set max_steps, or give {what} as Epochs(n) or Steps(n)"
        )
    return round(moment * length.steps)


def window(begin: Moment, end: Moment, every: Moment | None, length: Length) -> Window:
    """Place a window in a training of this length.

    Args:
        begin: the first update.
        end: the last update, when the target is reached.
        every: the interval between updates; None for a hundredth of the window.
        length: of the training.

    Raises:
        ValueError: if a moment has no meaning in this training, the window is empty, or it ends after training.

    >>> window(Epochs(1), 0.75, None, Length(steps=1000, steps_per_epoch=100))
    Window(begin=100, end=750, every=6, unit='steps')
    """
    moments = [moment for moment in (begin, end, every) if moment is not None and _number(moment) != 0]
    in_epochs = length.steps_per_epoch is None and all(isinstance(moment, Epochs) for moment in moments)
    unit: Unit = "epochs" if in_epochs else "steps"
    total = length.epochs if in_epochs else length.steps
    first, last = position_of("begin", begin, length, unit), position_of("end", end, length, unit)
    shares = not isinstance(begin, Interval) and not isinstance(end, Interval)
    if shares and first == last and total is not None:  # shares of a very short training may fall on one step
        first = min(first, total - 1)
        last = first + 1
    if first >= last:
        raise ValueError(
            f"Pruning needs begin < end, got begin={begin}, end={end}, which are {unit} {first} and {last} of this "
            "training; lower begin or raise end"
        )
    if total is not None and last > total:
        raise ValueError(
            f"pruning would end at {end}, after {last} {unit}, but training lasts {total}; lower end or train longer "
            "(max_epochs, max_steps)"
        )
    interval = (last - first) // 100 if every is None else position_of("every", every, length, unit)
    return Window(first, last, max(1, interval), unit)


def _number(moment: Moment) -> float:
    return moment.n if isinstance(moment, Interval) else moment
