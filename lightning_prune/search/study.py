"""The search as a study of Optuna: many workers, any storage, resumed by name, stopped at any time."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_prune.search.claims import Terms
from lightning_prune.search.joining import ATTRIBUTE, facts, joined
from lightning_prune.search.parameters import weight_names
from lightning_prune.search.ranking import best_trial, front_trials, nearest_trial
from lightning_prune.search.space import Candidate, SearchSpace
from lightning_prune.search.storages import open_storage, reason, release, version
from lightning_prune.search.trials import Run, Stopped
from lightning_prune.search.workers import Worker

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

__all__ = ["Outcome", "front", "minimise"]

OnTrial = Callable[["Study", "FrozenTrial"], None]

_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Budgets at which a sampler that knows nothing of thresholds first learns where the accuracy goes."""


@dataclass(frozen=True)
class Outcome:
    """What a study holds when a worker leaves it.

    Args:
        best: the cheapest trial whose accuracy drops by no more than the threshold; None if there is none, and of a
            front.
        nearest: if there is no best, the trial with the smallest drop; None if nothing was evaluated.
        front: trials of which none is both cheaper and more accurate than another, the cheapest first.
        evaluations: made by all workers, the dense network's included.
        stopped: why the worker left: "finished", all evaluations are made; "timeout"; "interrupted", by Ctrl-C;
            "exhausted", the sampler proposes nothing new; "sampler", it stopped the study itself.
        study: of Optuna, with all trials.
    """

    best: FrozenTrial | None
    nearest: FrozenTrial | None
    front: tuple[FrozenTrial, ...]
    evaluations: int
    stopped: Stopped
    study: Study

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.stopped == "interrupted"


