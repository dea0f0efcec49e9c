"""Analytic cost: what a machine could do at its peak rates, for hardware that is not at hand."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.granularities import NM, Block, Filter, Granularity, Unstructured
from lightning_prune.kernels import Occupancy, Workload

PATTERNS: dict[str, Granularity] = {
    "unstructured": Unstructured(),
    "block4": Block(4, 4),
    "block16": Block(16, 16),
    "2:4": NM(2, 4),
    "filter": Filter(),
}
"""The patterns of zeros that an analytic kernel may make use of."""


@dataclass(frozen=True)
class RooflineCost:
    """The slower of computing and moving data, and an overhead.

        seconds = overhead_s + max(macs / (efficiency * macs_per_s), bytes / bandwidth_bytes_per_s)

    where `macs` counts the products that are done and `bytes` the weights as stored, the inputs and the outputs, each
    moved once.

    Args:
        name: of the kernel.
        macs_per_s: peak rate, multiply-accumulates.
        bandwidth_bytes_per_s: of the memory that holds weights and activations.
        overhead_s: of each layer call, such as a launch.
        efficiency: share of the peak rate that is reached, in (0, 1].
        skips: products that are left out: "nothing", or the zeros of a pattern in `PATTERNS`.
        stores: weights in memory: "dense", or "compressed": what is not skipped or, if nothing is, what is not zero,
            each with `index_bits`.
        bits: of a weight and of an activation.
        index_bits: beside each stored weight.

    Raises:
        ValueError: a rate or a word is none of those.

    Source: Williams, Waterman and Patterson, "Roofline" (2009).
    """

    name: str
    macs_per_s: float
    bandwidth_bytes_per_s: float
    overhead_s: float = 0.0
    efficiency: float = 1.0
    skips: str = "nothing"
    stores: str = "dense"
    bits: int = 32
    index_bits: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that are none."""
        for field in ("macs_per_s", "bandwidth_bytes_per_s"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"kernel {self.name!r}: {field} is a positive rate, got {getattr(self, field)!r}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"kernel {self.name!r}: efficiency is a share in (0, 1], got {self.efficiency!r}")
        if not 0 <= self.overhead_s < math.inf or self.bits < 1 or self.index_bits < 0:
            raise ValueError(f"kernel {self.name!r}: overhead_s, bits and index_bits are not negative")
        if self.skips not in ("nothing", *PATTERNS):
            raise ValueError(f"kernel {self.name!r}: skips is 'nothing' or one of {list(PATTERNS)}, got {self.skips!r}")
        if self.stores not in ("dense", "compressed"):
            raise ValueError(f"kernel {self.name!r}: stores is 'dense' or 'compressed', got {self.stores!r}")

    layout = None
    """An analytic machine has one memory layout."""

    @property
    def uses_sparsity(self) -> bool:
        """Whether it leaves out products with zeros."""
        return self.skips != "nothing"

    def refuses(self, work: Workload) -> str | None:
        """Nothing."""
        return None

    def serves(self, granularity: Granularity) -> bool:
        """N:M products need N:M zeros."""
        own = PATTERNS.get(self.skips)
        return not isinstance(own, NM) or granularity == own

    def seconds(self, work: Workload, left: Occupancy) -> Tensor:
        """Estimated seconds of a layer call, of the shape of `left.density`."""
        share = torch.ones_like(left.density) if self.skips == "nothing" else _left_in(self.skips, left)
        stored = torch.ones_like(left.density)
        if self.stores == "compressed":  # what is computed is stored, zeros inside a living block too
            stored = left.density if self.skips == "nothing" else share
        compute_s = share * work.macs / (self.efficiency * self.macs_per_s)
        index_bits = self.index_bits if self.stores == "compressed" else 0.0
        weight_bytes = stored * work.weights * (self.bits + index_bits) / 8
        moved_bytes = weight_bytes + (work.input_elements + work.output_elements) * self.bits / 8
        return self.overhead_s + torch.maximum(compute_s, moved_bytes / self.bandwidth_bytes_per_s)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"type": "roofline", **asdict(self)}


def _left_in(pattern: str, left: Occupancy) -> Tensor:
    granularity = PATTERNS[pattern]
    if isinstance(granularity, Block):
        return left.blocks(granularity.rows, granularity.cols)
    if isinstance(granularity, Filter):
        return left.rows * left.columns
    if isinstance(granularity, NM):
        return torch.where(left.density <= granularity.n / granularity.m, granularity.n / granularity.m, 1.0).double()
    return left.density
