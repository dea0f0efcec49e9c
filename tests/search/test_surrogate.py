import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from lightning_prune.search import surrogate as module
from lightning_prune.search.surrogate import CAP, Surrogate, probability_below, resolved, scale_of

TARGET = math.asinh(1.0)


def law(errors: np.ndarray, coefficients: np.ndarray, power: float = 1.5, amount: float = 3.0) -> np.ndarray:
    """Resolved drops of a network that follows the law."""
    return np.asarray(np.arcsinh(amount * (errors @ coefficients) ** power))


def example(count: int = 40, items: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    errors = rng.random((count, items)) ** 2
    coefficients = np.array([0.3, 1.0, 2.0, 0.7])[:items]
    return errors, np.minimum(law(errors, coefficients), CAP), coefficients


def test_drops_are_resolved_around_the_threshold_and_cut_where_they_are_hopeless() -> None:
    values = resolved([-0.01, 0.0, 0.01, 0.2, 0.9, np.nan, np.inf, -np.inf], 0.01)
    expected = [-math.asinh(1), 0.0, math.asinh(1), CAP, CAP, CAP, CAP, CAP]
    assert values == pytest.approx(expected)


def test_the_scale_is_the_threshold_or_a_small_drop_that_was_seen() -> None:
    assert scale_of([0.5, 0.0], 0.01) == 0.01
    assert scale_of([0.0, 0.4, -0.2, np.nan, 0.8, np.inf, 0.6], 0.0) == pytest.approx(0.35)
    assert scale_of([0.0, np.nan], 0.0) == 1.0


def test_a_normal_distribution_agrees_with_scipy() -> None:
    values = np.concatenate([np.linspace(-9, 9, 1001), [-50.0, 50.0]])
    assert probability_below(values) == pytest.approx(norm.cdf(values), abs=1e-7)
    assert (probability_below(values[values < -5]) >= 0).all()


def test_slopes_of_the_law_are_its_derivatives() -> None:
    rng = np.random.default_rng(0)
    theta, sums = rng.normal(0, 0.5, 5), rng.random((7, 3))
    _, slopes = module._law(theta, sums)
    for place in range(5):
        step = np.zeros(5)
        step[place] = 1e-6
        above, below = module._law(theta + step, sums)[0], module._law(theta - step, sums)[0]
        assert slopes[:, place] == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-8)


def test_the_posterior_is_that_of_the_textbook() -> None:
    errors, values, _ = example(25)
    found = Surrogate.fit((0, 1, 2, 2), errors, values, TARGET)
    new = example(9, seed=1)[0]

    # Written again, with inverses and loops: the linearised law has a Gaussian prior around theta = 0.
    def features(row: np.ndarray) -> np.ndarray:
        turning = math.exp(-found.theta[0] / math.exp(found.theta[1])) * found.unit
        return np.sqrt(row * np.exp(found.theta[2:])[[0, 1, 2, 2]] / turning)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        distance = math.sqrt(5) * float(np.linalg.norm(features(a) - features(b))) / found.length
        shape = (1 + distance + distance**2 / 3) * math.exp(-distance)
        spreads = np.array([5.0, 0.5, 1.0, 1.0, 1.0])
        linear = float((slope(a) * spreads**2) @ slope(b))
        return found.amplitude**2 * shape + linear

    def slope(row: np.ndarray) -> np.ndarray:
        sums = np.array([[row[0], row[1], row[2] + row[3]]]) / found.unit
        return np.asarray(module._law(found.theta, sums)[1][0])

    def prior(row: np.ndarray) -> float:
        return float(found.law(row[None])[0] - slope(row) @ found.theta)

    covariance = np.array([[kernel(a, b) for b in errors] for a in errors]) + found.noise**2 * np.eye(25)
    # Drops beyond the cap would be cut; there are none among those foreseen here.
    assert (found.law(errors) < CAP).all()
    left = values - np.array([prior(row) for row in errors])
    cross = np.array([[kernel(a, b) for b in errors] for a in new])
    expected = np.array([prior(row) for row in new]) + cross @ np.linalg.inv(covariance) @ left
    variance = [kernel(row, row) for row in new] - np.einsum("ij,jk,ik->i", cross, np.linalg.inv(covariance), cross)
    mean, spread = found(new)
    assert mean == pytest.approx(expected, abs=1e-6)
    assert spread == pytest.approx(np.sqrt(variance + found.noise**2), abs=1e-6)


def test_coefficients_are_found() -> None:
    errors, values, truth = example(60)
    found = Surrogate.fit((0, 1, 2, 3), errors, values, TARGET)
    ratio = found.coefficients / truth
    assert ratio / np.exp(np.log(ratio).mean()) == pytest.approx(np.ones(4), rel=0.1)
    new, wanted, _ = example(200, seed=5)
    assert np.abs(found(new)[0] - wanted).max() < 0.2


