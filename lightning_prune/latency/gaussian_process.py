"""Interpolates what a physical model leaves unexplained: a Gaussian process on few coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TUNED_ON = 300
"""Points on which the scales are tuned; all take part in the prediction."""


@dataclass(frozen=True)
class Scales:
    """What a Matérn 3/2 kernel needs.

        k(x, x') = amplitude (1 + sqrt(3) r) exp(-sqrt(3) r),   r = |(x - x') / lengths|

    Args:
        lengths: per coordinate, over which values stay alike.
        amplitude: variance of the values.
        noise: variance of one measurement.
    """

    lengths: tuple[float, ...]
    amplitude: float
    noise: float

    def covariance(self, a: Array, b: Array) -> Array:
        """`[n, d]`, `[m, d]` -> `[n, m]`."""
        a, b = a / np.asarray(self.lengths), b / np.asarray(self.lengths)
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T
        distance = np.sqrt(3.0 * squared.clip(min=0.0))
        return np.asarray(self.amplitude * (1.0 + distance) * np.exp(-distance))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"lengths": list(self.lengths), "amplitude": self.amplitude, "noise": self.noise}


class GaussianProcess:
    """The posterior mean given values at points; far from all points it returns to 0.

    Args:
        points: `[n, d]`.
        values: `[n]`.
        scales: of the kernel.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), algorithm 2.1.

    >>> scales = Scales((1.0,), 1.0, 1e-6)
    >>> process = GaussianProcess(np.array([[0.0], [1.0]]), np.array([0.5, -0.5]), scales)
    >>> np.round(process(np.array([[0.0], [0.5], [100.0]])), 3) + 0.0
    array([0.5, 0. , 0. ])
    """

    def __init__(self, points: Array, values: Array, scales: Scales) -> None:
        self.points, self.scales = points, scales
        covariance = scales.covariance(points, points)
        covariance[np.diag_indices(len(points))] += scales.noise
        # torch's solvers keep to torch's number of threads; those of SciPy take every core.
        factor = torch.linalg.cholesky(torch.from_numpy(covariance))
        self.weights: Array = torch.cholesky_solve(torch.from_numpy(values)[:, None], factor)[:, 0].numpy()

    def __call__(self, points: Array) -> Array:
        """`[m, d]` -> `[m]`."""
        return np.asarray(self.scales.covariance(points, self.points) @ self.weights)


def tuned_scales(points: Array, values: Array, iterations: int = 30) -> Scales:
    """The scales under which the values are most likely, with mild priors so that few points do not mislead.

    Args:
        points: `[n, d]`.
        values: `[n]`.
        iterations: of L-BFGS.
    """
    from scipy.optimize import minimize  # takes a while, and only those who calibrate need it

    chosen = np.random.default_rng(0).permutation(len(points))[:_TUNED_ON]
    x, y = torch.from_numpy(points[chosen]), torch.from_numpy(values[chosen])
    dims = x.shape[1]
    start = np.r_[np.full(dims, 1.0), math.log(max(float(y.var(correction=0)), 1e-4)), math.log(1e-3)]
    squared = (x.t()[:, :, None] - x.t()[:, None, :]).square()

    def negative_log_likelihood(p: Array) -> tuple[float, Array]:
        inverse = torch.from_numpy(np.exp(-2.0 * p[:dims]))
        amplitude, noise = math.exp(p[dims]), math.exp(p[dims + 1])
        root = torch.tensordot(inverse, squared, dims=1).mul_(3.0).sqrt_()
        decay = torch.exp(-root)
        shape = (1.0 + root).mul_(decay)
        covariance = amplitude * shape
        covariance.diagonal().add_(noise)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            return 1e10, np.zeros_like(p)
        alpha = torch.cholesky_solve(y[:, None], factor)[:, 0]
        # d(-log L)/dK = (K^-1 - alpha alpha^T) / 2
        slope = 0.5 * (torch.cholesky_inverse(factor) - torch.outer(alpha, alpha))
        # d/dlog(length_i) of (1 + r) exp(-r) with r^2 = 3 sum (dx_i / l_i)^2 is 3 exp(-r) (dx_i / l_i)^2
        common = slope * decay * (3.0 * amplitude)
        gradient = np.r_[
            (squared.flatten(1) @ common.flatten() * inverse).numpy(),
            float((slope * shape).sum()) * amplitude,
            float(slope.trace()) * noise,
        ]
        value = 0.5 * float(y @ alpha) + float(factor.diagonal().log().sum())
        drift = p[:dims] - 1.0
        return value + 0.25 * float(drift @ drift), gradient + np.r_[0.5 * drift, 0.0, 0.0]

    bounds = [(-2.0, 5.0)] * dims + [(-9.0, 2.0), (-10.0, -3.0)]
    found = minimize(
        negative_log_likelihood, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": iterations}
    )
    lengths = tuple(float(value) for value in np.exp(found.x[:dims]))
    return Scales(lengths, math.exp(found.x[dims]), math.exp(found.x[dims + 1]))
