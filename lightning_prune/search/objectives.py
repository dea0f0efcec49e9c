"""What a search makes small: time, or whatever else a plan costs, as sums over layers and as one number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightning_prune.granularities import Unstructured
from lightning_prune.latency import LatencyEstimator
from lightning_prune.layers import LayerSpec, LayerTable
from lightning_prune.plan import PlanEntry
from lightning_prune.search.space import CostTable, Floats, Ints

__all__ = ["Bytes", "Energy", "Latency", "MACs", "Memory", "Objective", "Parameters", "Throughput", "objective_of"]

Entries = Sequence[Sequence[PlanEntry]]

_JOULES_PER_MAC, _JOULES_PER_BYTE = 4.6e-12, 1.6e-10
"""Of float32, and of main memory, at 45 nm; see `Energy`."""


@dataclass(frozen=True)
class Costs:
    """An objective over the choices of the layers of a table.

    Args:
        tables: as sums, `[layers, choices]`.
        total: of rows of choices, `[n, layers]` -> `[n]`.
    """

    tables: tuple[CostTable, ...]
    total: Callable[[Ints], Floats]


class Objective(ABC):
    """A cost of a network that falls as it is pruned. One of your own says what it costs layer by layer."""

    unit: str
    """Of the cost."""

    @property
    def name(self) -> str:
        """As the command line spells it."""
        return type(self).__name__.lower()

    @abstractmethod
    def costs(self, table: LayerTable, entries: Entries, estimator: LatencyEstimator | None) -> Costs:
        """The costs of every choice of every layer.

        Args:
            table: the layers.
            entries: for each of them its choices, equally many.
            estimator: of the latency, where there is a device profile.

        Raises:
            ValueError: it needs an estimator, and there is none.
        """


class Latency(Objective):
    """Estimated seconds of a pass."""

    unit = "s"

    def costs(self, table: LayerTable, entries: Entries, estimator: LatencyEstimator | None) -> Costs:
        """By the estimator; silenced inputs of later layers count where all choices are of one granularity."""
        if estimator is None:
            raise ValueError(f"objective {self.name!r} needs a device profile; give one that `calibrate` wrote")
        sums: list[Floats] = []
        rest: list[float] = []
        for choice in range(len(entries[0])):
            column = [row[choice] for row in entries]
            shares = torch.tensor([entry.sparsity for entry in column], dtype=torch.float64)
            patterns = tuple(entry.granularity or Unstructured() for entry in column)
            layouts = estimator.layer_latency_s(shares, patterns)
            sums.append(np.stack([seconds.numpy() for seconds, _ in layouts]))
            rest = [rest_s for _, rest_s in layouts]
        tables = np.stack(sums, axis=2)
        found = tuple(CostTable(tables[i], rest[i]) for i in range(len(rest)))
        patterns_met = {entry.granularity or Unstructured() for row in entries for entry in row if entry.sparsity > 0}
        if len(patterns_met) != 1:
            return Costs(found, least_sum(found))
        [pattern] = patterns_met
        levels = np.array([[entry.sparsity for entry in row] for row in entries])
        rows = np.arange(len(entries))

        def total(choices: Ints) -> Floats:
            seconds = estimator.latency_s(torch.from_numpy(levels[rows, choices]), pattern)
            return np.asarray(seconds.numpy(), dtype=np.float64)

        return Costs(found, total)


class Throughput(Latency):
    """Estimated seconds of a pass per example: what is least where most examples are done in a second."""

    unit = "s per example"

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"a pass has at least one example, got batch_size={batch_size!r}")
        self.batch_size = batch_size

    def costs(self, table: LayerTable, entries: Entries, estimator: LatencyEstimator | None) -> Costs:
        """Those of the latency, divided by the examples of a pass."""
        whole = super().costs(table, entries, estimator)
        n = self.batch_size
        return Costs(
            tuple(CostTable(t.costs / n, t.fixed / n) for t in whole.tables), lambda choices: whole.total(choices) / n
        )


class _Additive(Objective):
    """A sum over layers and something fixed."""

    def costs(self, table: LayerTable, entries: Entries, estimator: LatencyEstimator | None) -> Costs:
        """Each layer by itself."""
        values = np.array(
            [[self.layer(spec, e.sparsity) for e in row] for spec, row in zip(table, entries, strict=True)],
            dtype=np.float64,
        )
        tables = (CostTable(values, self.fixed(table)),)
        return Costs(tables, least_sum(tables))

    @abstractmethod
    def layer(self, spec: LayerSpec, sparsity: float) -> float:
        """What a layer costs at a sparsity."""

    def fixed(self, table: LayerTable) -> float:
        """What the rest costs."""
        return 0.0


class MACs(_Additive):
    """Multiply-accumulates that are left."""

    unit = "MACs"

    def layer(self, spec: LayerSpec, sparsity: float) -> float:
        """Those of the weights that are left."""
        return float(spec.kept_macs(sparsity))


class Parameters(_Additive):
    """Weights that are left."""

    unit = "weights"

    def layer(self, spec: LayerSpec, sparsity: float) -> float:
        """Those of the layer."""
        return float(spec.nonzeros(sparsity))


class Bytes(_Additive):
    """Bytes of the weights: 4 each when dense, or 4 a nonzero and a bit a weight that says where, if that is less."""

    unit = "bytes"

    def layer(self, spec: LayerSpec, sparsity: float) -> float:
        """Of the layer's weight."""
        return float(_weight_bytes(spec, sparsity))


