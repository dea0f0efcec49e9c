"""From the plan that a search found to the network that is its result: recovered, confirmed and executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_prune import targets
from lightning_prune.granularities import Unstructured
from lightning_prune.kernels import ALL_KERNELS
from lightning_prune.latency import LatencyEstimator
from lightning_prune.layers import LayerTable
from lightning_prune.plan import SparsityPlan
from lightning_prune.preparation import inference_copy
from lightning_prune.runtime import accelerate
from lightning_prune.search.result import SearchResult, drop_of
from lightning_prune.search.winner import layer_details

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

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


@dataclass(frozen=True, eq=False)
class Proof:
    """A plan of a study, confirmed.

    Args:
        trial: whose plan it is.
        network: repaired, and recovered where that helped.
        accuracy: of it, on all validation data.
        drop: of that.
        recovered: whether recovery helped.
    """

    trial: FrozenTrial
    network: nn.Module
    accuracy: float
    drop: float
    recovered: bool

    @property
    def said(self) -> dict[str, Any]:
        """What the result keeps of it."""
        cost = float(self.trial.user_attrs["cost"])
        searched = self.trial.user_attrs["accuracy"]
        return {
            "trial": self.trial.number,
            "cost": cost,
            "search_accuracy": searched,
            "accuracy": self.accuracy,
            "drop": self.drop,
            "recovered": self.recovered,
        }


def first_proven(
    trials: Iterable[FrozenTrial], max_drop: float, prove: Callable[[FrozenTrial], Proof]
) -> tuple[Proof, list[dict[str, Any]]]:
    """The first plan that is confirmed to be accurate enough, else the one that comes nearest, and what each came to.

    What the search saw may be luck, of few validation data or of many trials: then the next plan's turn comes.

    Args:
        trials: the cheapest first, at least one.
        max_drop: the threshold.
        prove: recovers and confirms a trial's plan.
    """
    nearest, said = None, []
    for trial in trials:
        found = prove(trial)
        said.append(found.said)
        if nearest is None or found.drop < nearest.drop:
            nearest = found
        if found.drop <= max_drop:
            break
    if nearest is None:
        raise ValueError("there is no trial whose plan could be confirmed")
    return nearest, said


def front_point(trial: FrozenTrial) -> dict[str, Any]:
    """What the result of a search for a front keeps of one of its trials."""
    said = trial.user_attrs
    return {"trial": trial.number, **{name: said[name] for name in ("cost", "accuracy", "drop", "plan")}}


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
        dense_latency_s=float(estimator.latency_s(torch.zeros_like(shares))),
    )
    machine = estimator.profile.machine
    details = {**result.details, "device": machine.device, "threads": machine.threads, "dtype": machine.dtype}
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


def known(value: float | None) -> float:
    """A number that a trial keeps, where None stands for none."""
    return math.nan if value is None else float(value)