def test_what_the_law_cannot_say_the_process_learns() -> None:
    rng = np.random.default_rng(3)
    errors = rng.random((90, 2)) * 0.5

    def strange(rows: np.ndarray) -> np.ndarray:
        return np.asarray(law(rows, np.ones(2)) + 0.5 * np.sin(4 * np.sqrt(rows[:, 0])))

    found = Surrogate.fit((0, 1), errors[:60], strange(errors[:60]), TARGET)
    mean, spread = found(errors[60:])
    wanted = strange(errors[60:])
    assert np.sqrt(np.mean((mean - wanted) ** 2)) < 0.5 * np.sqrt(np.mean((found.law(errors[60:]) - wanted) ** 2))
    assert np.mean(np.abs(mean - wanted) < 3 * spread) > 0.9


def test_noise_is_told_from_signal() -> None:
    errors, values, _ = example(80)
    noisy = values + np.random.default_rng(1).normal(0, 0.4, len(values))
    assert Surrogate.fit((0, 1, 2, 3), errors, values, TARGET).noise == min(module._NOISES)
    assert Surrogate.fit((0, 1, 2, 3), errors, noisy, TARGET).noise == pytest.approx(0.3)


def test_with_nothing_but_a_dense_network_more_error_is_worse() -> None:
    found = Surrogate.fit((0, 1), np.zeros((1, 2)), np.zeros(1), TARGET)
    mean, spread = found(np.array([[0.0, 0.0], [0.1, 0.0], [0.1, 0.5], [1.0, 1.0]]))
    assert (np.diff(mean) >= 0).all()
    assert mean[-1] > mean[0]
    assert spread[-1] > spread[0]
    assert np.isfinite(spread).all()


@given(kind=st.sampled_from(["zero", "equal", "one", "huge", "tiny"]), count=st.integers(1, 12))
def test_degenerate_errors_give_finite_beliefs(kind: str, count: int) -> None:
    rng = np.random.default_rng(count)
    errors = {
        "zero": np.zeros((count, 3)),
        "equal": np.full((count, 3), 0.3),
        "one": np.eye(3)[rng.integers(0, 3, count)],
        "huge": 1e12 * rng.random((count, 3)),
        "tiny": 1e-12 * rng.random((count, 3)),
    }[kind]
    found = Surrogate.fit((0, 1, 1), errors, resolved(rng.normal(0.01, 0.02, count), 0.01), TARGET)
    mean, spread = found(np.vstack([errors, np.zeros((1, 3)), np.ones((1, 3))]))
    assert np.isfinite(mean).all()
    assert (spread > 0).all()
    assert np.isfinite(found.draw(rng, 5)).all()


def test_hopeless_plans_foreseen_as_such_do_not_bend_the_law() -> None:
    errors, values, _ = example(40)
    far = 300.0 * np.random.default_rng(2).random((30, 4))
    both = Surrogate.fit((0, 1, 2, 3), np.vstack([errors, far]), np.append(values, np.full(30, CAP)), TARGET)
    alone = Surrogate.fit((0, 1, 2, 3), errors, values, TARGET)
    new = example(50, seed=9)[0]
    assert both.law(new) == pytest.approx(alone.law(new), abs=0.05)


def test_draws_lie_around_the_likeliest_coefficients_and_narrow_with_what_was_seen() -> None:
    errors, values, _ = example(60)
    rng = np.random.default_rng(0)
    few, many = (Surrogate.fit((0, 1, 2, 3), errors[:n], values[:n], TARGET) for n in (3, 60))
    wide, narrow = (
        np.log(each.draw(rng, 500)) - np.log(each.draw(rng, 500)).mean(axis=1, keepdims=True) for each in (few, many)
    )
    assert narrow.std(axis=0).max() < wide.std(axis=0).max()
    centred = np.log(many.draw(rng, 2000))
    assert centred.mean(axis=0) == pytest.approx(np.log(many.coefficients), abs=0.1)


def test_of_many_plans_those_nearest_to_the_threshold_count() -> None:
    errors, values, _ = example(300)
    found = Surrogate.fit((0, 1, 2, 3), errors, values, TARGET)
    kept = np.sort(np.abs(values - TARGET))[:100]
    assert len(found.points) == 100
    seen = {tuple(row) for row in found.points}
    assert {tuple(row) for row, value in zip(errors, values, strict=True) if abs(value - TARGET) <= kept[-1]} == seen


def test_more_points_may_be_taken_in_without_learning_anew() -> None:
    errors, values, _ = example(40)
    first = Surrogate.fit((0, 1, 2, 3), errors[:30], values[:30], TARGET)
    later = Surrogate.fit((0, 1, 2, 3), errors, values, TARGET, like=first)
    assert (later.theta == first.theta).all()
    assert (later.length, later.amplitude, later.noise) == (first.length, first.amplitude, first.noise)
    assert (later(errors[30:])[1] < first(errors[30:])[1]).all()
    assert np.abs(later(errors[30:])[0] - values[30:]).max() <= np.abs(first(errors[30:])[0] - values[30:]).max()
