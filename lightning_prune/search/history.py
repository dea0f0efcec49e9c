"""`trials.json`: what a search tried, as a value and as a file that needs no database."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.files import write_text
from lightning_prune.search.claims import choices_of, claimed, cost_of
from lightning_prune.search.joining import ATTRIBUTE, SCHEMA

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

__all__ = ["History", "TrialRecord", "load_trials", "save_trials"]

_SCHEMA = "lightning-prune/trials/1"


@dataclass(frozen=True)
class TrialRecord:
    """One trial. What is not known is None.

    Args:
        number: counted from 0.
        state: of Optuna: "COMPLETE", "PRUNED", "FAIL", "RUNNING" or "WAITING".
        choices: column of each item.
        plan: name -> sparsity, or sparsity and granularity.
        cost: estimated, of the plan.
        accuracy: of the network; None also where it diverged.
        drop: of the accuracy; None also where it diverged.
        evaluated: whether it was up to this trial to measure the accuracy.
        reason: why it was not.
        seconds: that the trial took; None where nothing was measured to the end.
        params: name -> value, as proposed.
    """

    number: int
    state: str = "COMPLETE"
    choices: tuple[int, ...] | None = None
    plan: Mapping[str, Any] | None = None
    cost: float | None = None
    accuracy: float | None = None
    drop: float | None = None
    evaluated: bool = False
    reason: str | None = None
    seconds: float | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialRecord:
        """What a trial of Optuna says about itself."""
        known = trial.user_attrs
        outcome = known.get("outcome") or {}
        accuracy = _finite(outcome.get("accuracy"))
        proposed = "candidate" in known
        finished = claimed(trial) and trial.state.name == "COMPLETE"  # killed ones end when somebody finds them
        return cls(
            number=trial.number,
            state=trial.state.name,
            choices=choices_of(trial) if proposed else None,
            plan=known.get("plan"),
            cost=_finite(cost_of(trial)) if proposed else None,
            accuracy=accuracy,
            drop=None if accuracy is None else _finite(outcome.get("drop")),
            evaluated=claimed(trial),
            reason=known.get("reason"),
            seconds=trial.duration.total_seconds() if finished and trial.duration is not None else None,
            params=dict(trial.params),
        )

    @property
    def measured(self) -> bool:
        """Whether it was evaluated, and finished."""
        return self.evaluated and self.state == "COMPLETE"


@dataclass(frozen=True)
class History:
    """What a search tried.

    Args:
        trials: by number.
        metric: name of the accuracy.
        mode: "max" where higher is better, "min" where lower is.
        max_drop: the threshold; None of a search for a front, which has none.
        dense_accuracy: of the dense network, None if not known.
        dense_cost: likewise.
        objective: name of the cost.
        unit: of the costs.
        importances: "cost" and "drop" -> parameter -> share of what decided it; empty where that is not known.

    Raises:
        ValueError: the mode is neither.

    >>> trials = (TrialRecord(0, cost=2.0, accuracy=0.9, drop=0.05, evaluated=True),
    ...           TrialRecord(1, cost=3.0, accuracy=0.95, drop=0.0, evaluated=True))
    >>> history = History(trials, "val_acc", "max", 0.01, 0.95, 4.0)
    >>> [history.feasible(trial) for trial in trials], history.best.number, history.best_so_far()
    ([False, True], 1, (4.0, 4.0, 3.0))
    """

    trials: tuple[TrialRecord, ...]
    metric: str
    mode: str
    max_drop: float | None = None
    dense_accuracy: float | None = None
    dense_cost: float | None = None
    objective: str = "cost"
    unit: str = ""
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a direction that is none."""
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode is 'max' where a higher {self.metric} is better, else 'min', got {self.mode!r}")

    @classmethod
    def of_study(cls, study: Study, unit: str = "") -> History:
        """What a study of `minimise` or `front` holds.

        Raises:
            ValueError: the study is another one, or of another version.
        """
        about = study.user_attrs.get(ATTRIBUTE)
        if not isinstance(about, Mapping):
            raise ValueError(
                f"study {study.study_name!r} is no sparsity search: it has no attribute {ATTRIBUTE!r}; give the study "
                "of a search, or build a History from its trials"
            )
        if about.get("schema") != SCHEMA:
            raise ValueError(
                f"study {study.study_name!r} was not made by this version of lightning-prune: its schema is "
                f"{about.get('schema')!r}, not {SCHEMA!r}; search anew under another name"
            )
        return cls(
            trials=tuple(map(TrialRecord.of, study.get_trials(deepcopy=False))),
            metric=str(about["metric"]),
            mode=str(about["mode"]),
            max_drop=about.get("max_drop"),
            dense_accuracy=_finite(about.get("dense_accuracy")),
            dense_cost=_finite(about.get("dense_cost")),
            objective=str(about.get("objective", "cost")),
            unit=unit,
        )

    @property
    def evaluated(self) -> tuple[TrialRecord, ...]:
        """Trials whose accuracy was measured, those that diverged included."""
        return tuple(trial for trial in self.trials if trial.measured)

    def feasible(self, trial: TrialRecord) -> bool:
        """Whether the accuracy of a trial drops by no more than the threshold; of a front, whether it is finite."""
        if trial.accuracy is None or trial.drop is None:
            return False
        return self.max_drop is None or trial.drop <= self.max_drop

    @property
    def threshold(self) -> float | None:
        """The accuracy that is just good enough; None where there is no threshold."""
        if self.max_drop is None or self.dense_accuracy is None:
            return None
        return self.dense_accuracy + (-self.max_drop if self.mode == "max" else self.max_drop)

    @property
    def best(self) -> TrialRecord | None:
        """The cheapest that is accurate enough; None if none is, or where there is no threshold."""
        if self.max_drop is None:
            return None
        enough = [t for t in self.evaluated if self.feasible(t) and t.cost is not None]
        return min(enough, key=lambda t: (t.cost, t.drop, t.number), default=None)

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """Trials of which none is both cheaper and more accurate than another, the cheapest first."""
        finite = [t for t in self.evaluated if t.drop is not None and t.cost is not None]
        found: list[TrialRecord] = []
        for trial in sorted(finite, key=lambda t: (t.cost, t.drop, t.number)):
            if not found or trial.drop < found[-1].drop:  # type: ignore[operator]  # finite
                found.append(trial)
        return tuple(found)

    def best_so_far(self) -> tuple[float, ...]:
        """Cost of the cheapest that was accurate enough after each evaluation, the dense network's first."""
        lowest = math.inf if self.dense_cost is None else self.dense_cost
        found = [lowest]
        for trial in self.evaluated:
            if trial.cost is not None and self.feasible(trial):
                lowest = min(lowest, trial.cost)
            found.append(lowest)
        return tuple(found)


