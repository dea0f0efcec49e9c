"""Where a pruning window lies in a training, and how far it has come at each step."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import Epochs, Steps
from lightning_prune.moments import Length, Moment, Window, check_moment, check_order, position_of, window

KNOWN = Length(steps=1000, steps_per_epoch=100)
UNSIZED = Length(steps=None, steps_per_epoch=None)


@pytest.mark.parametrize(
    ("begin", "end", "every", "expected"),
    [
        (0.0, 0.75, None, Window(0, 750, 7)),
        (0.1, 1.0, 0.1, Window(100, 1000, 100)),
        (0, 1, None, Window(0, 1000, 10)),
        (Epochs(2), Epochs(5), Epochs(1), Window(200, 500, 100)),
        (Epochs(0.5), Epochs(1.256), None, Window(50, 126, 1)),
        (Steps(10), Steps(25), Steps(10), Window(10, 25, 10)),
        (Steps(10), Epochs(1), 0.05, Window(10, 100, 50)),
        (0.25, Epochs(9), Steps(3), Window(250, 900, 3)),
        (Steps(0), Steps(1000), None, Window(0, 1000, 10)),
        (Steps(0), Steps(99), None, Window(0, 99, 1)),  # less than a hundred steps: at every one
        (0.0, 0.5, Steps(0), Window(0, 500, 1)),
        (0.0, 0.5, 0.0001, Window(0, 500, 1)),
        (0.0, 0.5, Steps(10**6), Window(0, 500, 10**6)),
    ],
)
def test_windows_in_steps(begin: Any, end: Any, every: Any, expected: Window) -> None:
    assert window(begin, end, every, KNOWN) == expected


@pytest.mark.parametrize(
    ("begin", "end", "every", "expected"),
    [
        (Epochs(1), Epochs(3), None, Window(1, 3, 1, "epochs")),
        (Epochs(0), Epochs(30), Epochs(2), Window(0, 30, 2, "epochs")),
        (0.0, Epochs(3), Epochs(0), Window(0, 3, 1, "epochs")),
        (Steps(0), Epochs(3), None, Window(0, 3, 1, "epochs")),
        (Epochs(0.5), Epochs(2.5), Epochs(1.5), Window(1, 3, 2, "epochs")),
    ],
)
def test_without_a_loaders_length_epochs_are_counted_whole(begin: Any, end: Any, every: Any, expected: Window) -> None:
    assert window(begin, end, every, UNSIZED) == expected
    assert window(begin, end, every, Length(steps=50, steps_per_epoch=None)) == expected


def test_without_any_length_steps_are_steps() -> None:
    assert window(Steps(5), Steps(25), None, UNSIZED) == Window(5, 25, 1)
    assert window(0.0, Steps(25), Steps(4), UNSIZED) == Window(0, 25, 4)


def test_shares_need_steps_only() -> None:
    assert window(0.1, 0.5, None, Length(steps=40, steps_per_epoch=None)) == Window(4, 20, 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.01), (0.5, 0.51), (0.95, 1.0), (0.0, 1.0)])
def test_shares_of_a_short_training_are_a_window_within_it(begin: float, end: float, steps: int) -> None:
    placed = window(begin, end, None, Length(steps, steps))
    assert 0 <= placed.begin < placed.end <= steps
    assert placed.every == 1


@pytest.mark.parametrize(
    ("begin", "end", "every", "length", "message"),
    [
        (0.0, 0.75, None, UNSIZED, r"end=0\.75 is a share of training, but this training has no known length.*Epochs"),
        (0.1, Steps(5), None, UNSIZED, r"begin=0\.1 is a share of training.*or give begin as Epochs\(n\)"),
        (Steps(1), Steps(5), 0.1, UNSIZED, r"every=0\.1 is a share of training"),
        (Steps(1), Epochs(5), None, UNSIZED, r"end=Epochs\(n=5\) cannot be told in steps: the training loader has no"),
        (Epochs(1), 0.5, None, Length(100, None), r"begin=Epochs\(n=1\) cannot be told in steps.*all in Epochs"),
        (Epochs(1), Epochs(2), Steps(3), UNSIZED, "cannot be told in steps"),
        (Epochs(2), Steps(200), None, KNOWN, "needs begin < end.*which are steps 200 and 200 of this training; lower"),
        (0.5, Epochs(4), None, KNOWN, r"begin=0\.5, end=Epochs\(n=4\), which are steps 500 and 400"),
        (Epochs(0.2), Epochs(0.9), None, UNSIZED, "which are epochs 1 and 1 of this training"),
        (
            Epochs(0),
            Epochs(11),
            None,
            KNOWN,
            r"end at Epochs\(n=11\), after 1100 steps, but training lasts 1000; lower",
        ),
        (Steps(0), Steps(1001), None, KNOWN, "after 1001 steps, but training lasts 1000"),
    ],
)
def test_windows_that_are_none(begin: Any, end: Any, every: Any, length: Length, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window(begin, end, every, length)


def test_positions() -> None:
    assert position_of("end", Steps(7), UNSIZED) == 7
    assert position_of("end", Epochs(0), UNSIZED) == 0
    assert position_of("end", 0.0, UNSIZED) == 0
    assert position_of("end", Epochs(1.5), KNOWN) == 150
    assert position_of("end", 0.3337, KNOWN) == 334


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf])
def test_counts_are_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=f"Epochs needs a finite n >= 0, got n={value}"):
        Epochs(value)
    with pytest.raises(ValueError, match=f"Steps needs a whole n >= 0, got n={value}"):
        Steps(value)


def test_steps_are_whole_and_epochs_need_not_be() -> None:
    assert Epochs(0.5).n == 0.5
    with pytest.raises(ValueError, match=r"whole n >= 0, got n=0\.5"):
        Steps(0.5)


@pytest.mark.parametrize("share", [-0.01, 1.01, 75, math.nan, math.inf])
def test_shares_lie_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ValueError, match=rf"begin is a share of training in \[0, 1\], .*got begin={share}"):
        check_moment("begin", share)
    with pytest.raises(ValueError, match="got end="):
        check_moment("end", share)


@pytest.mark.parametrize("moment", [0.0, 0, 1, 1.0, Epochs(1000), Steps(0)])
def test_moments_of_all_kinds(moment: Moment) -> None:
    check_moment("begin", moment)


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (Epochs(1), Epochs(2)), (Steps(1), Steps(2))])
def test_order_is_checked_within_a_kind(low: Moment, high: Moment) -> None:
    check_order(low, high)
    for begin, end in ((high, low), (low, low)):
        with pytest.raises(ValueError, match=r"needs begin < end, got begin=.*; lower begin or raise end"):
            check_order(begin, end)


def test_order_of_different_kinds_is_known_only_in_a_training() -> None:
    check_order(Epochs(30), 0.5)
    check_order(Epochs(30), Steps(5))
    check_order(1, Steps(1))


def test_updates_are_due_at_begin_every_so_often_and_at_end() -> None:
    progress = [Window(begin=3, end=10, every=3).progress(position) for position in range(13)]
    assert progress == [None] * 3 + [0.0] * 3 + [3 / 7] * 3 + [6 / 7] + [1.0] * 3


def test_an_interval_longer_than_the_window() -> None:
    assert [Window(2, 5, 99).progress(position) for position in range(7)] == [None, None, 0.0, 0.0, 0.0, 1.0, 1.0]


@given(begin=st.integers(0, 50), length=st.integers(1, 200), every=st.integers(1, 300))
def test_progress_rises_from_nothing_to_exactly_one(begin: int, length: int, every: int) -> None:
    placed = Window(begin, begin + length, every)
    seen = [placed.progress(position) for position in range(begin, begin + length + 5)]
    assert seen[0] == 0.0
    assert seen[length - 1 :][1:] == [1.0] * 5
    shares = [share for share in seen if share is not None]
    assert len(shares) == len(seen)
    assert shares == sorted(shares)
    assert all(share < 1.0 for share in shares[:length])
    assert len(set(shares)) == math.ceil(length / every) + 1  # one at each multiple of `every`, one at the end
    assert all(placed.progress(position) is None for position in range(begin))


MOMENTS = st.one_of(
    st.floats(0, 1),
    st.builds(Epochs, st.integers(0, 12) | st.floats(0, 12)),
    st.builds(Steps, st.integers(0, 130)),
)


@given(begin=MOMENTS, end=MOMENTS, every=st.none() | MOMENTS, epochs=st.integers(1, 10), per_epoch=st.integers(1, 12))
def test_a_window_ends_within_training_or_is_refused(
    begin: Moment, end: Moment, every: Moment | None, epochs: int, per_epoch: int
) -> None:
    length = Length(epochs * per_epoch, per_epoch)
    try:
        check_order(begin, end)
        placed = window(begin, end, every, length)
    except ValueError as error:
        assert "begin < end" in str(error) or "training lasts" in str(error)  # noqa: PT017
        return
    assert 0 <= placed.begin < placed.end <= epochs * per_epoch
    assert placed.every >= 1
    assert placed.progress(epochs * per_epoch) == 1.0
