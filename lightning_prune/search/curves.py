"""What each layer costs when it is pruned alone: a value, and its files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_prune.files import write_text
from lightning_prune.targets import closest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Sensitivity"]

_SCHEMA = "lightning-prune/sensitivity/1"

Curves = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Sensitivity:
    """Metrics of a network in which one layer at a time is pruned, one-shot, to each of some levels.

    A metric may be NaN where a network that has lost a layer gives none; `not_finite` names those cells.

    Args:
        names: of the pruned weights.
        levels: fractions removed, rising, in [0, 1].
        values: metric -> one row per name, one column per level.
        dense: metric -> its value with nothing removed.
        examples: over which metrics are averaged; 0 where that is not known.
        forward_passes: passes of a batch that were run, recordings and checks included.
        full_passes: the same in whole passes: a pass that reuses 90 % of another one's FLOPs counts 0.1.
        plain_passes: whole passes that it takes without reuse.
        criterion: that chose the weights, in words.
        granularity: of what was removed, in words.
        weights: names the network's weights.

    Raises:
        ValueError: shapes or metrics do not go together, or levels do not rise in [0, 1].

    >>> curves = Sensitivity(("fc.weight",), (0.5, 0.9), {"accuracy": ((0.75, 0.25),)}, {"accuracy": 1.0}, 8)
    >>> curves.drops("accuracy").tolist()
    [[0.25, 0.75]]
    """

    names: tuple[str, ...]
    levels: tuple[float, ...]
    values: Mapping[str, Curves]
    dense: Mapping[str, float]
    examples: int
    forward_passes: int = 0
    full_passes: float = 0.0
    plain_passes: int = 0
    criterion: str = ""
    granularity: str = ""
    weights: str = ""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        checked_levels(self.levels)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"sensitivities are of one or more layers, each once, got {self.names}")
        if not self.values or self.values.keys() != self.dense.keys():
            raise ValueError(
                f"each metric needs its dense value and its curves, got dense values of {sorted(self.dense)} and "
                f"curves of {sorted(self.values)}"
            )
        for metric, rows in self.values.items():
            widths = {len(row) for row in rows}
            if len(rows) != len(self.names) or widths != {len(self.levels)}:
                raise ValueError(
                    f"{metric!r} needs {len(self.names)} rows of {len(self.levels)} numbers, one per layer and level, "
                    f"got {len(rows)} of {sorted(widths)}"
                )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.values)

    @property
    def not_finite(self) -> list[tuple[str, str, float]]:
        """Metric, name and level of the cells that hold no finite number."""
        return [
            (metric, name, level)
            for metric, rows in self.values.items()
            for name, row in zip(self.names, rows, strict=True)
            for level, value in zip(self.levels, row, strict=True)
            if not math.isfinite(value)
        ]

    def curves(self, metric: str) -> Tensor:
        """A metric, `[layers, levels]`, in double precision.

        Raises:
            KeyError: there is no such metric; the closest names are listed.
        """
        return torch.tensor(self._of(metric, self.values), dtype=torch.float64)

    def drops(self, metric: str, mode: Literal["max", "min"] = "max") -> Tensor:
        """How much worse than dense a metric is, `[layers, levels]`; below 0 where pruning improves it.

        Args:
            metric: its name.
            mode: "max" where higher is better, as of an accuracy: `dense - pruned`; "min" where lower is better, as
                of a loss: `pruned - dense`.

        Raises:
            KeyError: there is no such metric.
            ValueError: the mode is neither.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"mode is 'max' where higher is better or 'min' where lower is better, got {mode!r}")
        change: Tensor = self.curves(metric) - self._of(metric, self.dense)
        return -change if mode == "max" else change

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; what is not finite becomes a word."""
        write_text(path, json.dumps({"schema": _SCHEMA, **_worded(asdict(self))}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, of another schema version, cut short or damaged.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there are no sensitivities at {str(path)!r}; write them with `lightning-prune sensitivity`, or "
                "correct the path"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a whole file of sensitivities: {error}; write it anew") from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != _SCHEMA:
            raise ValueError(f"{path} has schema {schema!r}, this version reads {_SCHEMA!r}; write it anew")
        try:
            data = {field.name: content[field.name] for field in fields(cls)}
            numbers = {metric: tuple(tuple(map(float, row)) for row in rows) for metric, rows in data["values"].items()}
            dense = {metric: float(value) for metric, value in data["dense"].items()}
            given = {"names": tuple(data["names"]), "levels": tuple(data["levels"]), "values": numbers, "dense": dense}
            return cls(**{**data, **given})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); write it anew") from None

    def to_csv(self, path: str | Path) -> None:
        """Write one line per layer and level, with a column per metric; the first line, without a layer, is dense."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "sparsity", *self.metrics])
        writer.writerow(["", 0.0, *self.dense.values()])
        for row, name in enumerate(self.names):
            for column, level in enumerate(self.levels):
                writer.writerow([name, level, *(self.values[metric][row][column] for metric in self.dense)])
        write_text(path, text.getvalue())

    def figure(self, metric: str | None = None) -> Figure:
        """Curves per layer, a panel for each metric or for one."""
        from lightning_prune.search.figures import sensitivity_figure

        return sensitivity_figure(self, self.metrics if metric is None else (metric,))

    def _of(self, metric: str, among: Mapping[str, Any]) -> Any:
        if metric not in among:
            raise KeyError(f"no metric {metric!r} among the sensitivities; closest: {closest(metric, among)}")
        return among[metric]


def checked_levels(levels: Any) -> tuple[float, ...]:
    """Levels as numbers.

    Raises:
        ValueError: there are none, they do not rise, or lie outside [0, 1].
    """
    numbers = tuple(map(float, levels))
    rising = all(low < high for low, high in pairwise(numbers))
    if not numbers or not rising or not all(0.0 <= level <= 1.0 for level in numbers):
        raise ValueError(f"levels are fractions removed, in [0, 1], rising, none twice; got {list(levels)}")
    return numbers


def _worded(value: Any) -> Any:
    """For JSON, which knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _worded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_worded(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
