"""From the plan that a search found to the network that is its result: recovered, confirmed and executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_prune import targets
from lightning_prune.granularities import Unstructured
from lightning_prune.latency import LatencyEstimator
from lightning_prune.layers import LayerTable
from lightning_prune.plan import SparsityPlan
from lightning_prune.preparation import inference_copy
from lightning_prune.runtime import accelerate
from lightning_prune.search.result import SearchResult, drop_of
from lightning_prune.search.winner import layer_details

Measure = Callable[[nn.Module], float]
Recover = Callable[[nn.Module, SparsityPlan], nn.Module]


class Counted:
    """Measures networks, and how often.

    Args:
        measure: the metric of a network.
    """

    def __init__(self, measure: Measure) -> None:
        self._measure, self.calls = measure, 0

    def __call__(self, network: nn.Module) -> float:
        """The metric."""
        self.calls += 1
        return float(self._measure(network))


def recovered(repaired: nn.Module, plan: SparsityPlan, removed: Mapping[str, int], recover: Recover) -> nn.Module:
    """The network after recovery, with all its zeros.

    Args:
        repaired: the network before; it is not changed.
        plan: that it has.
        removed: name -> weights that the plan removes.
        recover: see `search_sparsity`.

    Raises:
        ValueError: recovery gave nothing, or brought removed weights back.
    """
    found = recover(inference_copy(repaired), plan)
    if not isinstance(found, nn.Module):
        raise ValueError(f"recover returns the network that it trained, got {type(found).__name__}")
    network = inference_copy(found)
    zeros = {name: int((weight == 0).sum()) for name, weight in targets.parameters(network).items()}
    for name, count in removed.items():
        if zeros.get(name, 0) < count:
            raise ValueError(
                f"recovery brought removed weights back: {name!r} has {zeros.get(name, 0)} zeros, the plan wants "
                f"{count}; keep them while training, with Pruning(plan, scope='local') among the callbacks"
            )
    return network


def better(
    repaired: nn.Module, trained: nn.Module | None, measure: Measure, dense: float, mode: str
) -> tuple[Any, ...]:
    """The network and its metric: of the repaired and the trained one, the more accurate; the trained one of equals."""
    value = measure(repaired)
    if trained is None:
        return repaired, value
    after = measure(trained)
    lost, kept = drop_of(after, dense, mode, 0.0), drop_of(value, dense, mode, 0.0)
    return (trained, after) if lost <= kept else (repaired, value)


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


def executed(result: SearchResult, estimator: LatencyEstimator | None, example_inputs: Any) -> SearchResult:
    """The result with its latencies: estimated under the plan, and measured where the profile is of this machine.

    Args:
        result: with its model.
        estimator: of the latency; without one there is nothing to add but the layers.
        example_inputs: as for `accelerate`.
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
        latency_s=float(estimator.latency_s(shares, patterns)),
        dense_latency_s=float(estimator.latency_s(torch.zeros_like(shares))),
    )
    machine = estimator.profile.machine
    details = {**result.details, "device": machine.device, "threads": machine.threads, "dtype": machine.dtype}
    if machine.kind == "analytic" or not len(plan):  # there is nothing to prove
        return replace(result, details={**details, "layers": layer_details(network)})
    report = accelerate(network, example_inputs, estimator.profile).kernel_report()
    details |= {"layout": report.layout, "relative_error": report.relative_error}
    return replace(
        result,
        measured_latency_s=report.measured_s,
        dense_measured_latency_s=report.dense_s,
        kernels={layer.layer: layer.kernel for layer in report.layers},
        details={**details, "layers": layer_details(network, report)},
    )


def known(value: float | None) -> float:
    """A number that a trial keeps, where None stands for none."""
    return math.nan if value is None else float(value)
