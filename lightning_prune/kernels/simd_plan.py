"""How the SIMD kernel cuts up a layer call: the settings with the least estimated work."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_prune.kernels.workload import Workload

Array = NDArray[np.float64]

_FIRST_CACHE, _SECOND_CACHE = 26 * 1024, 192 * 1024
"""Bytes of the first two levels of cache that a call may fill."""

_MOST_OFFSETS = 65536
"""A panel's elements: offsets have 16 bits."""


@dataclass(frozen=True)
class Settings:
    """How a call is cut up.

    Args:
        lanes: numbers of a vector.
        vectors: of a tile of outputs, which stay in registers.
        copies: 1, the input is copied once and read unaligned; 2, once per column of the window and read aligned.
        strips: that an image is cut into, of equally many rows.
        side: strips or images side by side in a row of the panel.
        channels: of a block, whose part of the input stays in the first-level cache.
        band: tiles that the panel is filled for at once.
    """

    lanes: int
    vectors: int
    copies: int
    strips: int
    side: int
    channels: int
    band: int

    def as_list(self) -> list[int]:
        """In the order in which the library takes them."""
        return list(astuple(self))


@dataclass(frozen=True)
class Work:
    """What a call costs, in cycles of a first guess, for candidates or densities.

    Args:
        compute: multiplying.
        visits: starting and ending a filter in a block of channels.
        copied: filling panels.
        written: results.
    """

    compute: Array
    visits: Array
    copied: Array
    written: Array

    @property
    def cycles(self) -> Array:
        """All of it."""
        return self.compute + self.visits + self.copied + self.written


def choose(work: Workload, density: float, living: float) -> Settings:
    """The settings for a weight.

    Args:
        work: the call.
        density: share of the weights that are left.
        living: share of the input channels that meet any.
    """
    lanes, vectors, copies, strips, side = (column.astype(int) for column in candidates(work))
    done, channels, band = estimate(work, np.array([density]), np.array([living]))
    best = int(done.cycles[:, 0].argmin())
    return Settings(
        int(lanes[best]),
        int(vectors[best]),
        int(copies[best]),
        int(strips[best]),
        int(side[best]),
        int(channels[best, 0]),
        int(band[best, 0]),
    )


def least(work: Workload, density: Array, living: Array) -> Work:
    """The work of the best settings for each density, `[densities]`."""
    done, _, _ = estimate(work, density, living)
    best = done.cycles.argmin(0)[None]
    parts = (done.compute, done.visits, done.copied, done.written)
    return Work(*(np.take_along_axis(part, best, 0)[0] for part in parts))


@functools.lru_cache(maxsize=4096)
def candidates(work: Workload) -> tuple[Array, ...]:
    """Lanes, vectors, copies, strips and images side by side of all settings worth a thought."""
    widest = _widest()
    rows = []
    for lanes in (lanes for lanes in (16, 8, 4, 1) if lanes <= widest):
        for copies in (1, 2) if work.window[1] > 1 else (1,):
            for side in (1, 2, 4, 8):
                together = side <= work.batch and work.kind != "linear"
                cut = work.batch == 1 and work.kind != "linear" and work.output_size[0] >= 4 * side
                if side > 1 and not ((copies == 2 and (together or cut)) or (work.pointwise and together)):
                    continue
                rows += [(lanes, vectors, copies, 1 if together else side, side) for vectors in range(1, 15)]
    return tuple(np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))


def estimate(work: Workload, density: Array, living: Array) -> tuple[Work, Array, Array]:
    """The work of every candidate, and its channels per block and tiles per band, `[candidates, densities]`."""
    lanes, vectors, copies, strips, side = (column[:, None] for column in candidates(work))
    batch, (height, width) = work.batch, work.output_size
    window, stride, dilation = work.window, work.stride, work.dilation
    if work.kind == "linear":
        batch, height, width = 1, 1, work.batch
    elif work.pointwise:
        height, width = 1, height * width
    aligned = copies == 2
    wide, rows = width * side, np.ceil(height / strips)
    reach_x = np.where(aligned, 0, (window[1] - 1) * dilation[1] // stride[1])
    reach_y = (window[0] - 1) * dilation[0] // stride[0]
    pitch = np.where(aligned, np.ceil(wide / lanes) * lanes, wide + reach_x)
    whole = np.ceil(((rows - 1) * pitch + wide) / lanes)
    tiles = np.ceil(whole / np.minimum(vectors, whole))
    largest = np.ceil(whole / tiles)
    tile = largest * lanes
    planes = np.where(aligned, window[1], min(window[1], stride[1])) * min(window[0], stride[0])
    alive = np.maximum(1.0, np.ceil(living[None] * work.inputs))

    # What a tile and the window over it see of a channel has to fit the first cache, a band's panel the second.
    seen = planes * (tile + reach_x + reach_y * np.minimum(pitch, tile + reach_x))
    channels = np.clip(np.floor(_FIRST_CACHE / (4 * seen)), 1, alive)
    around = planes * (reach_y * pitch + reach_x + 2 * lanes + 48)
    room = np.minimum(_SECOND_CACHE / 4, _MOST_OFFSETS) / channels - around
    band = np.clip(np.floor(np.minimum(room / (planes * tile), _SECOND_CACHE / (4 * work.outputs * tile))), 1, tiles)
    channels = np.clip(np.floor(_MOST_OFFSETS / (planes * band * tile + around)), 1, channels)

    weights = np.maximum(density[None] * work.weights, 1e-9)
    blocks = np.ceil(alive / channels)
    each = weights / (work.outputs * blocks)
    visits = np.maximum(1.0, blocks * -np.expm1(-each)) * work.outputs
    load = np.where(aligned | (window[1] == 1), 0.52, 0.72)  # a read that crosses cache lines takes twice as long
    wait = np.where(largest >= 7, 4.0, np.where(largest >= 4, 2.0, 1.0))  # for the sum before
    images = np.ceil(batch * strips / side)
    filled = np.ceil(tiles / band) * (np.ceil(band * tile / pitch) + reach_y) * planes * side
    copied = filled * (12.0 + 2.0 * width / lanes)
    if work.kind == "linear" or work.pointwise:
        copied = whole * (8.0 if work.kind == "linear" else 4.0)
    written = work.outputs * whole * (8.0 if work.kind == "linear" else 5.0)
    return (
        Work(
            images * tiles * weights * np.maximum(wait, load * largest + 0.7),
            images * tiles * visits * (14.0 + 1.2 * largest),
            images * copied * alive,
            images * written * np.ones_like(weights),
        ),
        channels,
        band,
    )


def _widest() -> int:
    """Lanes of the machine's widest vectors."""
    capability = torch.backends.cpu.get_cpu_capability()
    return 16 if "512" in capability else 8 if "AVX" in capability else 4