def minimise(
    space: SearchSpace,
    accuracy: Callable[[Candidate], float],
    *,
    metric: str,
    mode: Literal["max", "min"],
    max_drop: float,
    dense_accuracy: float,
    n_trials: int,
    timeout: float | None = None,
    sampler: BaseSampler | None = None,
    seed: int = 0,
    storage: str | Path | BaseStorage | None = None,
    study_name: str | None = None,
    objective: str = "cost",
    candidates: str | None = None,
    progress: bool = True,
    on_trial: OnTrial | None = None,
) -> Outcome:
    """Find the cheapest plan whose accuracy drops by no more than a threshold.

    minimise cost(plan)   subject to   drop(plan) <= max_drop,   drop = dense - accuracy, or accuracy - dense for "min"

    A trial has the attributes `worker` and, where a plan meets its budget, `candidate` (`choices` and their estimated
    `cost`). One that is evaluated has `plan` and `outcome` (`accuracy` and `drop`) as well; its value is the cost, its
    constraint "drop" is `drop - max_drop`. A plan whose cost is not below that of the best so far is never evaluated:
    its trial is pruned, and `reason` says why. Nor is one that was evaluated before: it has a `reason`, and that
    trial's outcome.

    Workers that give the same storage and name share one study and its evaluations; no plan is evaluated by two. The
    same call later goes on where the study ended. Trials of workers that were killed are run again: at once where the
    worker was a process of this machine or shared an SQLite file, else, on servers, once its heartbeat is missed. An
    evaluation that ends with Ctrl-C is run again when the study is resumed; what is returned then is what the study
    holds.

    A drop that differs from the threshold by no more than float32 rounds is taken for the threshold. An accuracy that
    is no finite number is that of a network that diverged: it is not feasible, and its trial keeps None.

    Args:
        space: of plans.
        accuracy: measures the network of a candidate.
        metric: name of the accuracy.
        mode: "max" where higher is better, "min" where lower is.
        max_drop: how much may be lost, absolute; 0 allows no loss at all.
        dense_accuracy: of the dense network: the first evaluation. A study that is joined keeps its own.
        n_trials: evaluations of all workers together, the dense network's included.
        timeout: seconds after which this worker begins no further trial.
        sampler: of Optuna; by default our own `ThresholdSampler`. Others first get a few budgets to learn from.
        seed: of the default sampler.
        storage: see `open_storage`; in memory by default.
        study_name: under which it is shared and resumed.
        objective: name of the cost.
        candidates: how they are made of plans, in words; who joins makes them likewise.
        progress: whether to show a progress bar.
        on_trial: is called with study and trial after each; the trial is not to be changed.

    Raises:
        ValueError: an argument is out of its range, the dense accuracy is not finite, nothing can be chosen, or the
            study of this name is about something else; before any work.
        ConnectionError: the storage cannot be reached, before any work, or fails later.

    Source: Joseph et al., "A Programmable Approach to Neural Network Compression" (Condensa, 2020), section 4.
    """
    if isinstance(max_drop, bool) or not (max_drop >= 0 and math.isfinite(max_drop)):
        raise ValueError(f"max_drop is how much {metric} may lose, absolute, finite and at least 0, got {max_drop!r}")
    _require(space, metric, mode, dense_accuracy, n_trials, timeout)
    about = facts(
        space,
        kind="minimise",
        metric=metric,
        mode=mode,
        max_drop=float(max_drop),
        objective=objective,
        dense_accuracy=float(dense_accuracy),
        **({} if candidates is None else {"candidates": candidates}),
    )
    foreign = sampler is not None
    if sampler is None:
        from lightning_prune.search.sampler import ThresholdSampler

        sampler = ThresholdSampler(space, max_drop, seed)
    with _quiet(), _opened(storage) as opened, Worker.present(opened) as worker:
        study = joined(opened, study_name, 1, about, sampler)
        if foreign:
            _introduce(study, space, n_trials)
        dense = float(study.user_attrs[ATTRIBUTE]["dense_accuracy"])
        terms = Terms(n_trials, space.dense_cost, dense, float(max_drop))
        others = _watched(opened, storage)
        run = Run(study, space, accuracy, terms, mode, worker, not foreign, on_trial, others)
        stopped = run.until(timeout, progress, f"Search for the least {objective}")
        trials = study.get_trials(deepcopy=False)
    best = best_trial(trials, float(max_drop))
    nearest = nearest_trial(trials) if best is None else None
    return Outcome(best, nearest, front_trials(trials), run.evaluations(trials), stopped, study)


