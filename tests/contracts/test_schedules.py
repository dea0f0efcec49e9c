"""What every schedule promises."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import AGP, Cosine, Iterative, Linear, OneCycle, OneShot, schedules
from lightning_prune.schedules import Schedule
from tests.contracts.tables import SCHEDULES, defined


def test_table_is_complete() -> None:
    assert {type(schedule) for schedule in SCHEDULES} == defined(schedules, Schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
class TestEvery:
    def test_ends_exactly(self, schedule: Schedule) -> None:
        assert schedule(1.0) == 1.0

    @given(a=st.floats(0, 1), b=st.floats(0, 1))
    def test_rises_within_bounds(self, schedule: Schedule, a: float, b: float) -> None:
        low, high = sorted((a, b))
        assert 0.0 <= schedule(low) <= schedule(high) <= 1.0

    @pytest.mark.parametrize("progress", [-0.1, 1.0001, math.nan, math.inf])
    def test_refuses_what_is_no_share(self, schedule: Schedule, progress: float) -> None:
        with pytest.raises(ValueError, match=r"progress in \[0, 1\]"):
            schedule(progress)

    def test_is_frozen(self, schedule: Schedule) -> None:
        with pytest.raises((AttributeError, TypeError)):
            schedule.anything = 1  # type: ignore[attr-defined]

    def test_stepwise_means_staircase(self, schedule: Schedule) -> None:
        values = {schedule(i / 1000) for i in range(1001)}
        assert (len(values) < 20) == schedule.stepwise


def test_agp_is_the_papers_formula() -> None:
    # Zhu & Gupta: s_t = s_f + (s_i - s_f) (1 - (t - t0) / span)^3, here from 5 % to 87 % over steps 100 to 300.
    s_i, s_f, t0, span = 0.05, 0.87, 100, 200
    for t in (100, 150, 237, 300):
        papers = s_f + (s_i - s_f) * (1 - (t - t0) / span) ** 3
        assert s_i + (s_f - s_i) * AGP()((t - t0) / span) == pytest.approx(papers, abs=1e-12)


def test_one_cycle_is_the_papers_formula() -> None:
    for p in (0.0, 0.2, 0.5, 0.9):
        assert OneCycle()(p) == pytest.approx((1 + math.exp(-14 + 6)) / (1 + math.exp(-14 * p + 6)), rel=1e-12)


def test_golden_values() -> None:
    assert OneShot()(0.0) == 1.0
    assert Linear()(0.25) == 0.25
    assert Cosine()(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert [Iterative(5)(p) for p in (0.0, 0.01, 0.2, 3 / 5, 0.61, 0.99)] == [0.0, 0.0, 0.2, 0.6, 0.6, 0.8]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AGP(0), "power=0"),
        (lambda: AGP(math.nan), "power=nan"),
        (lambda: Iterative(0), "steps=0"),
        (lambda: OneCycle(-1), "steepness=-1"),
    ],
)
def test_bad_settings_are_named(build, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()
