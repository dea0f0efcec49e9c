"""Points and intervals of training, and the window of training in which pruning happens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Epochs:
    """A point or interval of training, counted in epochs.

    >>> Epochs(2).n
    2
    """

    n: float

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        if not (self.n >= 0 and math.isfinite(self.n)):
            raise ValueError(f"Epochs needs a finite n >= 0, got n={self.n!r}")


@dataclass(frozen=True)
class Steps:
    """A point or interval of training, counted in optimizer steps (in batches under manual optimization).

    >>> Steps(100).n
    100
    """

    n: int

    def __post_init__(self) -> None:
        """Refuse what is no count."""
        if not (self.n >= 0 and math.isfinite(self.n) and self.n == int(self.n)):
            raise ValueError(f"Steps needs a whole n >= 0, got n={self.n!r}")


Moment: TypeAlias = Epochs | Steps | float
"""A point of training: after so many epochs, so many steps, or a share of the whole training in [0, 1]."""


@dataclass(frozen=True)
class Length:
    """What is known about the length of a training.

    Args:
        steps: in all; None if training has no known end.
        steps_per_epoch: None if the loader has no length.
    """

    steps: int | None
    steps_per_epoch: int | None


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
    unit: Literal["steps", "epochs"] = "steps"

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
    if not isinstance(moment, Epochs | Steps) and not 0.0 <= moment <= 1.0:
        raise ValueError(f"{what} is a share of training in [0, 1], Epochs(n) or Steps(n), got {what}={moment!r}")


def check_order(begin: Moment, end: Moment) -> None:
    """Refuse a window that ends before it begins, as far as this can be told without knowing the training.

    Raises:
        ValueError: naming both ends.
    """
    kinds = {type(moment) if isinstance(moment, Epochs | Steps) else float for moment in (begin, end)}
    if len(kinds) == 1 and _number(begin) >= _number(end):
        raise ValueError(f"Pruning needs begin < end, got begin={begin}, end={end}; lower begin or raise end")


def position_of(what: str, moment: Moment, length: Length) -> int:
    """A moment as a number of steps.

    Raises:
        ValueError: if the training has no length that a share or an epoch could be taken of.
    """
    if isinstance(moment, Steps):
        return moment.n
    if _number(moment) == 0:
        return 0
    if isinstance(moment, Epochs):
        if length.steps_per_epoch is None:
            raise ValueError(
                f"{what}={moment} cannot be told in steps: the training loader has no length; give begin, end and "
                "every all in Epochs, or all in Steps"
            )
        return round(moment.n * length.steps_per_epoch)
    if length.steps is None:
        raise ValueError(
            f"{what}={moment} is a share of training, but this training has no known length (unsized loader or no "
            f"max_epochs); set the Trainer's max_steps, or give {what} as Epochs(n) or Steps(n)"
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
    if length.steps_per_epoch is None and moments and all(isinstance(moment, Epochs) for moment in moments):
        return _ordered(
            Window(
                math.ceil(_number(begin)),
                math.ceil(_number(end)),
                max(1, math.ceil(_number(every)) if every is not None else 1),
                unit="epochs",
            ),
            begin,
            end,
        )
    first, last = position_of("begin", begin, length), position_of("end", end, length)
    share = not isinstance(begin, Epochs | Steps) and not isinstance(end, Epochs | Steps)
    if share and first == last and length.steps is not None:  # shares of a very short training may fall on one step
        first = min(first, length.steps - 1)
        last = first + 1
    if length.steps is not None and last > length.steps:
        raise ValueError(
            f"pruning would end at {end}, step {last}, but training lasts {length.steps} steps; lower end or train "
            "longer (max_epochs, max_steps)"
        )
    interval = max(1, (last - first) // 100) if every is None else max(1, position_of("every", every, length))
    return _ordered(Window(first, last, interval), begin, end)


def _ordered(window: Window, begin: Moment, end: Moment) -> Window:
    if window.begin >= window.end:
        raise ValueError(
            f"Pruning needs begin < end, got begin={begin}, end={end}, which are {window.unit} {window.begin} and "
            f"{window.end} of this training; lower begin or raise end"
        )
    return window


def _number(moment: Moment) -> float:
    return moment.n if isinstance(moment, Epochs | Steps) else moment
