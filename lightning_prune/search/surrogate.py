"""What a search believes about plans that it has not evaluated: a law with few numbers, and a process for the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CAP = math.asinh(20.0)
"""Drops beyond 20 thresholds are all the same: hopeless."""

_FLOOR = 1e-6
_SPREAD = {"amount": 5.0, "power": 0.5, "coefficient": 1.0}
_ASSUMED_NOISE = 0.3
_LENGTHS = (0.5, 1.0, 2.0)
_AMPLITUDES = (0.05, 0.2, 0.6)
_NOISES = (0.05, 0.12, 0.3, 0.7)
_MOST = 100
_TUNED_ON = 60
_ITERATIONS = 12


def resolved(drops: npt.ArrayLike, scale: float) -> Floats:
    """Drops on the scale of the surrogate: `asinh(drop / scale)`, at most `CAP`; so is what is not finite.

    >>> resolved([0.0, 0.01, float("nan")], scale=0.01).round(3).tolist()
    [0.0, 0.881, 3.69]
    """
    values = np.asarray(drops, dtype=np.float64)
    return np.asarray(np.arcsinh(np.clip(np.where(np.isfinite(values), values / scale, np.inf), -20.0, 20.0)))


def scale_of(drops: npt.ArrayLike, max_drop: float) -> float:
    """The drop that counts as one: the threshold, or where that is 0 a small one among those seen."""
    values = np.abs(np.asarray(drops, dtype=np.float64))
    seen = values[np.isfinite(values) & (values > 0.0)]
    if max_drop > 0.0:
        return max_drop
    return float(np.quantile(seen, 0.25)) if len(seen) else 1.0


@dataclass(frozen=True, eq=False)
class Surrogate:
    """How the drop of accuracy follows from the errors of the layers.

        t = asinh(a V^p) + g,   V = sum_l c[l] e[l],   t = asinh(drop / scale)

    Errors of layers add up with coefficients c, one per group: layers matter differently. How the sum becomes a drop
    has two numbers, a and p. They and the coefficients have lognormal priors, around equal coefficients. What that law
    leaves is a Gaussian process g with a Matern 5/2 kernel over `sqrt(c[l] e[l] / V')`, V' being the sum at which
    a V'^p = 1; its length, amplitude and noise are those of a small grid under which the drops are most likely. The
    law's own uncertainty is carried along, linearised.

    Args:
        groups: of each item, 0 to groups - 1, `[items]`.
        theta: log a, log p and log c, `[2 + groups]`.
        unit: by which sums of errors are divided.
        points: errors of the plans seen, `[n, items]`.
        weights: of the process' posterior mean, `[n]`.
        root: the lower Cholesky factor of the covariance of what was seen, `[n, n]`.
        length: of the kernel.
        amplitude: its standard deviation.
        noise: standard deviation of one value, in units of t.
    """

    groups: npt.NDArray[np.int64]
    theta: Floats
    unit: float
    points: Floats
    weights: Floats
    root: Floats
    length: float
    amplitude: float
    noise: float

    @classmethod
    def fit(
        cls, groups: Sequence[int], errors: Floats, values: Floats, target: float, like: Surrogate | None = None
    ) -> Surrogate:
        """Learn from plans that were evaluated.

        Args:
            groups: of each item.
            errors: of their choices, finite, at least 0, `[n, items]`, n at least 1.
            values: their drops, as `resolved` returns them, `[n]`.
            target: the resolved threshold: of more than a hundred plans the hundred nearest to it count.
            like: whose law, length, amplitude and noise are taken over; all are found if None.
        """
        nearest = np.sort(np.argsort(np.abs(values - target), kind="stable")[:_MOST])
        errors, values = errors[nearest], values[nearest]
        owner = np.asarray(groups, dtype=np.int64)
        if like is not None:
            grid = ((like.length,), (like.amplitude,), (like.noise,))
            return replace(like, points=errors)._tuned(values, *grid)
        sums = errors.sum(axis=1)
        unit = float(sums[np.abs(values - target).argmin()]) or float(sums.max()) or 1.0
        theta = _fitted(_grouped(errors, owner) / unit, values)
        start = cls(owner, theta, unit, errors, values, values[:, None], 1.0, 1.0, 1.0)
        order = np.argsort(np.abs(values - target), kind="stable")[:_TUNED_ON]
        tuned = replace(start, points=errors[order])._tuned(values[order], _LENGTHS, _AMPLITUDES, _NOISES)
        if len(order) == len(values):
            return tuned
        return replace(tuned, points=errors)._tuned(values, (tuned.length,), (tuned.amplitude,), (tuned.noise,))

    @property
    def coefficients(self) -> Floats:
        """The likeliest, up to a factor, `[groups]`."""
        return np.asarray(np.exp(self.theta[2:]))

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """Coefficients that are believable after what was seen, `[count, groups]`."""
        slopes = self._law(self.points)[1]
        precision = slopes.T @ slopes / (self.noise**2 + self.amplitude**2) + np.diag(_precision(self.theta))
        factor = np.linalg.cholesky(precision)
        steps = np.linalg.solve(factor.T, rng.standard_normal((len(self.theta), count))).T
        return np.asarray(np.exp(self.theta[2:] + np.clip(steps[:, 2:], -3.0, 3.0)))

    def law(self, errors: Floats) -> Floats:
        """The resolved drop by the law alone, `[n, items]` -> `[n]`: fast."""
        return self._law(errors)[0]

    def __call__(self, errors: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of resolved drops as they would be measured, `[n, items]` -> `[n]` each."""
        mean, slopes = self._law(errors)
        variances = 1.0 / _precision(self.theta)
        cross = (slopes * variances) @ self._law(self.points)[1].T
        cross += self.amplitude**2 * _matern(self._features(errors), self._features(self.points), self.length)
        explained = np.linalg.solve(self.root, cross.T)
        prior = self.amplitude**2 + (slopes**2) @ variances
        variance = np.maximum(prior - (explained**2).sum(axis=0), 0.0) + self.noise**2
        # The law was linearised around its fit; its prior mean is theta = 0.
        return mean - slopes @ self.theta + cross @ self.weights, np.sqrt(variance)

    def _law(self, errors: Floats) -> tuple[Floats, Floats]:
        return _law(self.theta, _grouped(errors, self.groups) / self.unit)

    def _features(self, errors: Floats) -> Floats:
        turning = math.exp(np.clip(-self.theta[0] / math.exp(self.theta[1]), -30.0, 30.0)) * self.unit
        return np.sqrt(errors * self.coefficients[self.groups] / turning)

    def _tuned(
        self, values: Floats, lengths: Sequence[float], amplitudes: Sequence[float], noises: Sequence[float]
    ) -> Surrogate:
        mean, slopes = self._law(self.points)
        left = values - np.minimum(mean, CAP) + slopes @ self.theta
        base = (slopes / _precision(self.theta)) @ slopes.T
        features, count = self._features(self.points), len(values)
        kernels = {length: _matern(features, features, length) for length in lengths}
        best, found = -math.inf, self
        for length, amplitude in itertools.product(lengths, amplitudes):
            # A Cholesky factor whose last row is of the values whitens them on the way.
            whole = np.zeros((len(noises), count + 1, count + 1))
            whole[:, :count, :count] = base + amplitude**2 * kernels[length]
            whole[:, range(count), range(count)] += np.square(noises)[:, None]
            whole[:, count, :count] = left
            whole[:, count, count] = 1.0 + left @ left / np.square(noises)
            roots = np.linalg.cholesky(whole)
            white, diagonal = roots[:, count, :count], np.diagonal(roots, axis1=1, axis2=2)[:, :count]
            score = -0.5 * (white**2).sum(axis=1) - np.log(diagonal).sum(axis=1)
            top = int(score.argmax())
            if score[top] > best:
                best, root = float(score[top]), np.asarray(roots[top, :count, :count], dtype=np.float64)
                weights = np.linalg.solve(root.T, white[top])
                found = replace(self, weights=weights, root=root, length=length, amplitude=amplitude, noise=noises[top])
        return found


