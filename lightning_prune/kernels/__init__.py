"""Executable kernels, one per file: how a layer runs and what its time depends on."""

from lightning_prune.kernels.block_sparse import BSR
from lightning_prune.kernels.csr import CSR
from lightning_prune.kernels.dense import Dense
from lightning_prune.kernels.int8 import Int8
from lightning_prune.kernels.kernel import CHWN, LAYOUTS, NCHW, NHWC, LayerKernel
from lightning_prune.kernels.occupancy import Occupancy, expected_occupancy, measured_occupancy
from lightning_prune.kernels.semi_structured import SemiStructured
from lightning_prune.kernels.shrunk import Shrunk
from lightning_prune.kernels.simd import SIMD
from lightning_prune.kernels.steps import Steps
from lightning_prune.kernels.workload import Workload, workloads

__all__ = [
    "ALL_KERNELS",
    "BSR",
    "CHWN",
    "CSR",
    "KERNELS",
    "LAYOUTS",
    "NCHW",
    "NHWC",
    "QUANTIZED_KERNELS",
    "SIMD",
    "Dense",
    "Int8",
    "LayerKernel",
    "Occupancy",
    "SemiStructured",
    "Shrunk",
    "Steps",
    "Workload",
    "expected_occupancy",
    "measured_occupancy",
    "workloads",
]

KERNELS: tuple[LayerKernel, ...] = (
    Dense(NCHW),
    Dense(NHWC),
    Dense(CHWN),
    SIMD(NCHW),
    SIMD(CHWN),
    CSR(),
    BSR(4),
    BSR(8),
    BSR(16),
    Shrunk(NCHW),
    Shrunk(NHWC),
    SemiStructured(),
)
"""What calibration measures unless told otherwise; those that refuse a layer leave it to the others."""

QUANTIZED_KERNELS: tuple[LayerKernel, ...] = (Int8(NCHW), Int8(NHWC))
"""Those that change results: calibration measures them where it is asked to, and they run quantised twins alone."""

ALL_KERNELS: tuple[LayerKernel, ...] = (*KERNELS, *QUANTIZED_KERNELS)
"""Of which device profiles may hold costs."""
