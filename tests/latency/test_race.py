"""The fastest of several networks, on a clock that is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.latency import race as module
from lightning_prune.latency.race import race
from lightning_prune.latency.timing import Timing


class Machine:
    """Takes a given time for each run, times how slow it is just then."""

    def __init__(self, seconds: dict[str, float], slowness: Callable[[int], float] = lambda turn: 1.0) -> None:
        self.seconds, self.slowness = seconds, slowness
        self.count = dict.fromkeys(seconds, 0)
        self.last = ""

    def runs(self) -> dict[str, Callable[[], object]]:
        def run(name: str) -> None:
            self.last = name

        return {name: lambda name=name: run(name) for name in self.seconds}  # type: ignore[misc]

    def repeated(self, run: Callable[[], object], rounds: int) -> Timing:
        run()
        turn = self.count[self.last]
        self.count[self.last] += 1
        seconds = self.seconds[self.last] * self.slowness(turn)
        return Timing((seconds,) * rounds, (seconds,) * rounds)


def outcome(monkeypatch: pytest.MonkeyPatch, machine: Machine, handicaps: dict[str, float] | None = None) -> str:
    monkeypatch.setattr(module, "repeated", machine.repeated)
    found = race(machine.runs(), handicaps or {})
    assert set(found.best_s) == set(machine.seconds)
    return found.winner


def test_the_fastest_wins_and_its_least_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"a": 2.0, "b": 1.0, "c": 3.0}, lambda turn: 3.0 if turn == 0 else 1.0 + 0.1 * turn)
    monkeypatch.setattr(module, "repeated", machine.repeated)
    found = race(machine.runs(), {})
    assert found.winner == "b"
    assert found.best_s == pytest.approx({"a": 2.2, "b": 1.1, "c": 3.3})
    assert set(machine.count.values()) == {9}  # no tie: once is enough


def test_a_quiet_moment_of_one_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    # The slower one met a moment in which the machine was twice as fast: by least times it would win.
    lucky = Machine({"a": 1.0, "b": 0.9})
    usual = lucky.repeated

    def repeated(run: Callable[[], object], rounds: int) -> Timing:
        timing = usual(run, rounds)
        if lucky.last == "a" and lucky.count["a"] == 5:
            return Timing((0.5,) * rounds, (0.5,) * rounds)
        return timing

    monkeypatch.setattr(module, "repeated", repeated)
    found = race(lucky.runs(), {})
    assert found.best_s["a"] < found.best_s["b"]
    assert found.winner == "b"


@pytest.mark.parametrize(("ratio", "turns"), [(0.95, 9), (0.97, 36), (1.03, 36), (1.05, 9)])
def test_ties_are_run_again(monkeypatch: pytest.MonkeyPatch, ratio: float, turns: int) -> None:
    machine = Machine({"a": 1.0, "b": ratio})
    assert outcome(monkeypatch, machine) == ("b" if ratio < 1 else "a")
    assert set(machine.count.values()) == {turns}


@pytest.mark.parametrize(("ratio", "winner"), [(0.985, "dense"), (0.975, "sparse")])
def test_handicaps_count(monkeypatch: pytest.MonkeyPatch, ratio: float, winner: str) -> None:
    assert outcome(monkeypatch, Machine({"dense": 1.0, "sparse": ratio}), {"dense": 0.98}) == winner


@settings(max_examples=50)
@given(
    seconds=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5),
    slow=st.lists(st.floats(1.0, 5.0), min_size=36, max_size=36),
)
def test_spells_that_meet_all_change_nothing(seconds: list[float], slow: list[float]) -> None:
    machine = Machine({str(i): value for i, value in enumerate(seconds)}, slow.__getitem__)
    with pytest.MonkeyPatch.context() as monkeypatch:
        winner = outcome(monkeypatch, machine)
    assert machine.seconds[winner] <= min(seconds) * (1 + 1e-9)


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(ValueError, match="something to run, got no alternatives"):
        race({}, {})
