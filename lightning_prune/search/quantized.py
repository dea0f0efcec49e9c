"""Quantisation in a search: candidates measured as twins, and the width of each layer among what is chosen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.folding import fold_batch_norm
from lightning_prune.latency import LatencyEstimator
from lightning_prune.layers import LayerTable
from lightning_prune.plan import PlanEntry
from lightning_prune.preparation import inference_copy
from lightning_prune.quantization.execution import INT8
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import quantizable, quantized_layers, quantized_twin
from lightning_prune.search.layer_space import layer_rows
from lightning_prune.search.objectives import Costs, Latency, Objective, least_sum
from lightning_prune.search.space import CostTable, Floats
from lightning_prune.targets import closest
from lightning_prune.tracing import call

_BATCHES = 4
"""On which output errors of quantised layers are measured."""

_TIE = 1e-12
"""Error for which one of two choices that are equally accurate is not taken."""


@dataclass(frozen=True)
class Quantization:
    """How the candidates of a search are quantised.

    Args:
        name: of it.
        settings: of the layers that are.
        mixed: whether each layer is either quantised and dense, or in floating point with its zeros, as it is chosen;
            otherwise all layers are quantised, whatever their zeros.
    """

    name: str
    settings: QuantizationSettings
    mixed: bool = False


QUANTIZATIONS: dict[str, Quantization] = {
    found.name: found
    for found in (
        Quantization("int8", INT8),
        Quantization("int8_asymmetric", QuantizationSettings()),
        Quantization("int8_symmetric", QuantizationSettings(scheme="symmetric")),
        Quantization("int4", QuantizationSettings(bits=4, activation_bits=8)),
        Quantization("mixed", INT8, mixed=True),
    )
}
"""Name on the command line -> the quantisation. Kernels run "int8" and "mixed" on every x86 processor."""


def quantization_of(quantize: str | QuantizationSettings | Quantization) -> Quantization:
    """A quantisation by its name, of settings, or as it is.

    Raises:
        ValueError: it is none of these.

    >>> quantization_of("mixed").mixed, quantization_of(QuantizationSettings(bits=6)).name
    (True, 'settings')
    """
    if isinstance(quantize, Quantization):
        return quantize
    if isinstance(quantize, QuantizationSettings):
        return Quantization("settings", quantize)
    if not isinstance(quantize, str) or quantize not in QUANTIZATIONS:
        near = f"; closest: {closest(quantize, QUANTIZATIONS)}" if isinstance(quantize, str) else ""
        raise ValueError(
            f"quantize is one of {sorted(QUANTIZATIONS)} or a QuantizationSettings, got quantize={quantize!r}{near}"
        )
    return QUANTIZATIONS[quantize]


def require_quantizable(quantization: Quantization, model: nn.Module, objective: Objective) -> None:
    """Refuse, before any work, what cannot be quantised so.

    Raises:
        ValueError: settings name layers that there are not, or widths are to be chosen though the objective does not
            depend on them.
    """
    quantization.settings.check(quantizable(model))
    if quantization.mixed and not isinstance(objective, Latency):
        raise ValueError(
            f"quantize='mixed' lets the time of each layer decide whether it is quantised, and {objective.name!r} does "
            "not depend on it: give objective 'latency' or 'throughput', or quantize='int8', which quantises all layers"
        )


@dataclass(frozen=True)
class QuantizedEntry(PlanEntry):
    """A layer with all its weights, quantised."""


def with_quantized(choices: Mapping[str, Sequence[PlanEntry]]) -> dict[str, tuple[PlanEntry, ...]]:
    """One more choice for every layer, the last: dense and quantised. The first one stays that of the dense network."""
    return {name: (*entries, QuantizedEntry(0.0)) for name, entries in choices.items()}


def quantized_costs(
    objective: Objective,
    table: LayerTable,
    rows: Sequence[Sequence[PlanEntry]],
    exact: LatencyEstimator | None,
    quantized: LatencyEstimator | None,
    mixed: bool,
) -> Costs:
    """The costs of choices, of which the first is dense and the last dense and quantised.

    The first costs what exact kernels take, the last what is least of all kernels; so do pruned layers where all layers
    are quantised, and what exact kernels take where they are not. Filters that silence later layers do not count.

    Args:
        objective: what is to be small.
        table: of the network.
        rows: choices of every layer.
        exact: estimates with exact kernels alone.
        quantized: estimates with all kernels.
        mixed: as of `Quantization`.
    """
    plain, whole = (objective.costs(table, rows, estimator) for estimator in (exact, quantized))
    tables = []
    for one, other in zip(plain.tables, whole.tables, strict=True):
        costs = (one if mixed else other).costs.copy()
        costs[:, 0], costs[:, -1] = one.costs[:, 0], other.costs[:, -1]
        tables.append(CostTable(costs, one.fixed))
    return Costs(tuple(tables), least_sum(tables))


class QuantizedSearch:
    """What a search that quantises has beside one that does not: choices, costs, errors and twins.

    Args:
        quantization: what is quantised, and how.
        network: dense; it is not changed.
        table: of the network.
        objective: what is to be small.
        choices: of the layers that are searched, the first one dense.
        exact: estimates with exact kernels alone.

    Attributes:
        choices: those, and dense and quantised as the last.
        costs: of them, for all layers of the table.

    Raises:
        ValueError: settings name layers that there are not, or widths are to be chosen though the objective does not
            depend on them or no kernel is known that does.
    """

    def __init__(
        self,
        quantization: Quantization,
        network: nn.Module,
        table: LayerTable,
        objective: Objective,
        choices: Mapping[str, Sequence[PlanEntry]],
        exact: LatencyEstimator | None,
    ) -> None:
        require_quantizable(quantization, network, objective)
        self.quantization, self.network, self.table = quantization, network, table
        whole = None if exact is None else LatencyEstimator(table, exact.profile, quantized=True)
        if quantization.mixed and (exact is None or whole is None or whole.kernels == exact.kernels):
            raise ValueError(
                "quantize='mixed' needs kernels in integers, and the device profile knows none: calibrate with "
                "kernels=ALL_KERNELS, or give quantize='int8', which needs none"
            )
        self.choices = with_quantized(choices)
        self._rows = layer_rows(table, self.choices)
        self.costs = quantized_costs(objective, table, self._rows, exact, whole, quantization.mixed)
        self._seconds: Costs | None = None
        if exact is not None:
            self._seconds = quantized_costs(Latency(), table, self._rows, exact, whole, quantization.mixed)
        self._layers = list(quantizable(network))

    def errors(self, errors: Floats, names: Sequence[str], batches: Iterable[Any]) -> Floats:
        """Output errors of the choices, of which the last's were not known; the dense network is quantised for them.

        Where all layers are quantised, that does not tell choices apart: of two that are alike the cheaper is taken.

        Args:
            errors: `[names, choices]`.
            names: of the searched weights.
            batches: calibration inputs, read for every twin.

        Warns:
            UserWarning: as for `quantize`, once.
        """
        self._batches, self._searched = batches, [name.rpartition(".")[0] for name in names]
        self.dense_twin = quantized_twin(self.network, batches, self.quantization.settings, call)
        found: Floats = errors.copy()
        if self.quantization.mixed:
            found[:, -1] = output_errors(self.network, self.dense_twin, self._searched, islice(batches, _BATCHES))
        else:
            found[:, 0], found[:, -1] = _TIE, 0.0
        return found

    def twin(self, network: nn.Module, chosen: Sequence[int]) -> nn.Module:
        """The twin of a candidate, or the candidate itself where nothing of it is quantised.

        Args:
            network: in floating point; it is not changed.
            chosen: for each of the searched layers.
        """
        settings = self.quantization.settings
        if self.quantization.mixed:
            last = len(self._rows[0]) - 1
            integer = {name for name, choice in zip(self._searched, chosen, strict=True) if choice == last}
            if not integer:
                return network
            settings = replace(settings, exclude=[name for name in self._layers if name not in integer])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that stay in floating point; the first twin said so
            return quantized_twin(network, self._batches, settings, call)

    def estimated_s(self, chosen: Mapping[str, int]) -> float:
        """Seconds of a pass, by name of the weight the choice; NaN without a device profile."""
        if self._seconds is None:
            return math.nan
        return float(self._seconds.total(np.array([[chosen.get(name, 0) for name in self.table.names]]))[0])

    def confirmed(self, winner: nn.Module, twin: nn.Module, measure: Callable[[nn.Module], float]) -> dict[str, Any]:
        """What a result says of the winner beside the accuracy of its twin."""
        return {
            "bits": widths(twin),
            "float_accuracy": measure(winner),
            "quantized_dense_accuracy": measure(self.dense_twin),
        }


def output_errors(network: nn.Module, twin: nn.Module, names: Sequence[str], batches: Iterable[Any]) -> Floats:
    """How far quantisation alone moves the outputs of each layer, relative to their power.

        e = E|y^ - y|^2 / E|y - b|^2

    where `y^` is the output for the same input, with input and weight rounded, and `b` the bias.

    Args:
        network: in floating point; it is not changed.
        twin: of it.
        names: of layers; the error of one that is not quantised is infinite.
        batches: inputs.
    """
    plain, batches = inference_copy(network), list(batches)
    fold_batch_norm(plain, batches[0])
    quantized = quantized_layers(twin)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in names if name in quantized}

    def note(name: str) -> Any:
        def after(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            power = output
            if layer.bias is not None:
                power = output - layer.bias.view(-1, *[1] * (0 if isinstance(layer, nn.Linear) else 2))
            moved = quantized[name](*args, **kwargs) - output
            sums[name] += torch.stack([x.double().square().sum() for x in (moved, power)]).cpu()

        return after

    handles = [plain.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in sums]
    try:
        with torch.no_grad():
            for batch in batches:
                call(plain, batch)
    finally:
        for handle in handles:
            handle.remove()
    least = torch.finfo(torch.float64).tiny
    found = {name: float(moved / power.clamp_min(least)) for name, (moved, power) in sums.items()}
    errors: Floats = np.array([found.get(name, np.inf) for name in names], dtype=np.float64)
    return errors


def widths(twin: nn.Module) -> dict[str, int]:
    """Name of the weight -> its bits, of the quantised layers."""
    return {
        f"{name}.weight": layer.quantizers.weight.quantizer.grid.bits for name, layer in quantized_layers(twin).items()
    }
