"""Fitted costs: a Gaussian process over what a sum of physical terms leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from lightning_prune import Unstructured
from lightning_prune.kernels import Dense, Workload, expected_occupancy
from lightning_prune.latency import gaussian_process
from lightning_prune.latency.fitted import FamilyFit, FittedCost, fitted_cost, held_out_errors, stacked, summary
from lightning_prune.latency.gaussian_process import GaussianProcess, Scales, tuned_scales
from lightning_prune.latency.measurement import Measurement
from tests.latency.profiles import Counted

WORKS = tuple(Workload("linear", 4, inputs, outputs) for inputs in (16, 48, 160) for outputs in (8, 32, 64, 200))
SPARSITIES = (0.0, 0.5, 0.9)


def matern(a: list[float], b: list[float], scales: Scales) -> float:
    r = math.sqrt(sum(((x - y) / length) ** 2 for x, y, length in zip(a, b, scales.lengths, strict=True)))
    return scales.amplitude * (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r)


class TestGaussianProcess:
    @settings(max_examples=20)
    @given(seed=st.integers(0, 2**20), dims=st.integers(1, 4), count=st.integers(1, 12))
    def test_equals_the_dense_formula(self, seed: int, dims: int, count: int) -> None:
        random = np.random.default_rng(seed)
        points, asked, values = (
            random.normal(size=(count, dims)),
            random.normal(size=(5, dims)),
            random.normal(size=count),
        )
        scales = Scales(tuple(random.uniform(0.3, 3.0, dims)), float(random.uniform(0.1, 2.0)), 1e-2)
        inner = [
            [matern(a, b, scales) + scales.noise * (i == j) for j, b in enumerate(points)] for i, a in enumerate(points)
        ]
        outer = [[matern(a, b, scales) for b in points] for a in asked]
        expected = np.array(outer) @ np.linalg.inv(np.array(inner)) @ values
        np.testing.assert_allclose(GaussianProcess(points, values, scales)(asked), expected, rtol=1e-6, atol=1e-9)

    def test_tuning_climbs_its_own_slope(self, monkeypatch: pytest.MonkeyPatch) -> None:
        random = np.random.default_rng(0)
        points = random.normal(size=(30, 3))
        values = np.sin(points[:, 0]) + 0.1 * random.normal(size=30)
        asked = []

        def spy(function, start, **options):  # type: ignore[no-untyped-def]
            for place in (start, start + random.uniform(-0.5, 0.5, len(start))):
                numeric = approx_fprime(place, lambda p: function(p)[0], 1e-6)
                asked.append(np.abs(function(place)[1] - numeric).max() / max(1.0, np.abs(numeric).max()))
            return minimize(function, start, **options)

        from scipy import optimize

        minimize = optimize.minimize
        monkeypatch.setattr(optimize, "minimize", spy)
        tuned_scales(points, values)
        assert len(asked) == 2
        assert max(asked) < 1e-4

    def test_tuning_finds_what_matters(self) -> None:
        random = np.random.default_rng(0)
        points = random.uniform(-2, 2, size=(120, 2))
        scales = tuned_scales(points, np.sin(3 * points[:, 0]))
        assert scales.lengths[1] > 5 * scales.lengths[0]
        asked = random.uniform(-1.5, 1.5, size=(50, 2))
        found = GaussianProcess(points, np.sin(3 * points[:, 0]), scales)(asked)
        assert np.abs(found - np.sin(3 * asked[:, 0])).max() < 0.1

    def test_tuning_is_the_same_every_time_and_takes_some_of_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gaussian_process, "_TUNED_ON", 20)
        random = np.random.default_rng(0)
        points, values = random.normal(size=(40, 2)), random.normal(size=40)
        assert tuned_scales(points, values) == tuned_scales(points, values)

    def test_constant_and_single_values(self) -> None:
        for count in (1, 5):
            scales = tuned_scales(np.zeros((count, 2)), np.zeros(count))
            assert all(math.isfinite(x) for x in (*scales.lengths, scales.amplitude, scales.noise))


class TestFittedCost:
    kernel = Counted()

    def estimates(self, cost: FittedCost, work: Workload, sparsities: tuple[float, ...]) -> list[float]:
        left = expected_occupancy(Unstructured(), torch.tensor(sparsities, dtype=torch.float64), work.weight_shape)
        found: list[float] = cost.seconds(work, left).tolist()
        return found

    def test_finds_the_terms(self) -> None:
        cost = fitted_cost(self.kernel, self.kernel.measured(WORKS, SPARSITIES))
        assert cost.fits["linear"].coefficients == pytest.approx(
            {"calls": 3e-6, "macs": 2e-10, "written": 1e-10}, rel=1e-6
        )
        new = Workload("linear", 7, 100, 90)
        truth = [self.kernel.true_s(new, s) for s in (0.1, 0.7)]
        assert self.estimates(cost, new, (0.1, 0.7)) == pytest.approx(truth, rel=1e-3)

    @settings(max_examples=15)
    @given(seed=st.integers(0, 2**20))
    def test_coefficients_are_never_negative(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        noisy = [
            Measurement("counted", m.work, m.sparsity, 1.0, float(random.uniform(1e-6, 1e-4)), 0.0, "x")
            for m in self.kernel.measured(WORKS[:6], SPARSITIES)
        ]
        fit = fitted_cost(self.kernel, noisy).fits["linear"]
        assert set(fit.coefficients) == {"calls", "macs", "written"}
        assert min(fit.coefficients.values()) >= 0

    @pytest.mark.parametrize("count", [3, len(WORKS)])
    def test_passes_through_its_measurements(self, count: int) -> None:
        random = np.random.default_rng(0)
        measured = [
            Measurement("counted", m.work, m.sparsity, 1.0, m.seconds * float(random.uniform(0.7, 1.4)), 0.0, "x")
            for m in self.kernel.measured(WORKS[:count], SPARSITIES)
        ]
        cost = fitted_cost(self.kernel, measured)
        assert (cost.fits["linear"].scales is None) == (count == 3)
        for m in measured:
            assert self.estimates(cost, m.work, (m.sparsity,)) == pytest.approx([m.seconds], rel=1e-4)

    def test_measurements_of_the_network_itself_come_first(self) -> None:
        slow, work = Counted(factor=2.0), WORKS[0]
        measured = [*self.kernel.measured(WORKS, SPARSITIES, "spread"), *slow.measured([work], SPARSITIES, "own")]
        cost = fitted_cost(self.kernel, measured)
        left = expected_occupancy(Unstructured(), torch.tensor([0.5], dtype=torch.float64), work.weight_shape)
        assert float(cost.seconds(work, left, "own")) == pytest.approx(slow.true_s(work, 0.5), rel=1e-4)
        assert float(cost.seconds(work, left, "spread")) == pytest.approx(self.kernel.true_s(work, 0.5), rel=1e-4)
        both = math.sqrt(slow.true_s(work, 0.5) * self.kernel.true_s(work, 0.5))
        assert float(cost.seconds(work, left)) == pytest.approx(both, rel=1e-4)

    def test_keeps_the_shape_of_the_candidates(self) -> None:
        cost = fitted_cost(self.kernel, self.kernel.measured(WORKS, SPARSITIES))
        for shape in ((), (3,), (2, 0), (2, 3, 1)):
            left = expected_occupancy(Unstructured(), torch.zeros(shape), (8, 8))
            assert cost.seconds(Workload("linear", 1, 8, 8), left).shape == shape

    def test_families_have_terms_of_their_own(self) -> None:
        conv = Workload("conv2d", 1, 8, 8, (8, 8), (8, 8), (3, 3), padding=(1, 1))
        measured = [*self.kernel.measured(WORKS, SPARSITIES), *Counted(factor=5.0).measured([conv], SPARSITIES)]
        cost = fitted_cost(self.kernel, measured)
        assert set(cost.fits) == {"linear", "convolution"}
        assert self.estimates(cost, conv, (0.5,)) == pytest.approx([5.0 * self.kernel.true_s(conv, 0.5)], rel=1e-6)
        assert cost.knows(conv)
        assert not cost.knows(Workload("conv2d", 1, 8, 8, (8, 8), (8, 8)))

    @pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
    def test_refuses_coefficients_that_no_fit_gives(self, value: float) -> None:
        with pytest.raises(ValueError, match="finite and not negative"):
            FamilyFit({"calls": value}, None)


class TestHeldOut:
    kernel = Counted()

    def test_only_errors_of_a_shape_know_its_times(self) -> None:
        measured = self.kernel.measured(WORKS, SPARSITIES)
        errors = held_out_errors(self.kernel, measured, folds=len(WORKS))
        assert len(errors) == len(measured)
        assert np.abs(errors).max() < 0.01
        # Every estimate of a shape is made without it: doubling its times halves 1 + error, exactly, there.
        for wrong in (WORKS[0], WORKS[7]):
            spoilt = [
                Measurement(m.kernel, m.work, m.sparsity, 1.0, m.seconds * (2 if m.work == wrong else 1), 0.0, "x")
                for m in measured
            ]
            place = sorted(WORKS, key=str).index(wrong)
            found = held_out_errors(self.kernel, spoilt, folds=len(WORKS)).reshape(len(WORKS), len(SPARSITIES))
            before = errors.reshape(found.shape)
            ratios = (1 + found) / (1 + before)
            halved = [row for row in range(len(WORKS)) if np.allclose(ratios[row], 0.5, rtol=1e-9)]
            assert len(halved) == 1, place

    def test_too_few_shapes_are_left_out(self) -> None:
        few = self.kernel.measured(WORKS[:4], SPARSITIES)
        assert not len(held_out_errors(self.kernel, few, folds=5))
        assert summary(held_out_errors(self.kernel, few, folds=5), 4) is None
        assert len(held_out_errors(self.kernel, few, folds=4)) == len(few)

    def test_summary(self) -> None:
        found = summary(np.array([0.05, -0.2, 0.1, 0.0]), 3)
        assert found is not None
        assert (found.shapes, found.within_10) == (3, 0.75)
        assert found.mape == pytest.approx(0.0875)


class TestMeasurement:
    work = WORKS[0]

    @pytest.mark.parametrize(
        "wrong",
        [
            (-0.1, 1.0, 1.0, 0.0),
            (1.1, 1.0, 1.0, 0.0),
            (math.nan, 1.0, 1.0, 0.0),
            (0.5, 0.0, 1.0, 0.0),
            (0.5, 1.0, 0.0, 0.0),
            (0.5, 1.0, math.nan, 0.0),
            (0.5, 1.0, math.inf, 0.0),
            (0.5, 1.0, 1.0, -0.1),
        ],
    )
    def test_refuses_numbers_that_no_clock_gives(self, wrong: tuple[float, float, float, float]) -> None:
        with pytest.raises(ValueError, match="not a measurement"):
            Measurement("dense", self.work, *wrong, "x")

    def test_says_what_was_left(self) -> None:
        left = stacked(Dense(), [Measurement(Dense().name, self.work, 0.25, 0.5, 1.0, 0.0, "x")])
        assert float(left.density) == 0.375
