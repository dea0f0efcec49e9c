"""The search's own sampler for Optuna: what is proposed follows from all trials of a study, whoever ran them."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from lightning_prune.search.claims import choices_of
from lightning_prune.search.parameters import LEAST, MOST, Choices, Parameters, Proposal, proposed, weight_names
from lightning_prune.search.proposals import Proposer, Seen
from lightning_prune.search.space import SearchSpace

if TYPE_CHECKING:
    from optuna.study import Study

__all__ = ["ThresholdSampler"]

_FAILURES = 2
"""A plan whose trials failed so often is not proposed again."""


class ThresholdSampler(BaseSampler):
    """Proposes budgets and coefficients of a search space: first the level set of accuracy, then what is cheaper.

    It reads two attributes of the study's trials: `candidate`, which `suggested` writes, and `outcome`, of which `drop`
    says how much worse the accuracy is than the dense network's. Plans that other workers are evaluating are taken to
    come out as foreseen, and are not proposed again; of a trial that runs, but has no parameters yet, it is foreseen
    which plan it is about to get. `Proposer` describes the two phases.

    Parameters are `budget` and `weight.<group>`, see `SearchSpace.allocate`, and, once a trial of the study has asked
    for it, `move`, see `suggested`. When nothing cheaper is found any more the incumbent's parameters are proposed
    again; in a space so small that every plan is ranked the study is stopped, too.

    The same seed, space and trials give the same proposals.

    Args:
        space: of the plans.
        max_drop: of accuracy, absolute, at least 0.
        seed: of what is drawn; by default another one each time.

    Raises:
        ValueError: the threshold is negative or not finite.

    >>> import optuna
    >>> from lightning_prune.plan import PlanEntry
    >>> from lightning_prune.search.parameters import suggested
    >>> from lightning_prune.search.space import CostTable
    >>> times = np.array([[4.0, 2.0, 1.0], [8.0, 4.0, 2.0]])
    >>> entries = (tuple(PlanEntry(level) for level in (0.0, 0.5, 0.75)),) * 2
    >>> errors = np.array([[0.0, 1.0, 4.0], [0.0, 3.0, 9.0]])
    >>> cost = lambda rows: times[[0, 1], rows].sum(axis=-1)
    >>> space = SearchSpace((("a",), ("b",)), entries, errors, (CostTable(times),), cost, (0, 1))
    >>> study = optuna.create_study(sampler=ThresholdSampler(space, max_drop=0.01, seed=0))
    >>> candidate = suggested(study.ask(), space)
    >>> candidate.choices, candidate.cost
    ((2, 1), 5.0)
    """

    def __init__(self, space: SearchSpace, max_drop: float, seed: int | None = None) -> None:
        if isinstance(max_drop, bool) or not 0.0 <= max_drop < math.inf:
            raise ValueError(f"max_drop is how much accuracy may drop, finite and at least 0, got {max_drop!r}")
        self.space, self.max_drop = space, float(max_drop)
        self._seed = int(np.random.SeedSequence().entropy) % 2**32 if seed is None else seed  # type: ignore[arg-type]
        self._proposers = {moves: Proposer(space, self.max_drop, moves) for moves in (False, True)}
        self._others = RandomSampler(seed=self._seed)
        self._read: Sequence[FrozenTrial] | None = None

    def reseed_rng(self) -> None:
        """Workers of one study that share a process draw different numbers anyway: those of their trials."""
        self._others.reseed_rng()

    def just_read(self, trials: Sequence[FrozenTrial]) -> None:
        """Spares the next proposal reading the study once more, if no other trial has begun since."""
        self._read = trials

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters; what a trial does not ask for is not stored."""
        return distributions(self.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values for all parameters; there is no move where no trial has asked for one yet."""
        read, self._read = self._read, None
        if search_space.keys() - {"move"} <= trial.system_attrs.get("fixed_params", {}).keys():
            return {}
        trials = read if read is not None and trial.number == len(read) else study.get_trials(deepcopy=False)
        proposer = self._proposers[any("move" in other.params for other in trials)]
        seen, nameless = history(trials, self.space, trial.number)
        found = None
        # Trials that were begun earlier and have no plan yet get theirs first.
        for number in [*nameless, trial.number]:
            found = proposer.propose(seen, np.random.default_rng([self._seed, number]))
            if found is None:
                break
            seen = replace(seen, pending=(*seen.pending, found.candidate.choices))
        if found is None:
            found = proposer.incumbent(seen)
            if proposer.looks_at_all and not seen.pending:
                with contextlib.suppress(RuntimeError):  # who asks and tells stops by other means
                    study.stop()
        return {} if found is None else values_of(found)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Of fixed parameters no move was made; parameters of somebody else are drawn at random."""
        if param_name == "move":
            return 0
        return self._others.sample_independent(study, trial, param_name, param_distribution)


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The parameters that `suggested` asks for."""
    weights = {name: FloatDistribution(LEAST, MOST, log=True) for name in weight_names(space)}
    moves = len(space.items) * len(space.entries[0])
    return {"budget": FloatDistribution(0.0, 1.0), **weights, "move": IntDistribution(0, moves)}


def values_of(proposal: Proposal) -> dict[str, Any]:
    """A proposal as parameters."""
    weights = {f"weight.{group}": weight for group, weight in enumerate(proposal.weights)}
    return {"budget": proposal.share, **weights, "move": proposal.move}


def history(trials: Sequence[FrozenTrial], space: SearchSpace, before: int) -> tuple[Seen, list[int]]:
    """What a study's trials say, and the numbers of those that run without a plan yet.

    Of several drops of one plan the last counts. A choice that the space does not have makes a trial be passed over.

    Args:
        trials: in any state.
        space: of their plans.
        before: the number of the trial that is sampled for.
    """
    drops: dict[Choices, float] = {}
    parameters: dict[Choices, Parameters] = {}
    pending: dict[Choices, None] = {}
    failures: Counter[Choices] = Counter()
    nameless = []
    for trial in trials:
        running = trial.state == TrialState.RUNNING
        if trial.state == TrialState.WAITING or trial.number == before:
            continue
        asked = _parameters(trial, space)
        choices = _choices(trial, space, asked)
        if choices is None:
            if running and trial.number < before:
                nameless.append(trial.number)
        elif "outcome" in trial.user_attrs:
            drops[choices] = _drop(trial.user_attrs["outcome"])
            if asked is not None:
                parameters[choices] = asked
        elif running:
            pending[choices] = None
        elif trial.state == TrialState.FAIL:
            failures[choices] += 1
    waiting = tuple(choices for choices in pending if choices not in drops)
    spoiled = frozenset(choices for choices, count in failures.items() if count >= _FAILURES)
    values = np.array(list(drops.values()), dtype=np.float64)
    return Seen(tuple(drops), values, waiting, spoiled, parameters), nameless


def _choices(trial: FrozenTrial, space: SearchSpace, parameters: Parameters | None) -> Choices | None:
    if "candidate" not in trial.user_attrs:
        found = None if parameters is None or trial.state != TrialState.RUNNING else proposed(space, *parameters)
        return None if found is None else found.candidate.choices
    choices = choices_of(trial)
    fits = len(choices) == len(space.items) and min(choices) >= 0 and max(choices) < len(space.entries[0])
    return choices if fits else None


def _parameters(trial: FrozenTrial, space: SearchSpace) -> Parameters | None:
    names = weight_names(space)
    if not {"budget", *names} <= trial.params.keys():
        return None
    return trial.params["budget"], tuple(trial.params[name] for name in names), trial.params.get("move", 0)


def _drop(outcome: Any) -> float:
    try:
        return float(outcome["drop"])
    except (KeyError, TypeError, ValueError):
        return math.nan
