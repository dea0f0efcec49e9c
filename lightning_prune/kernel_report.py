"""Which kernel runs each layer of a network, and how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["KernelReport"]


@dataclass(frozen=True)
class LayerReport:
    """How one layer is run.

    Args:
        layer: name of its weight.
        sparsity: share of its weights that are zero.
        kernel: that runs it.
        estimated_s: by the profile; NaN without one.
        measured_s: in the context of a pass.
        dense_s: of the dense layer in the same context.
        pays_from: sparsity from which a sparse kernel beats dense, zeros anywhere; infinite if none does, NaN
            without a profile.
    """

    layer: str
    sparsity: float
    kernel: str
    estimated_s: float
    measured_s: float
    dense_s: float
    pays_from: float


@dataclass(frozen=True)
class KernelReport:
    """How a network is run, layer by layer, and how long it takes.

    Args:
        layers: in execution order.
        layout: of the activations.
        estimated_s: of a whole pass; NaN without a profile.
        measured_s: of a whole pass.
        dense_s: of a whole pass of the dense network, in its faster layout.
        relative_error: greatest difference from the dense network's outputs, relative to their greatest.
    """

    layers: tuple[LayerReport, ...]
    layout: str
    estimated_s: float
    measured_s: float
    dense_s: float
    relative_error: float

    def __str__(self) -> str:
        """A table."""
        rows = [("layer", "sparsity", "kernel", "estimated ms", "measured ms", "dense ms", "pays from")]
        rows += [
            (
                layer.layer,
                f"{layer.sparsity:.3f}",
                layer.kernel,
                _ms(layer.estimated_s),
                _ms(layer.measured_s),
                _ms(layer.dense_s),
                "never"
                if layer.pays_from == math.inf
                else ""
                if math.isnan(layer.pays_from)
                else f"{layer.pays_from:.2f}",
            )
            for layer in self.layers
        ]
        rows.append(("network", "", self.layout, _ms(self.estimated_s), _ms(self.measured_s), _ms(self.dense_s), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds * 1e3:.4g}"