def save_trials(path: str | Path, source: History | Study, unit: str = "") -> History:
    """Write what a search tried as JSON, whole or not at all; what is not known is null.

    Args:
        path: of the file, `trials.json` in the folder of a run.
        source: the study, or its history.
        unit: of the costs; that of the history where it is empty.

    Returns:
        What was written, with the importances of the parameters where they could be computed.

    Raises:
        ValueError: the study is no sparsity search.
        OSError: the file cannot be written; the one that was there is untouched.
    """
    history = source if isinstance(source, History) else History.of_study(source)
    history = replace(history, unit=unit or history.unit)
    if not history.importances:
        from lightning_prune.search.importances import importances

        history = replace(history, importances=importances(history))
    text = json.dumps({"schema": _SCHEMA, **_plain(asdict(history))}, indent=1, allow_nan=False)
    write_text(path, text + "\n")
    return history


def load_trials(path: str | Path) -> History:
    """Read what `save_trials` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no trials, or those of another version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = content.pop("schema", None)
        if schema != _SCHEMA:
            raise ValueError(f"it has schema {schema!r}")
        if unknown := content.keys() - {each.name for each in fields(History)}:
            raise ValueError(f"nobody knows {sorted(unknown)}")
        trials = tuple(_trial(each) for each in content.pop("trials"))
        return History(trials, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} holds no trials of schema {_SCHEMA!r} ({error}); write it anew with save_trials"
        ) from None


def _trial(content: Mapping[str, Any]) -> TrialRecord:
    choices = content.get("choices")
    record = TrialRecord(**{**content, "choices": None if choices is None else tuple(choices)})
    for name in ("cost", "accuracy", "drop", "seconds"):
        value = getattr(record, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} of trial {record.number!r} is {value!r}, no number")
    return record


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
