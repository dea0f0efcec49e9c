"""The kernel report as a table."""

from __future__ import annotations

import math

from lightning_prune.kernel_report import KernelReport, LayerReport

REPORT = KernelReport(
    (
        LayerReport("conv.weight", 0.9, "shrunk", 0.0012, 0.00125, 0.004, 0.35),
        LayerReport("fc.weight", 0.5, "dense", 1e-5, 1.1e-5, 1.1e-5, math.inf),
        LayerReport("head.weight", 0.0, "dense", math.nan, 1e-6, 1e-6, math.nan),
    ),
    "nchw",
    math.nan,
    0.002,
    0.0051,
    1e-6,
)


def test_is_a_table_of_every_layer() -> None:
    assert str(REPORT) == "\n".join(
        [
            "layer        sparsity  kernel  estimated ms  measured ms  dense ms  pays from",
            "conv.weight  0.900     shrunk  1.2           1.25         4         0.35",
            "fc.weight    0.500     dense   0.01          0.011        0.011     never",
            "head.weight  0.000     dense                 0.001        0.001",
            "network                nchw                  2            5.1",
        ]
    )
