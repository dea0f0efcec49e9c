"""Who runs a trial, whether they still live, and what becomes of the trials of the dead."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.search.claims import choices_of, evaluated
from lightning_prune.search.locks import Locks

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

RETRIES = 3
"""A plan that has ended this many workers is not tried again."""

_UNMARKED = timedelta(minutes=10)


@dataclass(frozen=True)
class Worker:
    """A process that runs trials, as it signs them.

    Args:
        host: name of its machine.
        space: in which its process number has a meaning: since which boot, and in which container.
        pid: process number.
        started: when the process did, in the kernel's ticks; empty where that is not known.
        token: one word per search that the process runs.
        locks: of which it holds the one of that token, where workers share a file that has them.
    """

    host: str
    space: str
    pid: int
    started: str
    token: str
    locks: Locks | None = field(default=None, compare=False)

    @classmethod
    def here(cls) -> Worker:
        """The process that asks."""
        return cls(socket.gethostname(), _space(), os.getpid(), _started(os.getpid()) or "", uuid.uuid4().hex[:12])

    @classmethod
    @contextlib.contextmanager
    def present(cls, storage: BaseStorage) -> Iterator[Worker]:
        """The process that asks, with its lock as long as it works on what a storage keeps."""
        worker, locks = cls.here(), Locks.beside(storage)
        with contextlib.ExitStack() as stack:
            held = locks is not None and stack.enter_context(locks.held(worker.token))
            yield replace(worker, locks=locks if held else None)

    @property
    def mark(self) -> dict[str, Any]:
        """What stands in the trial."""
        whose = {"host": self.host, "space": self.space, "pid": self.pid, "started": self.started}
        return {**whose, "token": self.token, "locked": self.locks is not None}

    def knows_dead(self, mark: Mapping[str, Any]) -> bool:
        """Whether a worker has ended; False where that cannot be known from here."""
        unlocked = self.locks is not None and bool(mark.get("locked")) and self.locks.free(mark.get("token"))
        return unlocked or self._misses(mark)

    def _misses(self, mark: Mapping[str, Any]) -> bool:
        """Whether the process number of a worker of this machine is no longer its own."""
        if (mark.get("host"), mark.get("space")) != (self.host, self.space) or not self.space:
            return False
        try:
            os.kill(int(mark["pid"]), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, KeyError, ValueError, OverflowError):
            pass
        # The number may have gone to another process since.
        started = _started(int(mark.get("pid", -1)))
        return bool(mark.get("started")) and started != mark["started"]


def retry_dead(study: Study, worker: Worker, own: bool = False, orphans: bool = False) -> list[FrozenTrial]:
    """Fail the running trials of workers that are known to have ended, and queue them again.

    Args:
        study: that is looked through.
        worker: this one.
        own: whether interrupted trials of this worker are queued again too.
        orphans: whether those are that others should have queued, but did not live to.

    Returns:
        The trials as they were read.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    failed = set()
    for trial in trials:
        if trial.state == TrialState.RUNNING and _ended(trial, worker, own):
            # Another worker may be faster, or it ended well after all.
            with contextlib.suppress(ValueError, UpdateFinishedTrialError):
                study.tell(trial.number, state=TrialState.FAIL)
                failed.add(trial.number)
    if failed:
        trials = study.get_trials(deepcopy=False)
    for trial in trials:
        mine = own and trial.user_attrs.get("worker", {}).get("token") == worker.token
        if trial.state == TrialState.FAIL and (trial.number in failed or mine or orphans):
            retry(study, trial, trials)
    return trials


def retry(study: Study, trial: FrozenTrial, trials: Sequence[FrozenTrial] | None = None) -> None:
    """Queue the parameters of an interrupted trial again, once; one that failed for a reason is left.

    Optuna's `RetryHeartbeatStaleTrialCallback` would copy the dead worker's signature and claim to the plan as well.

    Args:
        study: of the trial.
        trial: that failed.
        trials: of the study, where they have been read already.
    """
    if "reason" in trial.user_attrs:
        return
    trials = study.get_trials(deepcopy=False) if trials is None else trials
    parameters = {**trial.user_attrs.get("proposal", {}), **trial.params}
    tries = int(trial.user_attrs.get("retries", 0)) + 1
    again = any(t.user_attrs.get("retry_of") == trial.number for t in trials)
    known = "candidate" in trial.user_attrs and any(choices_of(t) == choices_of(trial) for t in evaluated(trials))
    if "budget" in parameters and not again and not known and tries <= RETRIES:
        attributes = {"retry_of": trial.number, "retries": tries, "proposal": parameters}
        study.enqueue_trial(parameters, user_attrs=attributes)


def _ended(trial: FrozenTrial, worker: Worker, own: bool) -> bool:
    mark = trial.user_attrs.get("worker")
    if mark is None:  # killed before it could sign, which is the first thing that it does
        return trial.datetime_start is not None and datetime.now() - trial.datetime_start > _UNMARKED
    return (own and mark.get("token") == worker.token) or worker.knows_dead(mark)


def _space() -> str:
    """Empty where processes of other searches cannot be told apart: there, heartbeats alone decide."""
    if os.name != "posix":
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return "posix"


def _started(pid: int) -> str | None:
    try:
        # The name in parentheses may hold anything; the 22nd field of the whole is the 20th behind it.
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]
