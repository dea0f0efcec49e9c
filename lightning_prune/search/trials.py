"""Running the trials of a study, one after another, beside other workers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning_prune.search.claims import (
    Terms,
    Verdict,
    claimed,
    evaluated,
    evaluating,
    incumbent_cost,
    verdict,
)
from lightning_prune.search.interrupts import Interrupts
from lightning_prune.search.parameters import suggested
from lightning_prune.search.result import drop_of
from lightning_prune.search.space import Candidate, SearchSpace
from lightning_prune.search.workers import Worker, retry_dead

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

Stopped: TypeAlias = Literal["finished", "timeout", "interrupted", "exhausted", "sampler"]

DIVERGED = 1e6
"""Drop of a network whose accuracy is no finite number: constraints and objectives have to be finite."""

_PATIENCE = 100
"""Trials in a row of which none is evaluated, until nothing new is expected."""

_DECIDING_S = 10.0
"""A worker decides within milliseconds; one that does not is dead."""

_STALE_S = 0.03
"""Trials that were read so long ago are read again: others may have ended meanwhile."""

_SILENCE_S = 60.0
"""At least as long others may evaluate before they are taken for dead, where there are no heartbeats."""


class Run:
    """A worker's part of a study.

    Args:
        study: that is shared.
        space: of plans.
        accuracy: measures a candidate.
        terms: what the study is after.
        mode: "max" where a higher accuracy is better.
        worker: this one.
        moves: see `suggested`.
        on_trial: is called after each trial.
        version: of what the storage holds, another one as soon as another worker writes; None where that is not known.
    """

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        accuracy: Callable[[Candidate], float],
        terms: Terms,
        mode: str,
        worker: Worker,
        moves: bool,
        on_trial: Callable[[Study, FrozenTrial], None] | None,
        version: Callable[[], object] = lambda: None,
    ) -> None:
        self.study, self.space, self.accuracy, self.terms = study, space, accuracy, terms
        self.mode, self.worker, self.moves, self.on_trial, self.version = mode, worker, moves, on_trial, version
        self._interrupts = Interrupts()
        self._number = -1
        self._known: tuple[object, Sequence[FrozenTrial]] = (None, ())
        self._idle = 0
        self._collisions = 0
        self._own_error = False
        self._stop = _Stop()
        self._ending = False
        self._stopped: Stopped | None = None
        self._ends_s = math.inf
        self._show: Callable[[Sequence[FrozenTrial]], None] = lambda trials: None

    def until(self, timeout_s: float | None, progress: bool, title: str) -> Stopped:
        """Run trials until the evaluations are made, or something else ends it."""
        from optuna.exceptions import UpdateFinishedTrialError

        self._ends_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with _bar(progress, title, self.terms) as self._show, self._interrupts, _heard(self.study, self._stop):
            try:
                self._go_on(self._read(orphans=True))
                while self._stopped is None:
                    self._number = -1
                    self._stop.asked()
                    try:
                        # For callbacks Optuna would read each trial once more, a tenth of what a trial takes in SQLite.
                        self.study.optimize(self._objective, n_trials=1)
                    except (ValueError, AssertionError, UpdateFinishedTrialError):
                        # Another worker ran this trial, or took this one for dead and runs it again. Where an
                        # evaluation ends after that, Optuna asserts that it cannot.
                        if self._own_error or not self._taken_away():
                            raise
                        self._interrupts.check()
                        # Optuna has failed it as this worker left it, also if who ran it had died: it is queued again.
                        self._go_on(self._read(orphans=True))
                    else:
                        self._after()
                self._interrupts.check()
            except KeyboardInterrupt:
                self._stopped = "interrupted"
            finally:
                retry_dead(self.study, self.worker, own=True)
        return self._stopped

    def evaluations(self, trials: Sequence[FrozenTrial]) -> int:
        """Made so far by all workers, the dense network's included."""
        return 1 + len(evaluated(trials))

    def _objective(self, trial: Trial) -> float | tuple[float, float]:
        self._number, self._own_error = trial.number, False
        # First of all, so that others can tell whether it is still run.
        trial.set_user_attr("worker", self.worker.mark)
        self._interrupts.check()
        candidate = self._suggested(trial)
        if candidate is None:
            raise self._skipped(trial, Verdict(reason="no plan meets this budget"))
        found = self._decided(trial, candidate)
        self._interrupts.check()
        if found.evaluate:
            trial.set_user_attr("plan", self.space.plan(candidate.choices).as_dict())
            value = self._measured(trial, candidate)
            self._idle = self._collisions = 0
        elif found.known:
            self._skipped(trial, found)
            value = math.nan if found.accuracy is None else found.accuracy
        else:
            raise self._skipped(trial, found)
        drop = self._drop(value)
        trial.set_user_attr("outcome", {"accuracy": value if math.isfinite(value) else None, "drop": drop})
        cost = float(candidate.cost)
        if self.terms.max_drop is None:
            return cost, drop
        _constrain(trial, "drop", drop - self.terms.max_drop)
        return cost

    def _suggested(self, trial: Trial) -> Candidate | None:
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            return suggested(trial, self.space, self.moves)
        except UpdateFinishedTrialError:  # by another worker
            raise
        except Exception:  # the sampler's own
            self._own_error = True
            raise

    def _decided(self, trial: Trial, candidate: Candidate) -> Verdict:
        deadline_s = time.monotonic() + _DECIDING_S
        while True:
            found = verdict(trial.number, candidate.choices, candidate.cost, self._trials(trial), self.terms)
            if not found.waits or time.monotonic() > deadline_s:
                return found
            time.sleep(0.005)

    def _read(self, orphans: bool = False) -> Sequence[FrozenTrial]:
        """All trials, after those of workers that have ended were queued again."""
        version = self.version()
        self._known = version, retry_dead(self.study, self.worker, orphans=orphans)
        return self._known[1]

    def _trials(self, own: Trial) -> Sequence[FrozenTrial]:
        """All trials but maybe this one, as they are now: read again unless nobody else has written since they were."""
        version, trials = self._known
        if version is not None and version == self.version():
            return trials
        trials = self.study.get_trials(deepcopy=False)
        self._require_own(trials[own.number])
        return trials

    def _require_own(self, trial: FrozenTrial) -> None:
        """Leave a trial that another worker runs: without row locks, as in SQLite, two may take one off the queue."""
        decided = claimed(trial) or "reason" in trial.user_attrs
        if trial.user_attrs["worker"] == self.worker.mark and not decided:
            return
        while not trial.state.is_finished():
            # Optuna will record an end of this trial as soon as the worker leaves it, which must not be too early.
            self._interrupts.check()
            time.sleep(0.1)
            trial = self.study.get_trials(deepcopy=False)[trial.number]
            mark = trial.user_attrs["worker"]
            if mark != self.worker.mark and self.worker.knows_dead(mark):
                break
        raise ValueError(f"trial {trial.number} was run by another worker")

    def _skipped(self, trial: Trial, found: Verdict) -> Exception:
        from optuna import TrialPruned

        trial.set_user_attr("reason", found.reason)
        if not found.known and self.terms.max_drop is not None:
            # Tells samplers that know constraints why a cheaper plan is needed; the drop is not known.
            _constrain(trial, "cost", found.excess)
        self._idle += 1
        self._collisions = self._collisions + 1 if found.busy else 0
        return TrialPruned(found.reason)

    def _measured(self, trial: Trial, candidate: Candidate) -> float:
        try:
            with self._interrupts.at_once():
                return float(self.accuracy(candidate))
        except Exception as error:
            self._own_error = True
            # With a reason, it is not run again: it would end in the same way.
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}"[:500])
            raise

    def _drop(self, value: float) -> float:
        """How much is lost, as a number that storages keep."""
        drop = float(drop_of(value, self.terms.dense_accuracy, self.mode, self.terms.max_drop))
        return drop if math.isfinite(drop) else DIVERGED

    def _after(self) -> None:
        """Between two trials."""
        from optuna.trial import TrialState

        self._ending = self._ending or self._stop.asked()
        trials, read_s = self._read(), time.monotonic()
        self._stop.asked()  # samplers are told of the ends of dead workers' trials, which end nothing here
        if self.on_trial is not None:
            self.on_trial(self.study, trials[self._number])
        queued = any(t.state == TrialState.WAITING for t in trials)  # a sampler has nothing more, but others have
        if self._stop.asked() or (self._ending and not queued):
            self._stopped = "sampler"
        self._interrupts.check()
        if self._collisions:
            time.sleep(min(1.0, 0.02 * 2 ** min(self._collisions, 6)))
        if time.monotonic() - read_s > _STALE_S:
            trials = self._read()
        self._go_on(trials)

    def _go_on(self, trials: Sequence[FrozenTrial]) -> None:
        """See whether all evaluations are made, and wait where others make the last ones.

        Args:
            trials: as they were just read.
        """
        from optuna.storages import fail_stale_trials

        from lightning_prune.search.sampler import ThresholdSampler

        if self._idle >= _PATIENCE:
            self._stopped = "exhausted"
        pause_s, since_s, last = 0.02, time.monotonic(), -1
        while True:
            done, running = evaluated(trials), evaluating(trials)
            self._show(trials)
            if 1 + len(done) >= self.terms.evaluations:
                self._stopped = "finished"
            elif self._stopped is None and time.monotonic() >= self._ends_s:
                self._stopped = "timeout"
            if self._stopped is not None:
                return
            if 1 + len(done) + len(running) < self.terms.evaluations:
                if isinstance(self.study.sampler, ThresholdSampler):
                    self.study.sampler.just_read(trials)
                return
            if len(done) != last:
                since_s, last = time.monotonic(), len(done)
            longest_s = max((t.duration.total_seconds() for t in done if t.duration is not None), default=0.0)
            if time.monotonic() - since_s > max(_SILENCE_S, 10 * longest_s):
                self._stopped = "exhausted"
                return
            self._interrupts.check()
            time.sleep(pause_s)
            pause_s = min(1.0, 1.5 * pause_s)
            fail_stale_trials(self.study)
            trials = self._read()

    def _taken_away(self) -> bool:
        trials = self.study.get_trials(deepcopy=False)
        return any(t.number == self._number and t.state.is_finished() for t in trials)