class Memory(Bytes):
    """Bytes of the weights and of the largest input and output that a layer holds at once."""

    def fixed(self, table: LayerTable) -> float:
        """The activations, which pruning of single weights does not change."""
        return float(
            max(4 * (math.prod(call.input_shape) + math.prod(call.output_shape)) for s in table for call in s.calls)
        )


@dataclass(frozen=True)
class Energy(_Additive):
    """Joules of a pass: of multiply-accumulates that are left, and of moving weights and activations.

        E = MACs * joules_per_mac + (bytes of weights + bytes of inputs and outputs) * joules_per_byte

    Args:
        joules_per_mac: of a multiplication and addition; by default what the device profile says, and where it says
            nothing that of float32, 4.6 pJ.
        joules_per_byte: of reading or writing main memory; likewise, 160 pJ.

    Raises:
        ValueError: one is negative or not finite.

    Source: Horowitz, "Computing's Energy Problem" (ISSCC 2014), 45 nm: 3.7 + 0.9 pJ; 640 pJ per 4 bytes of DRAM.
    """

    joules_per_mac: float | None = None
    joules_per_byte: float | None = None
    unit = "J"

    def __post_init__(self) -> None:
        """Refuse energies that are none."""
        for what in ("joules_per_mac", "joules_per_byte"):
            value = getattr(self, what)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"an energy is finite and at least 0, got {what}={value!r}")

    def costs(self, table: LayerTable, entries: Entries, estimator: LatencyEstimator | None) -> Costs:
        """Each layer by itself, with the energies of the estimator's device profile unless others were given."""
        if estimator is None:
            return super().costs(table, entries, None)
        profile = estimator.profile
        known = Energy(
            profile.joules_per_mac if self.joules_per_mac is None else self.joules_per_mac,
            profile.joules_per_byte if self.joules_per_byte is None else self.joules_per_byte,
        )
        return known.costs(table, entries, None)

    def layer(self, spec: LayerSpec, sparsity: float) -> float:
        """Of the layer's multiplications and its weight's bytes."""
        per_mac = _JOULES_PER_MAC if self.joules_per_mac is None else self.joules_per_mac
        return spec.kept_macs(sparsity) * per_mac + _weight_bytes(spec, sparsity) * self._per_byte

    def fixed(self, table: LayerTable) -> float:
        """Of the activations."""
        moved = sum(math.prod(call.input_shape) + math.prod(call.output_shape) for s in table for call in s.calls)
        return 4 * moved * self._per_byte

    @property
    def _per_byte(self) -> float:
        return _JOULES_PER_BYTE if self.joules_per_byte is None else self.joules_per_byte


OBJECTIVES: dict[str, Callable[[int], Objective]] = {
    "latency": lambda batch_size: Latency(),
    "throughput": Throughput,
    "macs": lambda batch_size: MACs(),
    "parameters": lambda batch_size: Parameters(),
    "bytes": lambda batch_size: Bytes(),
    "memory": lambda batch_size: Memory(),
    "energy": lambda batch_size: Energy(),
}
"""Name on the command line -> the objective, for a batch size."""


def objective_of(objective: str | Objective, batch_size: int) -> Objective:
    """An objective by its name, or as it is.

    Args:
        objective: a name of `OBJECTIVES`, or an `Objective`.
        batch_size: examples in a pass.

    Raises:
        ValueError: it is neither.

    >>> objective_of("latency", 1).unit
    's'
    """
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective is one of {sorted(OBJECTIVES)} or an Objective, got {objective!r}")
    return OBJECTIVES[objective](batch_size)


def _weight_bytes(spec: LayerSpec, sparsity: float) -> int:
    """Of float32, dense or with a bit a weight that says where the nonzeros are."""
    return min(4 * spec.params, 4 * spec.nonzeros(sparsity) + math.ceil(spec.params / 8))


def least_sum(tables: Sequence[CostTable]) -> Callable[[Ints], Floats]:
    """The least of sums over layers, for rows of choices, `[n, layers]` -> `[n]`."""
    rows = np.arange(len(tables[0].costs))

    def total(choices: Ints) -> Floats:
        sums = np.stack([table.costs[rows, choices].sum(axis=-1) + table.fixed for table in tables])
        return np.asarray(sums.min(axis=0), dtype=np.float64)

    return total
