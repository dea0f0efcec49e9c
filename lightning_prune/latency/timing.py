"""Clocks: rounds of alternatives in turn, the least of them, and whether the machine was quiet."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

AGREEMENT = 0.05
"""Wall and thread time further apart than this share: the process was pre-empted, or ran threads."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, by the clock on the wall and by the processor time of the calling thread."""

    wall_s: tuple[float, ...]
    thread_s: tuple[float, ...]

    def __add__(self, other: Timing) -> Timing:
        """The rounds of both."""
        return Timing(self.wall_s + other.wall_s, self.thread_s + other.thread_s)

    @property
    def best_s(self) -> float:
        """The least wall time."""
        return min(self.wall_s)

    @property
    def best_thread_s(self) -> float:
        """The least thread time."""
        return min(self.thread_s)

    @property
    def agrees(self) -> bool:
        """Whether the best wall time is the thread's own: nothing else ran meanwhile."""
        return abs(self.best_s - self.best_thread_s) <= AGREEMENT * self.best_s

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "best_s": self.best_s,
            "best_thread_s": self.best_thread_s,
            "wall_and_thread_agree": self.agrees,
            "wall_s": list(self.wall_s),
            "thread_s": list(self.thread_s),
        }


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int,
    setup: Mapping[str, Callable[[], object]] | None = None,
    fewer_rounds: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Times each alternative once per round, in turn, so that a slow spell of the machine meets all of them.

    Every alternative runs once untimed before. `setup[name]` runs untimed before each call of that alternative;
    `fewer_rounds[name]` stops a slow alternative early and spares it the untimed call.

    Raises:
        ValueError: a name in `setup` or `fewer_rounds` is no alternative, or `rounds` is below 1.
    """
    setup, fewer_rounds = setup or {}, fewer_rounds or {}
    unknown = (set(setup) | set(fewer_rounds)) - set(alternatives)
    if unknown:
        raise ValueError(f"no alternative is called {sorted(unknown)}; there are {sorted(alternatives)}")
    if rounds < 1:
        raise ValueError(f"interleaved needs rounds >= 1, got {rounds}")
    wall_s: dict[str, list[float]] = {name: [] for name in alternatives}
    thread_s: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(rounds + 1):
        for name, run in alternatives.items():
            if name in fewer_rounds and not 1 <= turn <= fewer_rounds[name]:
                continue
            setup.get(name, _nothing)()
            wall, thread = time.perf_counter(), time.thread_time()
            run()
            thread, wall = time.thread_time() - thread, time.perf_counter() - wall
            if turn > 0:
                wall_s[name].append(wall)
                thread_s[name].append(thread)
    return {name: Timing(tuple(wall_s[name]), tuple(thread_s[name])) for name in alternatives}


def repeated(run: Callable[[], object], rounds: int, untimed: int = 2) -> Timing:
    """Times one alternative several times in a row, as a network in use runs, after a few untimed times."""
    for _ in range(untimed):
        run()
    wall_s, thread_s = [], []
    for _ in range(rounds):
        wall, thread = time.perf_counter(), time.thread_time()
        run()
        thread_s.append(time.thread_time() - thread)
        wall_s.append(time.perf_counter() - wall)
    return Timing(tuple(wall_s), tuple(thread_s))


def keep_freed_memory() -> None:
    """Tell glibc to keep what a pass frees for the next one, in this process, from now on.

    By default large blocks go back to the system and come back as page faults, depending on what happens to lie
    where: one and the same network was seen to take 6.7 or 8.4 ms. Other allocators are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def synchroniser(device: torch.device) -> Callable[[], object]:
    """What waits until a device has finished its work."""
    if device.type == "cpu":
        return _nothing
    return lambda: torch.accelerator.synchronize(device)


def _nothing() -> None:
    pass
