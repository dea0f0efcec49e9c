"""The line of whole passes over their layers' time: against a search over lines, and whatever is given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.latency.rest import rest_of

TIMES = st.floats(1e-4, 3.0)


def loss(passes: tuple[tuple[float, float], ...], a: float, b: float) -> float:
    return float(np.mean([abs(a + (1 + b) * t - w) / w for t, w in passes])) + 1e-3 * b


@settings(max_examples=150)
@given(passes=st.lists(st.tuples(st.just(0.0) | TIMES, TIMES), min_size=1, max_size=8).map(tuple))
def test_no_other_line_is_nearer(passes: tuple[tuple[float, float], ...]) -> None:
    a, b = rest_of(passes)
    assert a >= 0
    assert b >= 0
    # A best line passes through two of the points, or through one and is level, or begins at 0.
    lines = [(max(w - t, 0.0), 0.0) for t, w in passes] + [(0.0, max(w / t - 1, 0.0)) for t, w in passes if t > 0]
    for t, w in passes:
        for other, whole in passes:
            if abs(t - other) > 1e-9:
                slope = (w - whole) / (t - other)
                lines.append((max(w - slope * t, 0.0), max(slope - 1, 0.0)))
    assert loss(passes, a, b) <= min(loss(passes, *line) for line in lines) + 1e-6


def test_passes_too_short_to_time_say_nothing() -> None:
    assert rest_of(()) == (0.0, 0.0)
    assert rest_of(((0.0, 0.0), (1e-9, 1e-7))) == (0.0, 0.0)
    assert rest_of(((0.0, 0.0), (1.0, 1.5))) == pytest.approx((0.5, 0.0))


def test_layers_take_at_least_what_they_add_up_to() -> None:
    assert rest_of(((1.0, 0.8), (2.0, 1.7))) == pytest.approx((0.0, 0.0))
