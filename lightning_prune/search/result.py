"""What a search found, as a value and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prune.files import write_text
from lightning_prune.plan import SparsityPlan

__all__ = ["SearchResult"]

_SCHEMA = "lightning-prune/search-result/1"

_FLOAT32 = 2.0**-23

_APART = 1.2
"""Times by which the dense network's measured time may differ from its estimate without a word."""


def drop_of(value: float, dense: float, mode: str, max_drop: float | None) -> float:
    """By how much a metric fell short of the dense network's; negative where it is better.

    Where float32 cannot tell the drop from the threshold it is the threshold: 0.9 - 0.89 is above 0.01 otherwise.

    Args:
        value: of the metric; where it is no finite number the drop is infinite.
        dense: of the dense network.
        mode: "max" where higher is better, "min" where lower is.
        max_drop: the threshold; None where there is none.

    >>> drop_of(0.89, 0.9, "max", 0.01), drop_of(float("nan"), 0.9, "max", 0.01)
    (0.01, inf)
    """
    drop = dense - value if mode == "max" else value - dense
    if not math.isfinite(drop):
        return math.inf
    if max_drop is not None and abs(drop - max_drop) <= 2 * _FLOAT32 * max(abs(dense), abs(value)):
        return max_drop
    return drop


@dataclass(frozen=True)
class SearchResult:
    """The fastest network found whose accuracy drops by no more than the threshold, or the nearest to that.

    Args:
        feasible: whether the accuracy of the network that is the result, after recovery, on all validation data,
            drops by no more than `max_drop`.
        metric: that was watched.
        mode: "max" where higher is better.
        max_drop: the threshold, absolute; infinite of a search for a front, which has none: see `front`.
        plan: what is removed.
        accuracy: of the network that is the result.
        dense_accuracy: of the dense network.
        latency_s: estimated seconds of a pass under the plan; NaN where no device profile was given. What is executed
            may lack more: the filters that nothing reads any more, for instance.
        dense_latency_s: likewise, of the dense network.
        measured_latency_s: seconds of a pass, executed; NaN if it was not.
        dense_measured_latency_s: of the dense network, executed beside it.
        evaluations: how often the accuracy of a whole network was measured: of the dense one, of all trials of all
            workers, and at the end to confirm the winner. What recovery validates of its epochs is in `details`.
        objective: what was made small, as the command line spells it.
        cost: of the plan, in `unit`.
        dense_cost: of the network with nothing removed, run by the kernels that suit it best.
        unit: of the costs.
        kernels: name -> kernel that runs it.
        search_accuracy: of the winner before recovery, as the search saw it.
        sparsity: share of the planned weights that is removed.
        nonzeros: weights that remain, of all layers.
        params: weights of all layers.
        macs: multiply-accumulates that remain.
        dense_macs: of the dense network.
        quantization: what candidates were quantised to, "" for nothing: `accuracy` and `search_accuracy` are then those
            of quantised twins, and `dense_accuracy` is that of the dense network in floating point.
        bits: name -> bits of the weight, of the layers that are quantised.
        float_accuracy: of the network that is the result, in floating point; NaN where nothing was quantised.
        quantized_dense_accuracy: of the dense network with all layers quantised; NaN likewise.
        details: anything else worth keeping, as JSON has it: layers, seconds of the phases, the study, the machine.
        model: the network that is the result, before any kernels; not saved.

    >>> nothing = SearchResult.of_nothing("val_acc", "max", 0.01, dense_accuracy=0.1)
    >>> nothing.feasible, len(nothing.plan)
    (False, 0)
    """

    feasible: bool
    metric: str
    mode: str
    max_drop: float
    plan: SparsityPlan
    accuracy: float
    dense_accuracy: float
    latency_s: float = math.nan
    dense_latency_s: float = math.nan
    measured_latency_s: float = math.nan
    dense_measured_latency_s: float = math.nan
    evaluations: int = 0
    objective: str = "latency"
    cost: float = math.nan
    dense_cost: float = math.nan
    unit: str = "s"
    kernels: Mapping[str, str] = field(default_factory=dict)
    search_accuracy: float = math.nan
    sparsity: float = 0.0
    nonzeros: int = 0
    params: int = 0
    macs: int = 0
    dense_macs: int = 0
    quantization: str = ""
    bits: Mapping[str, int] = field(default_factory=dict)
    float_accuracy: float = math.nan
    quantized_dense_accuracy: float = math.nan
    details: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_nothing(cls, metric: str, mode: str, max_drop: float, dense_accuracy: float) -> SearchResult:
        """No plan was evaluated: the dense network, which is no sparse one that is accurate enough."""
        return cls(False, metric, mode, max_drop, SparsityPlan({}), dense_accuracy, dense_accuracy)

    @property
    def drop(self) -> float:
        """By how much the accuracy fell; negative where it rose, infinite where it is no finite number."""
        return drop_of(self.accuracy, self.dense_accuracy, self.mode, self.max_drop)

    @property
    def is_front(self) -> bool:
        """Whether the search was for a front: without a threshold, so that nothing was chosen."""
        return math.isinf(self.max_drop)

    @property
    def front(self) -> Sequence[Mapping[str, Any]]:
        """Of a search without a threshold, the plans of which none is both cheaper and more accurate than another.

        The cheapest first, each with `trial`, `cost`, `accuracy`, `drop` and `plan`, as the search measured them.
        Nobody has chosen among them, so none was recovered, confirmed or executed.
        """
        return tuple(self.details.get("front", ()))

    @property
    def speedup(self) -> float:
        """Dense seconds by pruned seconds, both executed; NaN if they were not."""
        return self.dense_measured_latency_s / self.measured_latency_s

    @property
    def disagreement(self) -> str | None:
        """A sentence about measured milliseconds that are not those of the profile; None where there is nothing to say.

        The dense network tells, where it was calibrated: its estimate is its own time then.
        """
        factor = self.dense_measured_latency_s / self.dense_latency_s if self.dense_latency_s else math.nan
        known = self.details.get("network_calibrated") == "yes" and math.isfinite(factor) and factor > 0
        if not known or abs(math.log(factor)) <= math.log(_APART):
            return None
        slower, other = "the winner was executed", "it was calibrated"
        if factor < 1:
            slower, other = other, slower
        return (
            f"The dense network took {factor:.2f} times its estimate: this machine was probably slower while {slower} "
            f"than while {other}, because of neighbours for example. The speedup holds, as both networks were timed in "
            "turn; for milliseconds that hold calibrate again when the machine is quiet."
        )

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all; what is not known is null."""
        plain = asdict(replace(self, model=None))
        del plain["model"]
        content = {"schema": _SCHEMA, **plain, "plan": self.plan.as_dict(), "drop": self.drop}
        write_text(path, json.dumps(_known(content), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no search result, or of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"it holds {type(content).__name__}")
            if content.pop("schema") != _SCHEMA:
                raise ValueError("another schema")
            content.pop("drop")
            content["plan"] = SparsityPlan(content["plan"])
            defaults = {name for name in content if name.endswith("accuracy")} | {"cost", "dense_cost"}
            if content["max_drop"] is None:
                content["max_drop"] = math.inf
            for name in defaults | {name for name in content if name.endswith("latency_s")}:
                if content[name] is None:
                    content[name] = math.nan
            return cls(**content)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is no search result of schema {_SCHEMA!r} ({error}); run the search again"
            ) from None


def _known(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _known(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
