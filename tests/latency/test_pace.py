"""What is timed while the processor is slow is timed again, as long as there is patience."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_prune.latency.context import TimedLayer, timed_passes
from lightning_prune.latency.pace import Pace

CPU = torch.device("cpu")


def scripted(monkeypatch: pytest.MonkeyPatch, seconds: list[float], patience_s: float = 1.0) -> Pace:
    """A pace whose looks take so long, the last for ever; the first is at full speed."""
    looks: Iterator[float] = iter(seconds)
    last = [1.0]

    def look(pace: Pace) -> float:
        last[0] = next(looks, last[0])
        return last[0]

    monkeypatch.setattr("lightning_prune.latency.pace._TRIES", 1)
    monkeypatch.setattr(Pace, "_product_s", look)
    return Pace(CPU, patience_s)


def test_full_speed_is_that_of_the_fastest_look(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = scripted(monkeypatch, [1.3, 1.4, 1.5, 1.0, 1.3, 1.1])
    assert [pace.full() for _ in range(6)] == [True, True, False, True, False, True]


def test_other_devices_are_taken_to_be_at_full_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "_product_s", lambda pace: pytest.fail("looked"))
    assert Pace(torch.device("cuda")).full()


def test_patience_is_half_as_long_as_what_counts_and_a_little_more() -> None:
    pace = Pace(CPU, patience_s=1.0)
    assert pace.counts(2.0, full=True)
    assert not any(pace.counts(1.5, full=False) for _ in range(2))
    assert (pace.spent_s, pace.lost_s) == (2.0, 3.0)
    assert pace.counts(1.5, full=False)  # nothing better is to be had
    assert (pace.spent_s, pace.slow_s) == (3.5, 1.5)


def test_slow_passes_come_again_and_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # Looks of the first turn: before it, and after each of its three passes; the second pass was slow.
    pace = scripted(monkeypatch, [1.0, 1.0, 1.5, 1.0, 1.0])
    layer, ran = TimedLayer([nn.Identity(), nn.ReLU()], CPU), list[int]()

    def run() -> None:
        ran.append(layer.active)
        layer(torch.ones(1))

    passes = list(timed_passes([layer], run, 3, pace))
    assert ran == [0] * 4 + [1] * 4 + [0] * 4
    assert [one.number for one in passes] == [1] * 3 + [0] * 3
    assert [len(calls[0]) for calls in layer.seconds] == [3, 3]
    assert pace.lost_s > 0


def test_where_it_is_always_slow_everything_counts_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = scripted(monkeypatch, [1.0, 2.0], patience_s=0.01)
    layer = TimedLayer([nn.Identity()], CPU)
    assert len(list(timed_passes([layer], lambda: layer(torch.ones(1)), 5, pace))) == 6
    assert len(pace.repeated(lambda: None, 4).wall_s) >= 4
    pace.settle()
    assert pace.lost_s > 0.01


def test_repeated_leaves_slow_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, calls = scripted(monkeypatch, [1.0, 1.0, 1.0, 2.0, 1.0, 1.0]), list[int]()
    assert len(pace.repeated(lambda: calls.append(0), 6).wall_s) == 6
    assert len(calls) == 3 * (1 + 3)  # three of one untimed and three timed, the second of which did not count
