"""Block compressed sparse rows through torch.sparse: for zeros in square blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.granularities import Block
from lightning_prune.kernels.matrix import MatrixKernel
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.workload import Workload


class BSR(MatrixKernel):
    """The weight as compressed rows of dense square blocks, `size` outputs by `size` inputs.

    Args:
        size: side of a block; MKL, which multiplies on the CPU, knows square ones alone.

    Raises:
        ValueError: the side is below 2.
    """

    def __init__(self, size: int) -> None:
        if size < 2:
            raise ValueError(f"BSR needs blocks of at least 2 x 2, got size={size!r}; single weights are CSR()")
        self.size = size
        self.granularity = Block(size, size)

    @property
    def name(self) -> str:
        """`bsr-4` for blocks of 4 x 4."""
        return f"bsr-{self.size}"

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Also weights that the blocks do not divide."""
        if work.outputs % self.size or work.inputs % self.size:
            return f"blocks of {self.size} x {self.size} do not divide {work.outputs} outputs by {work.inputs} inputs"
        return super().refuses(work, dtype, device)

    def compress(self, matrix: Tensor) -> Tensor:
        """Blocks with any nonzero, row by row."""
        return matrix.to_sparse_bsr((self.size, self.size))

    def stored(self, work: Workload, left: Occupancy) -> Tensor:
        """The blocks with any nonzero."""
        return left.blocks(self.size, self.size)
