"""Times layers inside full passes, where caches are as cold and memory as fragmented as they will be in use.

Timed alone, layers add up to 7 to 25 % less than the network that they make up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.latency.pace import Pace
from lightning_prune.latency.timing import Timing, synchroniser

_UNTIMED, _IN_A_ROW = 1, 3
"""Passes with the same variants: to warm caches, and to be timed."""

_HOPELESS, _SLOWER, _LONG_S = 1.5, 1.2, 5e-3
"""Times longer than the layers' first variants in all, and than each of them, and seconds in all, that variants take
which nobody would choose."""


class TimedLayer(nn.Module):
    """Stands in the place of a layer, runs one of its variants and notes how long each call took.

    Args:
        variants: modules that take and give what the layer does.
        device: of the tensors.
    """

    def __init__(self, variants: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__()
        self.variants = nn.ModuleList(variants)
        self.active = 0
        self.synchronise = synchroniser(device)
        self.noted = False
        self.pass_s = 0.0
        self.seconds: list[list[list[float]]] = [[] for _ in variants]
        self.taken: list[list[float]] = []

    def begin(self, active: int, *, noted: bool = True) -> None:
        """A new pass, with this variant; its times are noted or, if it only warms caches, not."""
        self.active, self.noted = active % len(self.variants), noted
        self.pass_s = 0.0
        if noted:
            self.taken.append([])

    def end(self, *, counts: bool = True) -> None:
        """Keep what was noted since the last end, in passes of one variant, or forget it."""
        if counts and self.taken:
            calls = self.seconds[self.active]
            calls += [[] for _ in range(len(self.taken[0]) - len(calls))]
            for taken in self.taken:
                for call, seconds in zip(calls, taken, strict=True):
                    call.append(seconds)
        self.taken = []

    def least_s(self, number: int) -> float:
        """The least times of a variant's calls, added up."""
        return sum(min(times) for times in self.seconds[number])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active variant gives."""
        variant = self.variants[self.active]
        self.synchronise()
        start = time.perf_counter()
        result = variant(*args, **kwargs)
        self.synchronise()
        seconds = time.perf_counter() - start
        self.pass_s += seconds
        if self.noted:
            self.taken[-1].append(seconds)
        return result


@dataclass(frozen=True)
class Pass:
    """One pass that counts.

    Args:
        number: of the variants that ran; 0 for the first ones.
        whole: time of the pass.
        layers_s: spent in the timed layers.
    """

    number: int
    whole: Timing
    layers_s: float


def timed_passes(
    layers: Sequence[TimedLayer], run: Callable[[], object], rounds: int, pace: Pace | None = None
) -> Iterator[Pass]:
    """Run passes until every variant of every layer was timed `rounds` times, but once or twice where one is hopeless.

    All layers run the variant of one number, so that the sparse ones run in a sparse network, whose weights may all
    lie in cache. Then the network runs a few times, the first of which do not count: one that is used finds its
    weights in whatever cache holds them.

    Args:
        layers: to be timed.
        run: makes a pass of the network.
        rounds: how often each variant is timed at least.
        pace: of the processor: while it is slow, passes do not count and come again later.

    Yields:
        Each pass that counts.
    """
    most = max(len(layer.variants) for layer in layers)
    turns = deque(range(passes_of(layers, rounds) // _IN_A_ROW))
    while turns:
        turn = turns.popleft()
        if turn >= most and _hopeless(layers, turn):
            continue
        start, full = time.perf_counter(), pace is None or pace.full()
        found: list[Pass] = []
        slow = False
        for number in range(_UNTIMED + _IN_A_ROW):
            for layer in layers:
                layer.begin(turn, noted=number >= _UNTIMED)
            wall, thread = time.perf_counter(), time.thread_time()
            run()
            thread, wall = time.thread_time() - thread, time.perf_counter() - wall
            before = slow
            slow = _slow([(layer.least_s(0), layer.pass_s) for layer in layers if turn % len(layer.variants)])
            if number >= _UNTIMED:
                found.append(Pass(turn % most, Timing((wall,), (thread,)), sum(layer.pass_s for layer in layers)))
                full = full and (pace is None or pace.full())
                if slow and before:  # once may be by chance
                    break
        counts = pace is None or pace.counts(time.perf_counter() - start, full=full)
        for layer in layers:
            layer.end(counts=counts)
        if counts:
            yield from found
        else:
            turns.append(turn)


def _hopeless(layers: Sequence[TimedLayer], turn: int) -> bool:
    """Whether no layer would be run by its variant in this turn, by what it took before."""
    others = [(layer, turn % len(layer.variants)) for layer in layers if turn % len(layer.variants)]
    return _slow([(layer.least_s(0), layer.least_s(variant)) for layer, variant in others])


def _slow(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether no layer would be run by its variant, by far, given what its first one takes, and what this one does."""
    first_s, slow_s = (sum(seconds) for seconds in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return slow_s > max(_HOPELESS * first_s, _LONG_S) and all(0 < _SLOWER * first_s < s for first_s, s in pairs)


def passes_of(layers: Sequence[TimedLayer], rounds: int) -> int:
    """How many passes count, at most, when every variant is timed at least `rounds` times."""
    return max(len(layer.variants) for layer in layers) * -(-rounds // _IN_A_ROW) * _IN_A_ROW


class Sequenced(nn.Module):
    """Layers that do not feed each other, run one after another as a network would.

    Before each layer its input is written anew, as an activation function would have done.
    """

    def __init__(self, layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.inputs = list(inputs)

    def forward(self) -> None:
        """Run all."""
        for layer, x in zip(self.layers, self.inputs, strict=True):
            layer(torch.relu(x))
