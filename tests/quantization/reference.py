"""Quantisation in NumPy, written from the formulas, with one float32 rounding per operation."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
F = np.float32


def parameters(low: float, high: float, bits: int, scheme: str) -> tuple[np.float32, np.float32]:
    """Scale and zero point of one range."""
    least, greatest = F(min(low, 0.0)), F(max(high, 0.0))
    with np.errstate(divide="ignore", over="ignore"):
        if scheme == "asymmetric":
            scale = F(2**bits - 1) / (greatest - least)
        else:
            scale = F((2**bits - 1) / 2) / max(-least, greatest)
    if not np.isfinite(scale):
        scale = F(1)
    zero_point = np.rint(scale * least) if scheme == "asymmetric" else F(0)
    return scale, F(zero_point)


def integers(x: Array, scale: np.float32, zero_point: np.float32, bits: int, scheme: str) -> Array:
    low, high = (0, 2**bits - 1) if scheme == "asymmetric" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert x.dtype == F
    return np.clip(np.rint(scale * x - zero_point), F(low), F(high)).astype(np.int32)


def real(q: Array, scale: np.float32, zero_point: np.float32) -> Array:
    return (q.astype(F) + zero_point) / scale


def error(x: Array, low: float, high: float, bits: int, scheme: str) -> float:
    """Sum of squares."""
    scale, zero_point = parameters(low, high, bits, scheme)
    difference = real(integers(x, scale, zero_point, bits, scheme), scale, zero_point) - x
    return float((difference.astype(np.float64) ** 2).sum())
