"""The winner of a search layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_prune import targets
from lightning_prune.kernel_report import KernelReport
from lightning_prune.search.result import SearchResult


@dataclass(frozen=True)
class WinnerLayer:
    """One layer of the network that a search found. What is not known is None.

    Args:
        name: of its weight.
        sparsity: share removed by the plan.
        pattern: of the zeros, in words; empty where they may lie anywhere.
        kernel: that runs it.
        params: weights of the dense layer.
        nonzeros: weights that remain.
        estimated_s: of the layer with its kernel.
        measured_s: likewise, executed.
        dense_s: of the dense layer, executed.
    """

    name: str
    sparsity: float = 0.0
    pattern: str = ""
    kernel: str | None = None
    params: int | None = None
    nonzeros: int | None = None
    estimated_s: float | None = None
    measured_s: float | None = None
    dense_s: float | None = None


def layer_details(network: nn.Module, report: KernelReport | None = None) -> list[dict[str, Any]]:
    """What `SearchResult.details["layers"]` keeps of a network, as plain values.

    Args:
        network: whose weights of linear and convolution layers are counted.
        report: of how it was run; its layers come in execution order.

    >>> layer_details(nn.Linear(4, 2))[0]["params"]
    8
    """
    weights = targets.prunable(network)
    rows: dict[str, dict[str, Any]] = {}
    if report is not None:
        rows = {row.layer: {k: v for k, v in asdict(row).items() if k != "layer"} for row in report.layers}
    names = [*rows, *(name for name in weights if name not in rows)]
    found = []
    for name in names:
        count = {}
        if name in weights:
            count = {"params": weights[name].numel(), "nonzeros": int((weights[name] != 0).sum())}
        found.append({"name": name, **count, **rows.get(name, {})})
    return found


def winner_layers(result: SearchResult) -> tuple[WinnerLayer, ...]:
    """The layers of a winner, from its plan, its kernels and `details["layers"]`, as far as these go."""
    details = result.details.get("layers")
    known: dict[str, Mapping[str, Any]] = {}
    if isinstance(details, Sequence):
        known = {str(row["name"]): row for row in details if isinstance(row, Mapping) and "name" in row}
    names = dict.fromkeys([*known, *result.kernels, *result.plan])
    found = []
    for name in names:
        row = known.get(name, {})
        pattern = result.plan.granularity(name) if name in result.plan else None
        found.append(
            WinnerLayer(
                name,
                result.plan.get(name, 0.0),
                "" if pattern is None else str(pattern),
                result.kernels.get(name, row.get("kernel")),
                _number(row.get("params")),
                _number(row.get("nonzeros")),
                _number(row.get("estimated_s")),
                _number(row.get("measured_s")),
                _number(row.get("dense_s")),
            )
        )
    return tuple(found)


def _number(value: Any) -> Any:
    """The value if it is a finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
