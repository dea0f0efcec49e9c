"""Whether the processor runs as fast as it can: what is timed while it does not is timed again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from lightning_prune.latency.timing import Timing, repeated

_SIDE, _TRIES = 64, 5
"""Of the matrices whose product is timed, which stay in the first caches, and how often it is."""

_IN_A_ROW = 3
"""Times that an alternative is run before one looks again."""

_LOST = 0.5
"""Of the time that what counts takes, the share that timing again may take."""

_SLOWER = 1.12
"""Times longer that their product takes where something else slows the processor down."""


class Pace:
    """Tells when a CPU is slower than it can be, and for how long that was waited out.

    Virtual machines own threads of a processor, not cores: a neighbour on the other thread takes a fifth to a third of
    the speed, for seconds at a time, which neither the wall's nor the thread's clock shows. The product of two small
    matrices, compared with the least time that it ever took, does.

    `spent_s`, `lost_s` and `slow_s` are the seconds that counted, that did not, and that counted though the processor
    was slow, patience being at its end.

    Args:
        device: that is timed; others than CPUs are taken to be at full speed.
        patience_s: seconds that may be lost to timing again, beside half as many as all that counts takes.
    """

    def __init__(self, device: torch.device, patience_s: float = 1.0) -> None:
        self.patience_s = patience_s
        self.spent_s = self.lost_s = self.slow_s = 0.0
        self._watched = device.type == "cpu"
        self._best_s = math.inf
        self._factor = torch.ones(_SIDE, _SIDE)
        self._product = torch.empty_like(self._factor)

    def full(self) -> bool:
        """Whether the processor runs at full speed now."""
        if not self._watched:
            return True
        now_s = min(self._product_s() for _ in range(_TRIES))
        self._best_s = min(self._best_s, now_s)
        return now_s <= _SLOWER * self._best_s

    def counts(self, seconds: float, *, full: bool) -> bool:
        """Whether what took so long counts: if it ran at full speed, or if there is no more time to try again."""
        counts = full or self.lost_s > _LOST * self.spent_s + self.patience_s
        if counts:
            self.spent_s += seconds
            self.slow_s += 0.0 if full else seconds
        else:
            self.lost_s += seconds
        return counts

    def settle(self) -> None:
        """Wait until the processor runs at full speed, or there is no more time to wait."""
        start = time.perf_counter()
        while not self.full():
            if self.counts(time.perf_counter() - start, full=False):
                return
            start = time.perf_counter()

    def repeated(self, run: Callable[[], object], rounds: int) -> Timing:
        """Times one alternative as `timing.repeated` does, a few times in a row until `rounds` of them count."""
        counted = Timing((), ())
        while len(counted.wall_s) < rounds:
            start, full = time.perf_counter(), self.full()
            timing = repeated(run, min(_IN_A_ROW, rounds), untimed=1)
            full = self.full() and full
            if self.counts(time.perf_counter() - start, full=full):
                counted += timing
        return counted

    def _product_s(self) -> float:
        start = time.perf_counter()
        torch.mm(self._factor, self._factor, out=self._product)
        return time.perf_counter() - start
