"""The search's sampler against exhaustive truth, beside samplers that know levels only.

    python -m tests.benchmarks.bench_search [--tables NAME ...] [--folder FOLDER] [--samplers NAME ...] [--seeds N]
        [--drops D ...] [--evaluations N] [--json FILE]

Tables are those of `truth_tables`. Every sampler has the same number of accuracy evaluations, the dense network's
included; a plan that was evaluated before costs nothing. "threshold" is `ThresholdSampler`, "allocated" the same
without moves, which therefore reaches only plans that an allocator gives for some coefficients. The others choose the
level of each layer: uniformly, or as Optuna's TPE, Gaussian process or NSGA-II do, under the constraint
`drop <= max_drop`. Printed is how many seeds end within 1 % of the least latency of all feasible plans, how far above
it they end, and what a proposal takes.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from lightning_prune.search.claims import choices_of, cost_of, dropped
from lightning_prune.search.parameters import suggested
from lightning_prune.search.sampler import ThresholdSampler
from lightning_prune.search.space import SearchSpace
from tests.benchmarks.harness import environment, write_json
from tests.benchmarks.truth_tables import FOLDER, SHOWN, Truth, truth

DROPS = (0.005, 0.01, 0.02)
EVALUATIONS = 60
_TRIALS = 300
_IDLE = 3
"""Trials without an evaluation after which a search has nothing left to look at."""

OTHERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed, deterministic_objective=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=12),
}


@dataclass(frozen=True)
class Ended:
    """A finished search.

    Args:
        excess: of the latency found over the least feasible one, as a fraction.
        evaluations: made, the dense network's included.
        proposal_s: mean time that a trial took, evaluation aside.
    """

    excess: float
    evaluations: int
    proposal_s: float


def searched(
    space: SearchSpace,
    drop_of: Callable[[tuple[int, ...]], float],
    max_drop: float,
    seed: int,
    evaluations: int = EVALUATIONS,
    moves: bool = True,
) -> tuple[optuna.Study, float]:
    """A plain search with `ThresholdSampler`: what is not cheaper than the incumbent is never evaluated.

    Args:
        space: of plans.
        drop_of: measures the drop of accuracy of a plan.
        max_drop: of accuracy.
        seed: of the sampler.
        evaluations: of accuracy, the dense network's included.
        moves: whether to ask for moves.

    Returns:
        The study and the mean seconds per trial that were not spent in `drop_of`.
    """
    study = optuna.create_study(sampler=ThresholdSampler(space, max_drop, seed))
    best, done, idle, known, spent_s = space.dense_cost, 1, 0, dict[tuple[int, ...], float](), 0.0
    while done < evaluations and idle < _IDLE:
        begin = time.thread_time()
        trial = study.ask()
        candidate = suggested(trial, space, moves)
        spent_s += time.thread_time() - begin
        if candidate is None or not candidate.cost < best:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            idle += 1
            continue
        idle += 1
        if candidate.choices not in known:
            idle = 0
            known[candidate.choices] = drop_of(candidate.choices)
            done += 1
        drop = known[candidate.choices]
        trial.set_user_attr("outcome", {"drop": drop})
        study.tell(trial, candidate.cost)
        if drop <= max_drop:
            best = candidate.cost
    return study, spent_s / max(1, len(study.trials))


def least_cost(study: optuna.Study, space: SearchSpace, max_drop: float) -> float:
    """Of what was feasible, the dense network included."""
    costs = [cost_of(t) for t in study.trials if "outcome" in t.user_attrs and dropped(t) <= max_drop]
    return float(min([space.dense_cost, *costs]))


def ended(name: str, table: Truth, max_drop: float, seed: int, evaluations: int) -> Ended:
    """One search."""
    drop, total_s = table.drop, table.total_s
    if name in ("threshold", "allocated"):
        space = table.space()
        study, seconds = searched(
            space, lambda choices: float(drop[choices]), max_drop, seed, evaluations, moves=name == "threshold"
        )
        done = 1 + len({choices_of(t) for t in study.trials if "outcome" in t.user_attrs})
        return Ended(least_cost(study, space, max_drop) / table.best_s(max_drop) - 1, done, seconds)
    study = optuna.create_study(sampler=OTHERS[name](seed))
    seen: set[tuple[int, ...]] = {(0,) * drop.ndim}
    spent_s, trials = 0.0, 0
    while len(seen) < evaluations and trials < _TRIALS:
        begin = time.thread_time()
        trial = study.ask()
        choices = tuple(trial.suggest_int(f"level.{item}", 0, size - 1) for item, size in enumerate(drop.shape))
        spent_s += time.thread_time() - begin
        trial.set_constraint("drop", float(drop[choices]) - max_drop)
        study.tell(trial, float(total_s[choices]))
        seen.add(choices)
        trials += 1
    best_s = min(float(total_s[choices]) for choices in seen if drop[choices] <= max_drop)
    return Ended(best_s / table.best_s(max_drop) - 1, len(seen), spent_s / max(1, trials))


def compared(
    names: list[str], folder: Path, samplers: list[str], drops: list[float], seeds: int, evaluations: int
) -> Any:
    """Every sampler on every table, a line each."""
    results = []
    for name, max_drop, sampler in itertools.product(names, drops, samplers):
        table = truth(name, folder)
        runs = [ended(sampler, table, max_drop, seed, evaluations) for seed in range(seeds)]
        excess = np.array([run.excess for run in runs])
        results.append(
            {
                "table": name,
                "max_drop": max_drop,
                "sampler": sampler,
                "seeds": seeds,
                "within_1_percent": int((excess <= 0.01).sum()),
                "mean_excess": float(excess.mean()),
                "worst_excess": float(excess.max()),
                "evaluations": max(run.evaluations for run in runs),
                "proposal_s": float(np.mean([run.proposal_s for run in runs])),
            }
        )
        line = results[-1]
        print(
            f"{name:8} {max_drop:6.3f} {sampler:10} {line['within_1_percent']:3} of {seeds:3} within 1 %, excess "
            f"{100 * excess.mean():6.2f} % mean {100 * excess.max():6.2f} % worst, "
            f"{line['evaluations']:3} evaluations, "
            f"{1e3 * float(line['proposal_s']):6.1f} ms a trial",  # type: ignore[arg-type]
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="*", default=list(SHOWN))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--samplers", nargs="*", default=["threshold", "allocated", *OTHERS])
    parser.add_argument("--drops", nargs="*", type=float, default=list(DROPS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    results = compared(
        arguments.tables,
        arguments.folder,
        arguments.samplers,
        arguments.drops,
        arguments.seeds,
        arguments.evaluations,
    )
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