def front(
    space: SearchSpace,
    accuracy: Callable[[Candidate], float],
    *,
    metric: str,
    mode: Literal["max", "min"],
    dense_accuracy: float,
    n_trials: int,
    timeout: float | None = None,
    sampler: BaseSampler | None = None,
    seed: int = 0,
    storage: str | Path | BaseStorage | None = None,
    study_name: str | None = None,
    objective: str = "cost",
    candidates: str | None = None,
    progress: bool = True,
    on_trial: OnTrial | None = None,
) -> Outcome:
    """Find the plans of which none is both cheaper and more accurate than another.

    minimise (cost(plan), drop(plan))

    As `minimise`, with two objectives and no threshold, so that every new plan is evaluated; by default NSGA-II
    proposes them, after a row of budgets.

    Args:
        space: of plans.
        accuracy: measures the network of a candidate.
        metric: name of the accuracy.
        mode: "max" where higher is better, "min" where lower is.
        dense_accuracy: of the dense network: the first evaluation.
        n_trials: evaluations of all workers together, the dense network's included.
        timeout: seconds after which this worker begins no further trial.
        sampler: of Optuna, for several objectives; NSGA-II by default.
        seed: of the default sampler.
        storage: see `open_storage`; in memory by default.
        study_name: under which it is shared and resumed.
        objective: name of the cost.
        candidates: how they are made of plans, in words; who joins makes them likewise.
        progress: whether to show a progress bar.
        on_trial: is called with study and trial after each; the trial is not to be changed.

    Raises:
        ValueError: as `minimise` does.
        ConnectionError: as `minimise` does.
    """
    from optuna.samplers import NSGAIISampler

    _require(space, metric, mode, dense_accuracy, n_trials, timeout)
    about = facts(
        space,
        kind="front",
        metric=metric,
        mode=mode,
        max_drop=None,
        objective=objective,
        dense_accuracy=float(dense_accuracy),
        **({} if candidates is None else {"candidates": candidates}),
    )
    # Optuna's 50 would leave no second generation to a search of 60 evaluations.
    population = max(8, n_trials // 5)
    with _quiet(), _opened(storage) as opened, Worker.present(opened) as worker:
        sampler = sampler or NSGAIISampler(population_size=population, seed=seed)
        study = joined(opened, study_name, 2, about, sampler)
        _introduce(study, space, n_trials, tuple((i + 1) / population for i in range(population)))
        dense = float(study.user_attrs[ATTRIBUTE]["dense_accuracy"])
        terms = Terms(n_trials, space.dense_cost, dense, None)
        others = _watched(opened, storage)
        run = Run(study, space, accuracy, terms, mode, worker, False, on_trial, others)
        stopped = run.until(timeout, progress, f"Search for the front of {objective} and {metric}")
        trials = study.get_trials(deepcopy=False)
    return Outcome(None, None, front_trials(trials), run.evaluations(trials), stopped, study)


def _require(
    space: SearchSpace, metric: str, mode: str, dense_accuracy: float, n_trials: int, timeout: float | None
) -> None:
    if mode not in ("max", "min"):
        raise ValueError(f"mode is 'max' where a higher {metric} is better, 'min' where a lower is, got {mode!r}")
    if not math.isfinite(dense_accuracy):
        raise ValueError(
            f"{metric} of the dense network is {dense_accuracy}, so no drop can be measured; look at its weights and "
            "its validation data"
        )
    if isinstance(n_trials, bool) or not isinstance(n_trials, int) or n_trials < 1:
        raise ValueError(f"n_trials counts evaluations, the dense network's included, at least 1, got {n_trials!r}")
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is in seconds, at least 0, or None for no limit, got {timeout!r}")
    if all(len(row) < 2 for row in space.entries):
        raise ValueError(
            "the search space is empty: no item has a choice beside the dense one; give names of layers and levels "
            "above 0"
        )


def _introduce(study: Study, space: SearchSpace, n_trials: int, shares: tuple[float, ...] = _SHARES) -> None:
    """Let a sampler that knows nothing of budgets see some of them first."""
    if study.get_trials(deepcopy=False):
        # With one seed, every worker would propose the same plans, and a resumed one those that it began with.
        study.sampler.reseed_rng()
        return
    weights = dict.fromkeys(weight_names(space), 1.0)
    for share in shares[: max(1, n_trials // 2)]:
        parameters = {"budget": share, **weights}
        study.enqueue_trial(parameters, user_attrs={"proposal": parameters})


@contextlib.contextmanager
def _opened(storage: str | Path | BaseStorage | None) -> Iterator[BaseStorage]:
    """A storage that keeps no connection afterwards, unless it was open before.

    Raises:
        ConnectionError: it fails, for want of space for example.
    """
    from optuna.exceptions import StorageInternalError

    opened = open_storage(storage)
    try:
        yield opened
    except StorageInternalError as error:
        raise ConnectionError(
            f"the storage failed during the search: {reason(error)}; see to its server, disk or file and run the same "
            "again: finished trials are kept"
        ) from error
    finally:
        if opened is not storage:
            release(opened)


def _watched(opened: BaseStorage, storage: str | Path | BaseStorage | None) -> Callable[[], object]:
    """What changes when others write; other threads may share a storage object that was given, which does not tell."""
    return (lambda: None) if opened is storage else lambda: version(opened)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna from logging every trial, and from calling constraints and heartbeats experimental."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
