"""Latency: measured on the machine at hand, fitted, and estimated for any plan."""

from lightning_prune.latency.calibration import calibrate
from lightning_prune.latency.estimator import LatencyEstimator
from lightning_prune.latency.profile import DeviceProfile

__all__ = ["DeviceProfile", "LatencyEstimator", "calibrate"]