def _grouped(errors: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    member = np.zeros((errors.shape[1], int(groups.max()) + 1))
    member[np.arange(len(groups)), groups] = 1.0
    return np.asarray(errors @ member)


def _law(theta: Floats, sums: Floats) -> tuple[Floats, Floats]:
    """Resolved drops, `[n]`, and their slopes by theta, `[n, 2 + groups]`."""
    power, scaled = math.exp(theta[1]), sums * np.exp(theta[2:])
    total = scaled.sum(axis=1) + _FLOOR
    amount = np.exp(np.clip(theta[0] + power * np.log(total), -40.0, 40.0))
    slope = amount / np.sqrt(1.0 + amount**2)
    by_coefficient = (slope * power / total)[:, None] * scaled
    slopes = np.column_stack([slope, slope * power * np.log(total), by_coefficient])
    return np.arcsinh(amount), slopes


def _precision(theta: Floats) -> Floats:
    spreads = [_SPREAD["amount"], _SPREAD["power"], *[_SPREAD["coefficient"]] * (len(theta) - 2)]
    return 1.0 / np.square(spreads)


def _fitted(sums: Floats, values: Floats) -> Floats:
    """The likeliest theta, by damped Gauss-Newton steps."""
    theta = np.zeros(2 + sums.shape[1])
    precision = np.diag(_precision(theta))
    damping, last = 1e-2, _loss(theta, sums, values)
    for _ in range(_ITERATIONS):
        left, slopes = _residual(theta, sums, values)
        gradient = slopes.T @ left / _ASSUMED_NOISE**2 - precision @ theta
        curvature = slopes.T @ slopes / _ASSUMED_NOISE**2 + precision
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
        trial = theta + np.clip(step, -2.0, 2.0)
        loss = _loss(trial, sums, values)
        if loss < last:
            settled = last - loss < 1e-4
            theta, last, damping = trial, loss, damping / 4
            if settled:
                break
        else:
            damping *= 8
    return theta


def _residual(theta: Floats, sums: Floats, values: Floats) -> tuple[Floats, Floats]:
    mean, slopes = _law(theta, sums)
    left = values - mean
    # What is hopeless is so by any amount.
    beyond = (values >= CAP - 1e-9) & (mean >= CAP)
    return np.where(beyond, 0.0, left), np.where(beyond[:, None], 0.0, slopes)


def _loss(theta: Floats, sums: Floats, values: Floats) -> float:
    left, _ = _residual(theta, sums, values)
    return float(left @ left) / _ASSUMED_NOISE**2 / 2 + float(_precision(theta) @ theta**2) / 2


def _matern(a: Floats, b: Floats, length: float) -> Floats:
    """`(1 + r + r^2 / 3) exp(-r)`, r = sqrt(5) |a - b| / length, `[n, d]`, `[m, d]` -> `[n, m]`."""
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
    squared = np.maximum(squared, 0.0) * (5.0 / length**2)
    root = np.sqrt(squared)
    return np.asarray((1.0 + root + squared / 3.0) * np.exp(-root))


def probability_below(standard: Floats) -> Floats:
    """The share of a standard normal distribution below a value, within 1e-7.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.2.17.

    >>> probability_below(np.array([-1.0, 0.0, 2.0])).round(4).tolist()
    [0.1587, 0.5, 0.9772]
    """
    x = np.minimum(np.abs(standard), 38.0)
    t = 1.0 / (1.0 + 0.2316419 * x)
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) * series
    return np.asarray(np.where(standard < 0, upper, 1.0 - upper))