def _constrain(trial: Trial, name: str, value: float) -> None:
    """As `Trial.set_constraint` does, which reads the whole trial from the storage first: a tenth of what it takes."""
    trial.storage.set_trial_system_attr(trial._trial_id, f"constraints:{name}", float(value))


class _Stop:
    """Stands in the place of `Study.stop`, which Optuna allows in objectives and callbacks alone."""

    def __init__(self) -> None:
        self._called = False

    def __call__(self) -> None:
        self._called = True

    def asked(self) -> bool:
        """Whether it was called since this was asked."""
        called, self._called = self._called, False
        return called


@contextlib.contextmanager
def _heard(study: Study, stop: _Stop) -> Iterator[None]:
    """What samplers and callbacks do to stop a study."""
    study.stop = stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        del study.stop


@contextlib.contextmanager
def _bar(show: bool, title: str, terms: Terms) -> Iterator[Callable[[Sequence[FrozenTrial]], None]]:
    """Shows evaluations, the best cost and how many times less than dense that is."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}"),
    )
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(title, total=terms.evaluations, best="")

        def update(trials: Sequence[FrozenTrial]) -> None:
            done = evaluated(trials)
            cost = incumbent_cost(done, terms)
            best = f"best {cost:.4g}, {terms.dense_cost / cost:.2f}x" if 0 < cost < terms.dense_cost else ""
            progress.update(task, completed=1 + len(done), best=best)

        yield update
