"""The network that a search found, counted and executed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_prune import targets
from lightning_prune.granularities import Unstructured
from lightning_prune.kernels import ALL_KERNELS
from lightning_prune.latency import LatencyEstimator
from lightning_prune.layers import LayerTable
from lightning_prune.runtime import accelerate
from lightning_prune.search.result import SearchResult
from lightning_prune.search.winner import layer_details


def counted(result: SearchResult, table: LayerTable, network: nn.Module) -> SearchResult:
    """The result with what is left of the network: weights and multiply-accumulates."""
    own = targets.parameters(network)
    planned = [own[name] for name in result.plan]
    total = sum(weight.numel() for weight in planned)
    zeros = sum(int((weight == 0).sum()) for weight in planned)
    return replace(
        result,
        sparsity=zeros / total if total else 0.0,
        nonzeros=table.nonzeros(result.plan),
        params=table.total_params,
        macs=table.macs(result.plan),
        dense_macs=table.total_macs,
    )


def executed(
    result: SearchResult,
    estimator: LatencyEstimator | None,
    example_inputs: Any,
    twin: nn.Module | None = None,
    latency_s: float = math.nan,
) -> SearchResult:
    """The result with its latencies: estimated under the plan, and measured where the profile is of this machine.

    Args:
        result: with its model.
        estimator: of the latency; without one there is nothing to add but the layers.
        example_inputs: as for `accelerate`.
        twin: of the model, quantised, which is executed in its place.
        latency_s: estimate for the twin.
    """
    network, plan = result.model, result.plan
    if network is None:
        return result
    if estimator is None:
        return replace(result, details={**result.details, "layers": layer_details(network)})
    shares = torch.tensor([plan.get(spec.name, 0.0) for spec in estimator.table], dtype=torch.float64)
    patterns = [
        (plan.granularity(spec.name) if spec.name in plan else None) or Unstructured() for spec in estimator.table
    ]
    result = replace(
        result,
        latency_s=float(estimator.latency_s(shares, patterns)) if twin is None else latency_s,
        dense_latency_s=estimator.dense_latency_s,
    )
    machine = estimator.profile.machine
    details = {**result.details, "device": machine.device, "threads": machine.threads, "dtype": machine.dtype}
    details["network_calibrated"] = "yes" if estimator.fixed_is_measured else "no"
    if machine.kind == "analytic" or not (len(plan) or result.bits):  # there is nothing to prove
        return replace(result, details={**details, "layers": layer_details(network)})
    run = network if twin is None else twin
    report = accelerate(run, example_inputs, estimator.profile, kernels=ALL_KERNELS).kernel_report()
    details |= {"layout": report.layout, "relative_error": report.relative_error}
    return replace(
        result,
        measured_latency_s=report.measured_s,
        dense_measured_latency_s=report.dense_s,
        kernels={layer.layer: layer.kernel for layer in report.layers},
        details={**details, "layers": layer_details(network, report)},
    )
