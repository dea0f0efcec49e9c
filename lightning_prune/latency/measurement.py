"""One measured time of one layer call by one kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_prune.kernels import LayerKernel, Workload


@dataclass(frozen=True)
class Measurement:
    """The least time of a layer call over several rounds, in the context of a full pass.

    Args:
        kernel: name of the kernel.
        work: the call.
        sparsity: fraction removed, in the pattern that the kernel is made for.
        living: share of the inputs whose weights were not all removed beside that.
        seconds: the least over the rounds.
        scatter: how far the median lies above the least, as a share of it.
        source: digest of the network in whose pass it was timed, or "spread".
    """

    kernel: str
    work: Workload
    sparsity: float
    living: float
    seconds: float
    scatter: float
    source: str

    def __post_init__(self) -> None:
        """Refuse numbers that no clock gives."""
        if not (
            0 < self.seconds < math.inf
            and 0 <= self.sparsity <= 1
            and 0 < self.living <= 1
            and 0 <= self.scatter < math.inf
        ):
            raise ValueError(f"not a measurement: {self!r}")


def telling(kernel: LayerKernel, measurements: Iterable[Measurement]) -> list[Measurement]:
    """The measurements that say something of a kernel: its own, and of one that it amounts to without zeros."""
    return [
        m if m.kernel == kernel.name else replace(m, kernel=kernel.name)
        for m in measurements
        if m.kernel in (kernel.name, kernel.without_zeros)
    ]
