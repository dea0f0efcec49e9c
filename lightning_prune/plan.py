"""The sparsity plan: what share of each parameter is to be removed."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from torch import nn

from lightning_prune import granularities, targets
from lightning_prune.files import write_text
from lightning_prune.granularities import Granularity

__all__ = ["SparsityPlan", "Std"]

_SCHEMA = "lightning-prune/plan/1"


@dataclass(frozen=True)
class PlanEntry:
    """The share of a parameter to remove and, optionally, in which groups.

    Args:
        sparsity: the fraction removed, in [0, 1], of the original count.
        granularity: the groups; None leaves the choice to whoever prunes.

    Raises:
        ValueError: if one is no such fraction or the other no granularity.
    """

    sparsity: float
    granularity: Granularity | None = None

    def __post_init__(self) -> None:
        """Refuse a share that is none, and groups that are none."""
        number = self.sparsity
        if isinstance(number, bool) or not isinstance(number, Real) or not 0.0 <= float(number) <= 1.0:
            raise ValueError(f"sparsity is the fraction removed, in [0, 1], got {number!r}")
        object.__setattr__(self, "sparsity", float(number))
        if self.granularity is not None and not isinstance(self.granularity, Granularity):
            raise ValueError(f"granularity is an object such as Filter() or NM(2, 4), got {self.granularity!r}")


Share: TypeAlias = float | PlanEntry | tuple[float, Granularity]
"""What a plan may say of a parameter."""


@dataclass(frozen=True)
class Std:
    """A threshold measured in standard deviations of the parameter: `k * std(w)`.

    Args:
        k: how many, at least 0.
    """

    k: float

    def __post_init__(self) -> None:
        """Refuse a negative threshold."""
        if not (self.k >= 0 and math.isfinite(self.k)):
            raise ValueError(f"Std needs a finite k >= 0, got k={self.k!r}")


class SparsityPlan(Mapping[str, float]):
    """A frozen map: parameter name or pattern -> fraction removed, in [0, 1], of the original count.

    Patterns are shell globs over plain parameter names (`*` matches dots too). An exact name beats every pattern, and
    of several patterns the last one given wins. A pattern means the conv and linear weights that it matches; only
    where it matches none of those does it mean other parameters: `*` leaves biases alone, `*.bias` names them.

    Args:
        mapping: name or pattern -> a fraction, a `PlanEntry`, or a pair of fraction and granularity.

    Raises:
        ValueError: if a fraction lies outside [0, 1] or a granularity is none, naming the entry.

    >>> plan = SparsityPlan({"*": 0.7, "fc.weight": 0.87})
    >>> plan["fc.weight"]
    0.87
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> SparsityPlan({"*": 0.7, "1.weight": 0.5}).resolve(model)
    SparsityPlan({'0.weight': 0.7, '1.weight': 0.5})
    """

    def __init__(self, mapping: Mapping[str, Share]) -> None:
        if not isinstance(mapping, Mapping):
            raise ValueError(
                f'a sparsity plan is a map of names to fractions, got {mapping!r}; say {{"*": ...}} for all'
            )
        entries = {}
        for name, value in mapping.items():
            if not isinstance(name, str):
                raise ValueError(f"sparsity plan, entry {name!r}: names and patterns are words")
            try:
                entries[name] = _entry(value)
            except (ValueError, TypeError) as error:
                raise ValueError(f"sparsity plan, entry {name!r}: {error}") from None
        self._entries: dict[str, PlanEntry] = entries

    def __getitem__(self, name: str) -> float:
        return self.entry(name).sparsity

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SparsityPlan):
            return self._entries == other._entries
        return NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        shown = {
            name: entry.sparsity if entry.granularity is None else (entry.sparsity, entry.granularity)
            for name, entry in self._entries.items()
        }
        return f"SparsityPlan({shown!r})"

    def entry(self, name: str) -> PlanEntry:
        """Fraction and granularity of one entry.

        Raises:
            KeyError: if the plan has no such entry; the closest names are listed.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(
                f"the plan has no entry {name!r}; closest: {targets.closest(name, self._entries)}; "
                "patterns are expanded by plan.resolve(model)"
            ) from None

    def granularity(self, name: str) -> Granularity | None:
        """The granularity of one entry, None where the plan leaves it open."""
        return self.entry(name).granularity

    def match(self, model: nn.Module) -> dict[str, str]:
        """Plain parameter name -> the entry of this plan that holds for it, in the model's order.

        Raises:
            ValueError: if an entry matches no parameter of the model; the closest names are listed.
        """
        first = targets.aliases(model)
        default = targets.prunable(model)
        won: dict[str, str] = {}
        exact: dict[str, str] = {}
        for pattern in self._entries:
            if pattern in first:
                exact[first[pattern]] = pattern
                continue
            matched = [first[name] for name in first if fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(
                    f"the plan names {pattern!r}, which matches no parameter of {type(model).__name__}; "
                    f"closest: {targets.closest(pattern, first)}"
                )
            usual = [name for name in matched if name in default]
            if not usual and not pattern.strip("*"):
                raise ValueError(
                    f"{type(model).__name__} has no conv or linear weights, which {pattern!r} stands for; name what is "
                    f"to be pruned, for example {targets.closest('weight', first, count=1)}"
                )
            won |= dict.fromkeys(usual or matched, pattern)
        won |= exact
        return {name: won[name] for name in targets.parameters(model) if name in won}

    def resolve(self, model: nn.Module) -> SparsityPlan:
        """The same plan with every pattern replaced by the parameters of `model` that it stands for.

        Raises:
            ValueError: if an entry matches no parameter of the model; the closest names are listed.
        """
        return SparsityPlan({name: self._entries[pattern] for name, pattern in self.match(model).items()})

    @classmethod
    def of(cls, sparsity: float | Mapping[str, Share] | SparsityPlan | str | Path) -> SparsityPlan:
        """The plan that a user means: by a number for all conv and linear weights, a map, a plan, or the path of one.

        >>> SparsityPlan.of(0.9)
        SparsityPlan({'*': 0.9})
        """
        if isinstance(sparsity, SparsityPlan):
            return sparsity
        if isinstance(sparsity, str | Path):
            return cls.load(sparsity)
        return cls(sparsity if isinstance(sparsity, Mapping) else {"*": sparsity})

    @classmethod
    def from_threshold(cls, model: nn.Module, thresholds: Mapping[str, float | Std]) -> SparsityPlan:
        """The plan that removes, of each parameter, the share of weights below a threshold.

        sparsity = |{i : |w_i| < t}| / n,  with `t` the threshold, or `t = k * std(w)` for `Std(k)`, `n` the size of `w`

        Args:
            model: whose present weights are counted.
            thresholds: name or pattern -> a magnitude, or `Std(k)`.

        Raises:
            ValueError: if a threshold is negative or no number, or a name matches nothing.

        Source: Han et al., "Learning both Weights and Connections" (2015), section 3.1.

        >>> model = nn.Linear(4, 1)
        >>> _ = nn.init.constant_(model.weight, 0.2)
        >>> SparsityPlan.from_threshold(model, {"weight": 0.3})["weight"]
        1.0
        """
        for name, threshold in thresholds.items():
            magnitude = isinstance(threshold, Real) and not isinstance(threshold, bool)
            if not isinstance(threshold, Std) and not (magnitude and threshold >= 0 and math.isfinite(threshold)):
                raise ValueError(f"threshold of {name!r} needs a finite magnitude >= 0, got {threshold!r}")
        named = targets.parameters(model)
        plan = {}
        for name, pattern in cls(dict.fromkeys(thresholds, 0.0)).match(model).items():
            weight, threshold = named[name].detach(), thresholds[pattern]
            # The population's standard deviation: a weight is all there is, not a sample of it.
            limit = threshold.k * weight.std(correction=0).item() if isinstance(threshold, Std) else threshold
            plan[name] = (weight.abs() < limit).sum().item() / max(weight.numel(), 1)
        return cls(plan)

    def as_dict(self) -> dict[str, Any]:
        """For JSON and YAML: name -> fraction, or fraction and granularity; `SparsityPlan(...)` reads it again.

        >>> SparsityPlan({"fc.weight": 0.5, "conv.weight": (0.8, granularities.Filter())}).as_dict()["conv.weight"]
        {'sparsity': 0.8, 'granularity': {'class_path': 'Filter', 'init_args': {}}}
        """
        sparsity: dict[str, Any] = {}
        for name, entry in self._entries.items():
            if entry.granularity is None:
                sparsity[name] = entry.sparsity
            else:
                granularity = {
                    "class_path": _class_path(type(entry.granularity)),
                    "init_args": asdict(entry.granularity),
                }
                sparsity[name] = {"sparsity": entry.sparsity, "granularity": granularity}
        return sparsity

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, whole or not at all."""
        write_text(path, yaml.safe_dump({"schema": _SCHEMA, "sparsity": self.as_dict()}, sort_keys=False))

    @classmethod
    def load(cls, path: str | Path) -> SparsityPlan:
        """Read a plan that `save` wrote, or a plain YAML map of names to fractions.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no plan; the message names file, place and remedy.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no sparsity plan at {str(path)!r}; correct the path, or give a number (without quotes)"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
            raise ValueError(f"{path} is no YAML file, so no sparsity plan: {error}; write it anew") from None
        if not isinstance(content, dict):
            raise ValueError(
                f"{path} holds {type(content).__name__}, not a sparsity plan; expected a map of names to fractions"
            )
        if "schema" in content and content["schema"] != _SCHEMA:
            raise ValueError(f"{path} has schema {content['schema']!r}, this version reads {_SCHEMA!r}; save it anew")
        mapping: Any = content
        if "schema" in content:
            if unknown := sorted(map(str, content.keys() - {"schema", "sparsity"})):
                raise ValueError(f"{path} has the unknown keys {unknown} beside 'schema' and 'sparsity'; remove them")
            mapping = content.get("sparsity")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
            raise ValueError(f"{path} has no map of parameter names under 'sparsity'; save the plan anew")
        try:
            return cls(mapping)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _entry(value: Any) -> PlanEntry:
    if isinstance(value, PlanEntry):
        return value
    if isinstance(value, tuple):
        return PlanEntry(*value)
    if isinstance(value, Mapping):
        unknown = set(value) - {"sparsity", "granularity"}
        if unknown or "sparsity" not in value:
            raise ValueError(f"expected the keys sparsity and, optionally, granularity, got {sorted(value)}")
        granularity = value.get("granularity")
        return PlanEntry(
            value["sparsity"],
            _granularity(granularity) if isinstance(granularity, Mapping) else granularity,
        )
    return PlanEntry(value)


def _granularity(value: Mapping[str, Any]) -> Granularity:
    """Build a granularity from a file: only classes that are already known, nothing is imported for it."""
    if unknown := sorted(map(str, set(value) - {"class_path", "init_args"})):
        raise ValueError(f"a granularity has the keys class_path and, optionally, init_args, got {unknown} too")
    known = {_class_path(kind): kind for kind in _subclasses(Granularity)}  # type: ignore[type-abstract]
    name = str(value.get("class_path", "")).removeprefix(f"{granularities.__name__}.").removeprefix("lightning_prune.")
    if name not in known:
        raise ValueError(f"unknown granularity {name!r}; closest: {targets.closest(name, known)}")
    return known[name](**(value.get("init_args") or {}))


def _class_path(kind: type[Granularity]) -> str:
    """Ours by name alone, a user's own with its module."""
    ours = kind.__module__ == granularities.__name__
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: type[Granularity]) -> Iterator[type[Granularity]]:
    for subclass in kind.__subclasses__():
        if not subclass.__name__.startswith("_"):
            yield subclass
        yield from _subclasses(subclass)
