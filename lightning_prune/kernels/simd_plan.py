"""How the SIMD kernel cuts up a layer call: the settings with the least estimated work."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_prune.kernels.batch_last import lanes_for
from lightning_prune.kernels.workload import Workload

Array = NDArray[np.float64]

_FIRST_CACHE, _SECOND_CACHE = 24 * 1024, 256 * 1024
"""Bytes of the first two levels of cache that a call may fill."""

_MOST_VECTORS = 14
"""Of a tile, which stay in registers."""

_MOST_NUMBERS = 2 * 65536
"""Of a panel: half an offset has 16 bits."""


@dataclass(frozen=True)
class Settings:
    """How a call is cut up.

    Args:
        lanes: numbers of a vector.
        woven: whether a vector is of several strips (1), or of neighbours in memory (0).
        rows: of a tile of outputs.
        columns: vectors of a tile side by side.
        strips: that an image is cut into, of equally many rows.
        channels: of a block, whose part of the input stays in the first-level cache.
        band: tiles that the panel is filled for at once.
    """

    lanes: int
    woven: int
    rows: int
    columns: int
    strips: int
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


def choose(work: Workload, density: float, living: float, batch_last: bool = False) -> Settings:
    """The settings for a weight.

    Args:
        work: the call.
        density: share of the weights that are left.
        living: share of the input channels that meet any.
        batch_last: whether images lie woven already.

    Raises:
        ValueError: images are too wide for the kernel.

    >>> choose(Workload("linear", 64, 512, 512), density=0.1, living=1.0).woven
    0
    """
    if reason := too_wide(work, batch_last):
        raise ValueError(reason)
    lanes, woven, rows, columns, strips, _ = (column.astype(int) for column in candidates(work, batch_last))
    done, channels, band = estimate(work, np.array([density]), np.array([living]), batch_last)
    best = int(done.cycles[:, 0].argmin())
    return Settings(
        int(lanes[best]),
        int(woven[best]),
        int(rows[best]),
        int(columns[best]),
        int(strips[best]),
        int(channels[best, 0]),
        int(band[best, 0]),
    )


def least(work: Workload, density: Array, living: Array, batch_last: bool = False) -> Work:
    """The work of the best settings for each density, `[densities]`."""
    done, _, _ = estimate(work, density, living, batch_last)
    best = done.cycles.argmin(0)[None]
    parts = (done.compute, done.visits, done.copied, done.written)
    return Work(*(np.take_along_axis(part, best, 0)[0] for part in parts))


def too_wide(work: Workload, batch_last: bool = False) -> str | None:
    """Why the rows under a window do not fit the kernel's panels, or None."""
    return (
        None
        if len(candidates(work, batch_last)[0])
        else f"the SIMD kernels are for narrower images than those of {work}"
    )


