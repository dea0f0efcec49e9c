"""Compressed sparse rows through torch.sparse: for zeros anywhere."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.kernels.matrix import MatrixKernel
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.workload import Workload


class CSR(MatrixKernel):
    """The weight as compressed sparse rows: a value and a column index for each nonzero."""

    @property
    def name(self) -> str:
        """`csr`."""
        return "csr"

    def compress(self, matrix: Tensor) -> Tensor:
        """Nonzeros, row by row."""
        return matrix.to_sparse_csr()

    def stored(self, work: Workload, left: Occupancy) -> Tensor:
        """The nonzeros."""
        return left.density
