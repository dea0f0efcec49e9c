"""Beginning a study, or joining one that is about the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_prune.plan import SparsityPlan
from lightning_prune.search.space import Floats, SearchSpace

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study

ATTRIBUTE = "lightning_prune"
"""Of the study: what it is about."""

SCHEMA = "lightning-prune/study/4"
"""Of what a study and its trials say about themselves."""

_WHAT = {
    "kind": "another kind of search",
    "metric": "another metric",
    "mode": "another mode",
    "max_drop": "another threshold",
    "objective": "another objective",
    "candidates": "another repair or fine-tuning of candidates",
    "names": "another network, or other layers of it",
    "space": "other levels, granularities or groups",
    "errors": "other errors per level, so other weights or calibration data",
    "dense_accuracy": "another accuracy of the dense network, so other weights or validation data",
    "dense_cost": "another cost of the dense network, so another device profile or batch size",
    "costs": "other costs per level, so another device profile or batch size",
}

_TOLERANCE = {"errors": 1e-2, "dense_accuracy": 1e-3, "dense_cost": 1e-6, "costs": 1e-6}
"""Relative: sums are rounded otherwise on another machine."""


def facts(space: SearchSpace, **about: Any) -> dict[str, Any]:
    """What must be the same for a study to be joined.

    Args:
        space: of plans; its errors and costs are kept as a sum per item.
        about: the rest.
    """
    entries = [[SparsityPlan({"it": entry}).as_dict()["it"] for entry in row] for row in space.entries]
    text = json.dumps([entries, list(space.groups)], sort_keys=True)
    return {
        "schema": SCHEMA,
        **about,
        "names": [list(item) for item in space.items],
        "space": hashlib.sha256(text.encode()).hexdigest()[:16],
        "errors": _sums(space.errors),
        "dense_cost": space.dense_cost,
        "costs": [value for table in space.tables for value in (*_sums(table.costs), float(table.fixed))],
    }


def joined(
    storage: BaseStorage, name: str | None, objectives: int, about: Mapping[str, Any], sampler: BaseSampler
) -> Study:
    """A new study, or the one of this name if it is about the same.

    Args:
        storage: where it is kept.
        name: of the study; None makes one up.
        objectives: how many are minimised.
        about: see `facts`.
        sampler: that proposes its trials.

    Raises:
        ValueError: the study of this name is about something else; the message says what differs.
    """
    import optuna
    from optuna.study import StudyDirection

    directions = [StudyDirection.MINIMIZE] * objectives
    study = optuna.create_study(
        storage=storage, sampler=sampler, study_name=name, directions=directions, load_if_exists=name is not None
    )
    found = study.user_attrs.get(ATTRIBUTE)
    if found is None and study.directions == directions and not study.get_trials(deepcopy=False):
        # Two that begin together may both write here: so what counts is read again.
        study.set_user_attr(ATTRIBUTE, dict(about))
        found = study.user_attrs[ATTRIBUTE]
    if not isinstance(found, Mapping) or found.get("schema") != about["schema"]:
        schema = found.get("schema") if isinstance(found, Mapping) else None
        raise ValueError(
            f"the study {name!r} was not made by this version of lightning-prune (its schema is {schema!r}, not "
            f"{about['schema']!r}); choose another study_name"
        )
    differing = [key for key in _WHAT if not _same(found.get(key), about.get(key), _TOLERANCE.get(key, 0.0))]
    if differing:
        listed = "; ".join(f"{_WHAT[key]}{_values(found.get(key), about.get(key))}" for key in differing)
        raise ValueError(
            f"the study {name!r} is taken, it is about something else: {listed}. Choose another study_name, or give "
            "what the study began with"
        )
    return study


def _sums(table: Floats) -> list[float]:
    sums: Floats = np.where(np.isfinite(table), table, 0.0).sum(axis=1)
    return [float(value) for value in sums]


def _same(found: Any, ours: Any, tolerance: float) -> bool:
    if tolerance == 0.0:
        return bool(found == ours)
    one, other = ([x] if isinstance(x, float) else x for x in (found, ours))
    if not isinstance(one, list) or len(one) != len(other):
        return False
    # What is next to nothing beside the others is rounded more than they are.
    least = tolerance * max(map(abs, other), default=0.0) * 1e-3
    return all(math.isclose(a, b, rel_tol=tolerance, abs_tol=least) for a, b in zip(one, other, strict=True))


def _values(found: Any, ours: Any) -> str:
    """Both, where they are short."""
    both = f" ({found!r} there, {ours!r} here)"
    return both if len(both) < 80 else ""