@functools.lru_cache(maxsize=4096)
def candidates(work: Workload, batch_last: bool = False) -> tuple[Array, ...]:
    """All settings worth a thought: lanes, woven, rows, columns, strips and bytes for a block."""
    flat = (work.kind == "linear" or work.pointwise) and not batch_last
    height = work.output_size[0]
    wide = _under(work, 1, work.output_size[1])
    found = []
    for lanes in (lanes_for(work.batch, widest()),) if batch_last else (n for n in (16, 8, 4, 1) if n <= widest()):
        tiles = [(0, 1, columns, 1) for columns in range(1, _MOST_VECTORS + 1)] if flat else []
        if work.kind != "linear" and lanes > 1 and _under(work, 0, 1) * wide * lanes + 32 <= _MOST_NUMBERS:
            tiles += [
                (1, rows, columns, strips)
                for strips in ({1} if batch_last else {min(height, n) for n in (1, 2, 4, 8, 16) if n <= lanes})
                for rows in (1, 2)
                if rows == 1 or _under(work, 0, 2) * wide * lanes + 32 <= _MOST_NUMBERS
                for columns in range(1, min(_MOST_VECTORS // rows, work.output_size[1]) + 1)
            ]
        found += [(lanes, *tile, share * _FIRST_CACHE) for tile in tiles for share in (0.5, 1.0, 2.0)]
    return tuple(np.array(found, dtype=np.float64).reshape(-1, 6).T)


def estimate(work: Workload, density: Array, living: Array, batch_last: bool = False) -> tuple[Work, Array, Array]:
    """The work of every candidate, and its channels per block and tiles per band, `[candidates, densities]`."""
    lanes, woven, rows, columns, strips, budget = (column[:, None] for column in candidates(work, batch_last))
    is_woven = woven == 1
    height, width = work.output_size
    positions = float(work.batch if work.kind == "linear" else height * width)
    groups = np.where(is_woven, np.ceil(work.batch * strips / lanes), 1.0 if work.kind == "linear" else work.batch)
    down = np.where(is_woven, np.ceil(height / strips), 1.0)
    across = np.where(is_woven, width, np.ceil(positions / lanes))
    rows, columns = np.minimum(rows, down), np.minimum(columns, across)
    tiles_across, tiles_down = np.ceil(across / columns), np.ceil(down / rows)
    tiles, columns = tiles_across * tiles_down, across / tiles_across
    vectors = across * down

    # What a tile sees of a block of channels has to fit the first cache, a band's panel and sums the second.
    alive = np.maximum(1.0, np.ceil(living[None] * work.inputs))
    pitch = np.where(is_woven, _under(work, 1, width), 0.0) * lanes
    seen = lanes * np.where(is_woven, _under(work, 1, columns) * _under(work, 0, rows), columns)
    room = np.where(is_woven, _under(work, 0, rows) * pitch, columns * lanes) + 32
    channels = np.clip(np.floor(np.minimum(budget / (4 * seen), _MOST_NUMBERS / room)), 1, alive)
    blocks = np.ceil(alive / channels)
    channels = np.ceil(alive / blocks)
    sums = work.outputs * rows * columns * lanes * ((blocks > 1) | (work.kind == "linear"))
    unit = np.where(is_woven, tiles_across, 1.0)  # woven bands are of whole rows of tiles
    step = np.where(is_woven, rows * work.stride[0] * pitch, columns * lanes)
    around = np.where(is_woven, (_under(work, 0, 1) - work.stride[0]) * pitch, 0.0) + 32
    many = (_SECOND_CACHE / 4 - channels * around) / (channels * step + unit * sums)
    many = np.minimum(many, (_MOST_NUMBERS / channels - around) / step)
    many = np.where(
        is_woven, many, np.minimum(many, 2.0)
    )  # flat ones share nothing: the next one is read where it lies
    band = np.minimum(np.maximum(1.0, np.floor(many)) * unit, tiles)
    bands = np.ceil(tiles / band)
    spilled = np.clip(4 * (channels * (around + band / unit * step) + band * sums) / _SECOND_CACHE - 1.5, 0.0, 1.0)

    weights = np.maximum(density[None] * work.weights, 1e-9)
    each = weights / (work.outputs * blocks)
    visits = np.maximum(1.0, blocks * -np.expm1(-each)) * work.outputs
    far = np.clip(4 * seen * channels / _FIRST_CACHE - 1.0, 0.0, 1.0)
    wait = np.maximum(0.0, 0.8 - 0.4 * rows * columns)  # of short tiles, for the sum before
    copied_rows = bands * _under(work, 0, band / unit * rows)
    flat_copy, flat_result = (0.5, 0.9) if work.kind == "linear" else (0.35, 0.13)
    woven_copy = 0.15 if batch_last else 0.45
    copied = np.where(is_woven, copied_rows * (woven_copy * pitch + 8.0), vectors * lanes * flat_copy + 2 * bands)
    # Results of a woven tile are written in pieces, to places that compete in the caches if images are of 4 KB.
    pieces = np.where(columns >= 8, np.ceil(columns / 8), np.where(columns >= 4, np.ceil(columns / 4), 2 * columns))
    apart = 6.9 * (height * width % 1024 == 0) * (work.batch > 1) * (strips == 1)
    woven_result = vectors * 0.92 if batch_last else down * tiles_across * pieces * 1.95 + vectors * (0.92 + apart)
    written = np.where(is_woven, woven_result, vectors * lanes * flat_result)
    return (
        Work(
            groups * weights * (vectors * (0.48 + 0.22 * far) + tiles * (0.6 + wait)),
            groups * visits * (tiles * 8.0 + vectors * (1.0 + 0.7 * spilled)),
            groups * copied * alive,
            groups * work.outputs * written * np.ones_like(weights),
        ),
        channels,
        band,
    )


def _under(work: Workload, dimension: int, extent: Array | float) -> Array:
    """Rows (0) or columns (1) of the input under the windows of so many of the output."""
    reach = (work.window[dimension] - 1) * work.dilation[dimension] + 1
    return np.asarray((extent - 1) * work.stride[dimension] + reach, dtype=np.float64)


def widest() -> int:
    """Lanes of the machine's widest vectors."""
    capability = torch.backends.cpu.get_cpu_capability()
    return 16 if "AVX512" in capability else 8 if "AVX2" in capability else 4
