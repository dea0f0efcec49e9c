"""Fitted cost: a sum of physical terms, and what measurements say beside it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.granularities import Granularity
from lightning_prune.kernels import LayerKernel, Occupancy, Workload, expected_occupancy
from lightning_prune.kernels.kernel import family
from lightning_prune.latency.gaussian_process import GaussianProcess, Scales, tuned_scales
from lightning_prune.latency.measurement import Measurement

Array = NDArray[np.float64]

_FEWEST = 8
"""Measurements of a family below which its terms are not told apart by what they leave unexplained."""


@dataclass(frozen=True)
class FamilyFit:
    """What was fitted for the layers that a kernel runs alike.

    Args:
        coefficients: seconds per unit of each feature, all >= 0.
        scales: of the Gaussian process over the logarithm of what the sum leaves; None with few measurements.
    """

    coefficients: Mapping[str, float]
    scales: Scales | None

    def __post_init__(self) -> None:
        """Refuse what no fit gives."""
        if not all(0 <= value < math.inf for value in self.coefficients.values()):
            raise ValueError(f"coefficients are finite and not negative, got {dict(self.coefficients)}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        scales = None if self.scales is None else self.scales.as_dict()
        return {"coefficients": dict(self.coefficients), "scales": scales}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FamilyFit:
        """The inverse of `as_dict`."""
        scales = data["scales"]
        return cls(
            {str(name): float(value) for name, value in data["coefficients"].items()},
            None
            if scales is None
            else Scales(tuple(map(float, scales["lengths"])), float(scales["amplitude"]), float(scales["noise"])),
        )


class FittedCost:
    """Estimates the time of a kernel from measurements of it.

        seconds = sum_j c_j f_j(shape, left) * exp(g(x)) * exp(h(x)),   c_j >= 0

    `f_j` are the kernel's features; `g` is the posterior mean of a Gaussian process over the kernel's coordinates
    `x`, given all measurements of its family; `h` passes through the measurements of this very shape.

    Args:
        kernel: whose time it is.
        fits: per family of layers.
        measurements: of this kernel.
    """

    def __init__(self, kernel: LayerKernel, fits: Mapping[str, FamilyFit], measurements: Iterable[Measurement]) -> None:
        self.kernel, self.fits = kernel, dict(fits)
        measurements = tuple(measurements)
        self.by_family = _by_family(measurements)
        self.by_work: dict[Workload, list[Measurement]] = defaultdict(list)
        for measurement in measurements:
            self.by_work[measurement.work].append(measurement)
        self._processes: dict[str, GaussianProcess | None] = {}

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.name

    @property
    def layout(self) -> str:
        """The kernel's."""
        return self.kernel.layout

    @property
    def uses_sparsity(self) -> bool:
        """As the kernel says."""
        return self.kernel.uses_sparsity

    def serves(self, granularity: Granularity) -> bool:
        """As the kernel says."""
        return self.kernel.serves(granularity)

    def knows(self, work: Workload) -> bool:
        """Whether anything like this layer was measured."""
        return family(work) in self.fits

    def seconds(self, work: Workload, left: Occupancy, source: str | None = None) -> Tensor:
        """Estimated seconds of a layer call, of the shape of `left.density`; infinite where a feature is.

        Args:
            work: the call.
            left: of the weight.
            source: measurements from there count before others of the same shape.

        Raises:
            KeyError: no layer of the family was measured.
        """
        fit = self.fits[family(work)]
        shape = left.density.shape
        named = self.kernel.features(work, left)
        features = columns(named, left)
        coefficients = np.array([fit.coefficients.get(name, 0.0) for name in named])
        x = columns(self.kernel.coordinates(work, left), left)
        possible = np.asarray(np.isfinite(features).all(axis=1))
        base = np.maximum(np.where(possible[:, None], features, 0.0) @ coefficients, 1e-9)
        logarithm = np.log(base) + self._explained(family(work), x)
        own = self._own(work, source)
        if own:
            logarithm = logarithm + _through(*self._residuals(work, own, fit), x)
        return torch.from_numpy(np.where(possible, np.exp(logarithm), np.inf)).reshape(shape)

    def _own(self, work: Workload, source: str | None) -> list[Measurement]:
        own = self.by_work.get(work, [])
        return [m for m in own if m.source == source] or own

    def _residuals(self, work: Workload, own: Sequence[Measurement], fit: FamilyFit) -> tuple[Array, Array]:
        """Coordinates of this shape's measurements, and what they leave to explain."""
        base, x, seconds = terms(self.kernel, own, fit.coefficients)
        return x, np.log(seconds) - np.log(base) - self._explained(family(work), x)

    def _explained(self, name: str, x: Array) -> Array:
        process = self._process(name)
        return np.zeros(len(x)) if process is None else process(x)

    def _process(self, name: str) -> GaussianProcess | None:
        if name not in self._processes:
            fit = self.fits[name]
            process = None
            if fit.scales is not None:
                base, x, seconds = terms(self.kernel, self.by_family[name], fit.coefficients)
                process = GaussianProcess(x, np.log(seconds) - np.log(base), fit.scales)
            self._processes[name] = process
        return self._processes[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; measurements are kept apart."""
        return {"type": "fitted", "families": {name: fit.as_dict() for name, fit in self.fits.items()}}


def fitted_cost(kernel: LayerKernel, measurements: Sequence[Measurement]) -> FittedCost:
    """Fit a kernel's cost: coefficients by non-negative least squares on relative errors, then the scales."""
    return FittedCost(
        kernel, {name: _fit(kernel, group) for name, group in _by_family(measurements).items()}, measurements
    )


@dataclass(frozen=True)
class HeldOutError:
    """Relative errors on shapes that took no part in the fit.

    Args:
        shapes: how many there were.
        mape: mean absolute relative error.
        within_10: share of the estimates within 10 %.
    """

    shapes: int
    mape: float
    within_10: float


def held_out_errors(kernel: LayerKernel, measurements: Sequence[Measurement], folds: int = 5) -> Array:
    """Relative error of every measurement, estimated from those of other shapes.

    Shapes are dealt into folds; each fold is estimated from a fit to the rest. Families with fewer shapes than folds
    are left out.

    Returns:
        `estimate / measured - 1`, in the order of the measurements that could be held out.
    """
    errors: list[float] = []
    for group in _by_family(measurements).values():
        shapes = sorted({m.work for m in group}, key=str)
        if len(shapes) < folds:
            continue
        fold = dict(zip(shapes, np.random.default_rng(0).permutation(len(shapes)) % folds, strict=True))
        for held in range(folds):
            rest = [m for m in group if fold[m.work] != held]
            cost = FittedCost(kernel, {family(rest[0].work): _fit(kernel, rest)}, rest)
            for work in (work for work in shapes if fold[work] == held):
                own = [m for m in group if m.work == work]
                estimates = cost.seconds(work, stacked(kernel, own))
                errors += (estimates.numpy() / [m.seconds for m in own] - 1.0).tolist()
    return np.array(errors)


def summary(errors: Array, shapes: int) -> HeldOutError | None:
    """What is kept of the errors; None if no shape could be held out."""
    if not len(errors):
        return None
    return HeldOutError(shapes, float(np.abs(errors).mean()), float((np.abs(errors) <= 0.1).mean()))


def stacked(kernel: LayerKernel, measurements: Sequence[Measurement]) -> Occupancy:
    """What was left in several measurements of one shape, as tensors `[measurements]`."""
    return expected_occupancy(
        kernel.granularity,
        torch.tensor([m.sparsity for m in measurements], dtype=torch.float64),
        measurements[0].work.weight_shape,
        torch.tensor([m.living for m in measurements], dtype=torch.float64),
    )


def terms(
    kernel: LayerKernel, measurements: Sequence[Measurement], coefficients: Mapping[str, float] | None = None
) -> tuple[Array, Array, Array]:
    """Sum of the features (or all of them, without coefficients), coordinates and seconds of measurements."""
    features, coordinates, seconds = [], [], []
    by_work: dict[Workload, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        by_work[measurement.work].append(measurement)
    for work, group in by_work.items():
        left = stacked(kernel, group)
        named = kernel.features(work, left)
        values = columns(named, left)
        if coefficients is not None:
            values = values @ np.array([coefficients.get(name, 0.0) for name in named])
        features.append(values)
        coordinates.append(columns(kernel.coordinates(work, left), left))
        seconds += [m.seconds for m in group]
    together = np.concatenate(features)
    if coefficients is not None:
        together = np.maximum(together, 1e-9)
    return together, np.concatenate(coordinates), np.array(seconds)


def _by_family(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        groups[family(measurement.work)].append(measurement)
    return groups


def _fit(kernel: LayerKernel, group: Sequence[Measurement]) -> FamilyFit:
    from scipy.optimize import nnls  # takes a while, and only those who calibrate need it

    features, x, seconds = terms(kernel, group)
    size = features.max(axis=0)
    size[size == 0] = 1.0
    found, _ = nnls((features / size) / seconds[:, None], np.ones(len(seconds)), maxiter=100 * features.shape[1])
    left = stacked(kernel, group[:1])
    coefficients = dict(zip(kernel.features(group[0].work, left), (found / size).tolist(), strict=True))
    base = np.maximum(features @ (found / size), 1e-9)
    enough = len({m.work for m in group}) >= _FEWEST
    return FamilyFit(coefficients, tuned_scales(x, np.log(seconds) - np.log(base)) if enough else None)


def columns(named: Mapping[str, Tensor | float], left: Occupancy) -> Array:
    """`[points, names]`."""
    stacked_values = [
        torch.as_tensor(value, dtype=torch.float64).expand(left.density.shape) for value in named.values()
    ]
    return torch.stack([column.flatten() for column in stacked_values], dim=1).numpy()


def _through(points: Array, values: Array, x: Array) -> Array:
    """A function that passes through values at points, and goes back to their mean an octave or two away."""
    distinct, index = np.unique(points.round(6), axis=0, return_inverse=True)
    means = np.bincount(index.ravel(), weights=values) / np.bincount(index.ravel())
    scales = Scales((2.0,) * points.shape[1], 1.0, 1e-9)
    return np.asarray(means.mean() + GaussianProcess(distinct, means - means.mean(), scales)(x))
