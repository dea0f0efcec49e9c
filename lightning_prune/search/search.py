"""The search: the cheapest network whose accuracy drops by no more than a threshold, found, recovered and executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.granularities import Granularity
from lightning_prune.latency import DeviceProfile, LatencyEstimator
from lightning_prune.latency.machine import Machine
from lightning_prune.layers import layer_table
from lightning_prune.plan import SparsityPlan
from lightning_prune.preparation import inference_copy, placement
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.search.candidates import Candidates, Repair
from lightning_prune.search.claims import accuracy_of, cost_of
from lightning_prune.search.execution import counted, executed
from lightning_prune.search.layer_space import layer_rows, layer_space
from lightning_prune.search.library import Library
from lightning_prune.search.objectives import Objective, objective_of
from lightning_prune.search.phases import Phases
from lightning_prune.search.proof import Confirmation, Counted, Proof, front_point, known
from lightning_prune.search.quantized import Quantization, QuantizedSearch, quantization_of
from lightning_prune.search.result import SearchResult
from lightning_prune.search.scan import require_weights_alone
from lightning_prune.search.schemes import LEVELS, entries_of
from lightning_prune.search.sensitivity import bar
from lightning_prune.search.space import Candidate

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

__all__ = ["search_sparsity"]


def search_sparsity(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    accuracy: Callable[[nn.Module], float],
    *,
    max_drop: float | None = 0.01,
    metric: str = "accuracy",
    mode: Literal["max", "min"] = "max",
    profile: DeviceProfile | str | Path | None = None,
    objective: str | Objective = "latency",
    scheme: str | Granularity | Sequence[Granularity] = "unstructured",
    levels: Sequence[float] = LEVELS,
    names: str | Sequence[str] | None = None,
    criterion: Criterion = Magnitude(),  # noqa: B008  frozen
    n_trials: int = 60,
    timeout: float | None = None,
    sampler: BaseSampler | None = None,
    seed: int = 0,
    storage: str | Path | BaseStorage | None = None,
    study_name: str | None = None,
    chance: float | None = None,
    repair: Repair = "layerwise",
    quantize: str | QuantizationSettings | Quantization | None = None,
    tune: Callable[[nn.Module, SparsityPlan], None] | None = None,
    recover: Callable[[nn.Module, SparsityPlan], nn.Module] | None = None,
    confirm: Callable[[nn.Module], float] | None = None,
    confirmations: int = 3,
    on_trial: Callable[[Study, FrozenTrial], None] | None = None,
    phases: Phases | None = None,
    progress: bool = False,
) -> SearchResult:
    """Find the fastest sparse version of a network that is accurate enough, and execute it.

    minimise  cost(plan)   subject to   dense accuracy - accuracy(plan) <= max_drop

    In two phases, as Condensa has them: how far the network can go at all, then the least cost inside of that. Optuna
    proposes a budget and a coefficient per group of layers; an allocator turns them into the plan with the least
    weighted output error within the budget. A plan whose estimated cost is not below the best feasible one's is never
    evaluated. What is evaluated has been repaired: kept weights by least squares, layer by layer and level by level
    before the search begins, BatchNorm by new statistics. The winner is recovered, confirmed and executed; where
    recovery made it worse, the repaired network is the result.

    Args:
        model: dense and trained; it is not changed.
        example_inputs: as for `layer_table`; latencies are for its batch size.
        batches: calibration inputs (of training data, without labels), read several times.
        accuracy: the metric of a network on validation data; every call counts as an evaluation.
        max_drop: how much the metric may lose, absolute; 0 allows no loss at all. None searches for the front of cost
            and metric instead: the result has the plans in `front`, and the dense network, as nobody has chosen yet.
        metric: its name.
        mode: "max" where higher is better, "min" where lower is.
        profile: of this machine, or the path of one; objectives of latency need it. With that of an analytic machine
            nothing is executed.
        objective: a name of `OBJECTIVES`, or an `Objective`.
        scheme: patterns of zeros: "unstructured", "block", "nm", "filter", "mixed", or granularities.
        levels: shares removed that a layer may have.
        names: weights or patterns that may be pruned; all linear and 2-D convolution weights by default.
        criterion: which weights go first; one that looks at weights alone.
        n_trials: evaluations of all workers together, the dense network's included; confirming a plan takes up to two
            more, and one the dense network.
        timeout: seconds after which no further trial begins.
        sampler: of Optuna; by default our own.
        seed: of the default sampler.
        storage: where Optuna keeps the study: an URL, a path of an SQLite file, or a storage; in memory by default.
        study_name: of a study that several workers share, or that is resumed.
        chance: what a network that knows nothing reaches; a dense network that is no better is refused.
        repair: of candidates: "layerwise", by what each layer would need had it the inputs that it has in the dense
            network, once for all; or "sequential", on the inputs that it gets, by `reconstruct`, for each anew.
        quantize: a name of `QUANTIZATIONS`, or settings: the threshold is then for the accuracy of the candidates'
            quantised twins, calibrated on `batches` after repair, against that of the dense network in floating point.
            With "mixed", each layer is either quantised and dense or in floating point with zeros, whichever is
            chosen for it; otherwise all are quantised, and where an exact kernel is faster than one in integers,
            what is executed rounds less than what was measured. The profile must know the kernels in integers
            (`calibrate(..., kernels=ALL_KERNELS)`) for latencies to count them.
        tune: fine-tunes a candidate, in place, before it is evaluated; its zeros must stay. The winner is recovered
            from where that ends.
        recover: fine-tunes the winner and returns it; its zeros must stay. Networks come without gradients
            (`requires_grad`) and in eval mode.
        confirm: the metric on all validation data, for the winner and the dense network; `accuracy` by default.
        confirmations: how many feasible plans of the study are recovered and confirmed at most, the cheapest first:
            the next one's turn comes where the drop of the last turned out to be too large. Where none holds, the
            nearest of them is the result, and it says so; `details["confirmations"]` has each.
        on_trial: is called with study and trial after each; the trial is not to be changed.
        phases: is told what happens.
        progress: whether to show progress bars.

    Returns:
        What was found. Where nothing was feasible it says so, and carries the plan that came nearest.

    Raises:
        KeyboardInterrupt: Ctrl-C; finished trials are kept in the storage, and the same call goes on from there.
        ConnectionError: the storage cannot be reached.
        ValueError: an argument is none, the dense metric is not finite or no better than chance, a study of this name
            is about something else, the profile is of another machine, or recovery brought removed weights back.

    Source: Joseph et al., "A Programmable Approach to Neural Network Compression" (Condensa, 2020), section 4; Frantar
    & Alistarh, "SPDY" (2022).
    """
    from lightning_prune.search.ranking import feasible_trials
    from lightning_prune.search.storages import open_storage
    from lightning_prune.search.study import front, minimise

    require_settings(max_drop, metric, mode, n_trials, timeout, confirmations)
    if repair not in get_args(Repair):
        raise ValueError(f"repair is 'layerwise' or 'sequential', got {repair!r}")
    require_weights_alone(criterion)
    quantization = None if quantize is None else quantization_of(quantize)
    phases = phases or Phases()
    network = inference_copy(model)
    table = layer_table(network, example_inputs)
    goal = objective_of(objective, table[0].input_shape[0])
    choices = entries_of(network, table, scheme, levels, names)
    estimator = None if profile is None else LatencyEstimator(table, _loaded(profile, network))
    quantizer = None
    if quantization is not None:
        quantizer = QuantizedSearch(quantization, network, table, goal, choices, estimator)
        choices = quantizer.choices
    costs = goal.costs(table, layer_rows(table, choices), estimator) if quantizer is None else quantizer.costs
    opened = open_storage(storage)

    with phases.phase("dense", f"Measuring {metric} of the dense network"):
        dense = float(accuracy(inference_copy(model)))
    _require_trained(dense, chance, metric, mode)
    width = len(next(iter(choices.values()))) - (1 if quantizer is None else 2)
    with (
        phases.phase("repair", f"Repairing {len(choices)} layers at {width} levels each"),
        bar(progress, "Repairing layers", len(choices)) as advance,
    ):
        library = Library(network, choices, batches, criterion, progress=lambda name: advance(1))
    errors = library.errors
    if quantizer is not None:
        with phases.phase("quantization", f"Quantising the dense network: {quantizer.quantization.name}"):
            errors = quantizer.errors(errors, library.names, batches)
    space = layer_space(table, choices, library.names, errors, costs)
    candidates = Candidates(network, space, library, batches, repair, tune, quantizer)

    def measured(found: Candidate) -> float:
        return accuracy(candidates.deployed(candidates.repaired(found.choices), found.choices))

    options: dict[str, Any] = {
        "metric": metric,
        "mode": mode,
        "dense_accuracy": dense,
        "n_trials": n_trials,
        "timeout": timeout,
        "sampler": sampler,
        "seed": seed,
        "storage": opened,
        "study_name": study_name,
        "objective": goal.name,
        "candidates": candidates.made,
        "progress": progress,
        "on_trial": on_trial,
    }
    within = f"the front of {goal.name} and {metric}"
    if max_drop is not None:
        within = f"the least {goal.name} with at most {max_drop:g} less {metric}"
    with phases.phase("search", f"Searching for {within}"):
        if max_drop is None:
            outcome = front(space, measured, **options)
        else:
            outcome = minimise(space, measured, max_drop=max_drop, **options)
    if outcome.interrupted:
        raise KeyboardInterrupt
    result = replace(
        SearchResult.of_nothing(metric, mode, math.inf if max_drop is None else max_drop, dense),
        evaluations=outcome.evaluations,
        objective=goal.name,
        unit=goal.unit,
        dense_cost=space.dense_cost,
        quantization="" if quantizer is None else quantizer.quantization.name,
        model=network,
        details={
            "study": outcome.study.study_name,
            "stopped": outcome.stopped,
            "seconds": phases.seconds,
            "candidates": candidates.made or "layerwise repair",
        },
    )
    if max_drop is None:
        result = replace(result, details={**result.details, "front": [front_point(trial) for trial in outcome.front]})
    if max_drop is None or (outcome.best is None and outcome.nearest is None):
        return executed(counted(result, table, network), estimator, example_inputs)
    trials = feasible_trials(outcome.study.get_trials(deepcopy=False), max_drop)[:confirmations]
    if outcome.nearest is not None:
        trials = [outcome.nearest]
    confirmation = Confirmation(
        candidates, recover, Counted(confirm or accuracy), metric, mode, max_drop, phases, None if confirm else dense
    )
    proof, twin, result = _proven(result, candidates, confirmation, trials)
    with phases.phase("execution", "Running the winner with its kernels"):
        found = counted(result, table, proof.network)
        if twin is None or quantizer is None:
            return executed(found, estimator, example_inputs)
        estimate_s = quantizer.estimated_s(dict(zip(library.names, proof.choices, strict=True)))
        return executed(found, estimator, example_inputs, twin, estimate_s)


def _proven(
    result: SearchResult, candidates: Candidates, confirmation: Confirmation, trials: Sequence[FrozenTrial]
) -> tuple[Proof, nn.Module | None, SearchResult]:
    """The first plan that holds on all validation data, its quantised twin, and the result with both."""
    proof, proofs = confirmation.first(trials)
    twin, quantized = None, dict[str, Any]()
    if candidates.quantizer is not None:
        twin = candidates.deployed(proof.network, proof.choices)
        quantized = candidates.quantizer.confirmed(proof.network, twin, confirmation.measure)
    result = replace(
        result,
        **quantized,
        feasible=proof.drop <= confirmation.max_drop,
        plan=candidates.space.plan(proof.choices),
        accuracy=proof.accuracy,
        dense_accuracy=proof.dense,
        search_accuracy=known(accuracy_of(proof.trial)),
        evaluations=result.evaluations + confirmation.measure.calls,
        cost=cost_of(proof.trial),
        model=proof.network,
        details={
            **result.details,
            "recovered": proof.recovered,
            "confirmations": proofs,
            "trial": proof.trial.number,
        },
    )
    return proof, twin, result


def require_settings(
    max_drop: float | None, metric: str, mode: str, n_trials: int, timeout: float | None, confirmations: int = 1
) -> None:
    """Refuse, before any work, what no search can be asked for.

    Raises:
        ValueError: the message names the setting.
    """
    if isinstance(max_drop, bool) or (max_drop is not None and not (max_drop >= 0 and math.isfinite(max_drop))):
        raise ValueError(
            f"max_drop is how much {metric} may lose, absolute and at least 0 (no loss at all), got {max_drop!r}"
        )
    if mode not in ("max", "min"):
        raise ValueError(f"mode is 'max' where a higher {metric} is better, 'min' where a lower is, got {mode!r}")
    if isinstance(n_trials, bool) or not isinstance(n_trials, int) or n_trials < 2:
        raise ValueError(f"the dense network is the first evaluation, so n_trials is at least 2, got {n_trials!r}")
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is in seconds, at least 0, or None for no limit, got {timeout!r}")
    if isinstance(confirmations, bool) or not isinstance(confirmations, int) or confirmations < 1:
        raise ValueError(f"confirmations is how many plans may be confirmed, at least 1, got {confirmations!r}")


def _loaded(profile: DeviceProfile | str | Path, network: nn.Module) -> DeviceProfile:
    found = profile if isinstance(profile, DeviceProfile) else DeviceProfile.load(profile)
    if found.machine.kind != "analytic":
        found.require(Machine.here(*placement(network)))
    return found


def _require_trained(dense: float, chance: float | None, metric: str, mode: str) -> None:
    if not math.isfinite(dense):
        raise ValueError(f"{metric} of the dense network is {dense}; look at its validation data and its weights")
    if chance is not None and (dense <= chance if mode == "max" else dense >= chance):
        raise ValueError(
            f"{metric} of the dense network is {dense:.4g}, no better than chance ({chance:.4g}): train it first, or "
            "give the checkpoint of the trained network (--ckpt_path)"
        )
