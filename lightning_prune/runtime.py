"""Runs a pruned network with the fastest kernel for each layer, and proves that it does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.files import write_file
from lightning_prune.folding import fold_batch_norm
from lightning_prune.kernels import KERNELS, LAYOUTS, NCHW, NHWC, Dense, LayerKernel, Workload, measured_occupancy
from lightning_prune.latency.calibration import executed, in_layout, inference_copy, inputs_in_layout, placement
from lightning_prune.latency.context import TimedLayer
from lightning_prune.latency.estimator import LatencyEstimator
from lightning_prune.latency.fitted import FittedCost
from lightning_prune.latency.machine import Machine
from lightning_prune.latency.passes import put, replaced
from lightning_prune.latency.profile import DeviceProfile, runnable
from lightning_prune.latency.timing import interleaved, synchroniser
from lightning_prune.layers import LayerTable, layer_table
from lightning_prune.silence import Border, Layer, drop_constant_inputs
from lightning_prune.tracing import call

__all__ = ["AcceleratedModel", "KernelReport", "accelerate"]

_SCHEMA = "lightning-prune/accelerated/1"

_NEAR = 1.15
"""Kernels estimated to take at most this much longer than the best are timed beside it."""

_WORTH = 0.98
"""A sparse kernel is taken if it needs at most this share of the dense time; less is within the noise."""

_ROUNDS = 9


@dataclass(frozen=True)
class LayerReport:
    """How one layer is run.

    Args:
        layer: name of its weight.
        sparsity: share of its weights that are zero.
        kernel: that runs it.
        estimated_s: by the profile; NaN without one.
        measured_s: in the context of a pass.
        dense_s: of the dense layer in the same context.
        pays_from: sparsity from which a sparse kernel beats dense, zeros anywhere; infinite if none does, NaN
            without a profile.
    """

    layer: str
    sparsity: float
    kernel: str
    estimated_s: float
    measured_s: float
    dense_s: float
    pays_from: float


@dataclass(frozen=True)
class KernelReport:
    """How a network is run, layer by layer, and how long it takes.

    Args:
        layers: in execution order.
        layout: of the activations.
        estimated_s: of a whole pass; NaN without a profile.
        measured_s: of a whole pass.
        dense_s: of a whole pass of the dense network, in its faster layout.
        relative_error: greatest difference from the dense network's outputs, relative to their greatest.
    """

    layers: tuple[LayerReport, ...]
    layout: str
    estimated_s: float
    measured_s: float
    dense_s: float
    relative_error: float

    def __str__(self) -> str:
        """A table."""
        rows = [("layer", "sparsity", "kernel", "estimated ms", "measured ms", "dense ms", "pays from")]
        rows += [
            (
                layer.layer,
                f"{layer.sparsity:.3f}",
                layer.kernel,
                _ms(layer.estimated_s),
                _ms(layer.measured_s),
                _ms(layer.dense_s),
                "never" if layer.pays_from == math.inf else "" if math.isnan(layer.pays_from) else f"{layer.pays_from:.2f}",
            )
            for layer in self.layers
        ]
        rows.append(("network", "", self.layout, _ms(self.estimated_s), _ms(self.measured_s), _ms(self.dense_s), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


class AcceleratedModel(nn.Module):
    """A network for inference whose layers are run by chosen kernels; call it like the model it was made from.

    Args:
        network: with BatchNorm folded, and kernels in the places of layers.
        layout: of the activations.
        report: how it was chosen.
        prepared: the state that the kernels were built from, and what `load` needs beside it.
    """

    def __init__(self, network: nn.Module, layout: str, report: KernelReport, prepared: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.layout = network, layout
        self._report, self._prepared = report, prepared

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the dense network gives, up to rounding."""
        if self.layout == NHWC:
            args, kwargs = inputs_in_layout((args, kwargs), self.layout)
        return self.network(*args, **kwargs)

    def kernel_report(self) -> KernelReport:
        """Which kernel runs each layer, and the times."""
        return self._report

    def save(self, path: str | Path) -> None:
        """Write weights and the choice of kernels, whole or not at all; `load` reads them without unpickling code."""
        report = asdict(self._report)
        content = {"schema": _SCHEMA, "layout": self.layout, "report": report, **self._prepared}
        write_file(path, lambda file: torch.save(content, file))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, kernels: Sequence[LayerKernel] = KERNELS) -> AcceleratedModel:
        """Build the accelerated network again.

        Args:
            path: that `save` wrote.
            model: of the same class and sizes as the one that was accelerated; its weights do not matter.
            kernels: those that it may have been built from.

        Raises:
            ValueError: the file is none of ours, or the model is another.
        """
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a whole accelerated model: {error}") from None
        if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
            raise ValueError(f"{path} is no accelerated model of schema {_SCHEMA!r}; save it again with this version")
        by_name = {kernel.name: kernel for kernel in kernels}
        if unknown := set(content["kernels"].values()) - set(by_name):
            raise ValueError(f"{path} needs kernels {sorted(unknown)}; pass them as kernels=(*KERNELS, yours)")
        prepared = inference_copy(model)
        try:
            for name in content["folded"]:
                put(prepared, name, nn.Identity())
            for name, tensor in content["state"].items():
                owner, _, attribute = name.rpartition(".")
                if attribute == "bias" and getattr(prepared.get_submodule(owner), "bias", tensor) is None:
                    prepared.get_submodule(owner).bias = nn.Parameter(torch.zeros_like(tensor), requires_grad=False)
            prepared.load_state_dict(content["state"])
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} was saved from another model than {type(model).__name__}: {error}") from None
        borders = {
            name: Border(layer, weight, values, layer)
            for name, (weight, values) in content["borders"].items()
            if isinstance(layer := prepared.get_submodule(name), nn.Conv2d)
        }
        network = in_layout(prepared, content["layout"])
        for name, kernel in content["kernels"].items():
            layer = prepared.get_submodule(name)
            put(network, name, _built(by_name[kernel], layer, borders.get(name)))  # type: ignore[arg-type]
        report = dict(content["report"])
        layers = tuple(LayerReport(**layer) for layer in report.pop("layers"))
        kept = {key: content[key] for key in ("kernels", "folded", "state", "borders")}
        return cls(network, content["layout"], KernelReport(layers=layers, **report), kept)


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    profile: DeviceProfile | str | Path | None = None,
    *,
    kernels: Sequence[LayerKernel] = KERNELS,
    tolerance: float = 1e-4,
    rounds: int = _ROUNDS,
) -> AcceleratedModel:
    """Run each layer of a pruned model with the kernel that is fastest on this machine.

    BatchNorm is folded, weights that meet constant inputs are dropped, and for each memory layout every layer gets
    its fastest kernel by the profile's estimate. Kernels estimated to be within 15 % of the best are timed against each
    other in full passes, and all are without a profile. The network that is then fastest as a whole is kept: the dense
    one, in its faster layout, wherever zeros do not pay.

    Args:
        model: with zeros in its weights; it is not changed.
        example_inputs: as for `layer_table`; times are for its batch size, the result takes any.
        profile: of this machine, or the path of one.
        kernels: to choose from.
        tolerance: by how much outputs may differ from the dense model's, relative to their greatest.
        rounds: each timing is the least of so many.

    Returns:
        A module for inference; `kernel_report()` says what was chosen.

    Raises:
        ValueError: the profile is for another machine, thread count or type; or the model does not run on the example.

    Warns:
        UserWarning: sparse kernels gave other outputs than the dense model and are not used.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    >>> _ = model[0].weight.data.mul_(torch.rand(512, 512) < 0.02)
    >>> fast = accelerate(model, torch.ones(64, 512))
    >>> bool(torch.allclose(fast(torch.ones(3, 512)), model(torch.ones(3, 512)), atol=1e-5))
    True
    """
    original = inference_copy(model)
    device, dtype = placement(original)
    if isinstance(profile, str | Path):
        profile = DeviceProfile.load(profile, kernels)
    if profile is not None:
        profile.require(Machine.here(device, dtype))
    inputs = tree_map_only(Tensor, lambda x: x.to(device), example_inputs)
    prepared = inference_copy(original)
    table = layer_table(prepared, inputs)
    with torch.inference_mode():
        expected = call(original, inputs)
    folded = fold_batch_norm(prepared, inputs)
    works = {name.rpartition(".")[0]: calls for name, calls in executed(prepared, inputs, runnable(table)).items()}
    layers: dict[str, Layer] = {name: prepared.get_submodule(name) for name in works}  # type: ignore[misc]
    once = {name: layer for name, layer in layers.items() if len(works[name]) == 1}
    borders = drop_constant_inputs(prepared, inputs, once)
    choice = _Choice(prepared, inputs, works, layers, borders, kernels, profile, table, rounds, device, dtype)
    best = choice.fastest(original)
    error = _difference(expected, best.run(inputs))
    if error > tolerance:
        warnings.warn(
            f"the sparse kernels' outputs differ from the dense model's by {error:.1e}, more than tolerance={tolerance:g}"
            " allows: the dense network is used. A forward that depends on its data can be the reason",
            stacklevel=2,
        )
        best = choice.dense(NCHW)
        error = _difference(expected, best.run(inputs))
        if error > tolerance:  # even folding changed them
            prepared, folded, borders = original, [], {}
            best = _Candidate(inference_copy(original), NCHW, {}, choice.dense_s)
            error = 0.0
    report = choice.report(best, error)
    kept = {
        "kernels": {name: kernel.name for name, kernel in best.kernels.items()},
        "folded": folded,
        "state": {name: tensor.detach().clone() for name, tensor in prepared.state_dict().items()},
        "borders": {name: (border.weight, border.values) for name, border in borders.items()},
    }
    return AcceleratedModel(best.network, best.layout, report, kept)


@dataclass
class _Candidate:
    """A whole network with its kernels."""

    network: nn.Module
    layout: str
    kernels: Mapping[str, LayerKernel]
    seconds: float = math.nan

    def run(self, inputs: Any) -> Any:
        with torch.inference_mode():
            return call(self.network, inputs_in_layout(inputs, self.layout))


class _Choice:
    """Finds the fastest kernels for a prepared network."""

    def __init__(
        self,
        prepared: nn.Module,
        inputs: Any,
        works: Mapping[str, tuple[Workload, ...]],
        layers: Mapping[str, Layer],
        borders: Mapping[str, Border],
        kernels: Sequence[LayerKernel],
        profile: DeviceProfile | None,
        table: LayerTable,
        rounds: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.prepared, self.inputs, self.works, self.layers = prepared, inputs, works, layers
        self.borders, self.kernels, self.profile, self.table = borders, kernels, profile, table
        self.rounds, self.device, self.dtype = rounds, device, dtype
        self.estimator = None if profile is None else LatencyEstimator(table, profile)
        self.dense_s = math.nan
        self.dense_layers: dict[str, dict[str, float]] = {}

    def fastest(self, original: nn.Module) -> _Candidate:
        """The fastest of the dense networks and the best sparse one of each layout, all executed."""
        candidates = {f"dense-{layout}": self.dense(layout) for layout in self._layouts()}
        for layout in self._layouts():
            chosen = self._chosen(layout)
            if any(kernel.uses_sparsity for kernel in chosen.values()):
                candidates[f"sparse-{layout}"] = self._assembled(layout, chosen)
        synchronise = synchroniser(self.device)

        def runner(candidate: _Candidate) -> Any:
            inputs = inputs_in_layout(self.inputs, NCHW)

            def run() -> None:
                candidate.run(inputs)
                synchronise()

            return run

        runs = {name: runner(candidate) for name, candidate in candidates.items()}
        timings = interleaved(runs, max(self.rounds, 9))
        for name, timing in timings.items():
            candidates[name].seconds = timing.best_s
        self.dense_s = min(c.seconds for name, c in candidates.items() if name.startswith("dense"))
        best = min(candidates.values(), key=lambda c: c.seconds * (1.0 if _sparse(c) else _WORTH))
        return best

    def dense(self, layout: str) -> _Candidate:
        """The network without sparse kernels."""
        return self._assembled(layout, {name: Dense(layout) for name in self.layers})

    def report(self, best: _Candidate, error: float) -> KernelReport:
        """What was chosen, with the times of each layer in passes of the chosen and of the dense network."""
        dense = self.dense(best.layout)
        chosen_s, dense_s = self._in_context(best), self._in_context(dense)
        pays = self.estimator.break_even() if self.estimator is not None else None
        rows = []
        estimated = math.nan
        if self.estimator is not None and best.kernels:
            estimated = self.estimator.fixed_s(best.layout)
        for name, layer in self.layers.items():
            kernel = best.kernels.get(name)
            seconds = math.nan if kernel is None else self._estimate(name, kernel)
            estimated += seconds
            row = self.table.names.index(f"{name}.weight")
            rows.append(
                LayerReport(
                    f"{name}.weight",
                    float((layer.weight == 0).double().mean()),
                    "dense" if kernel is None else kernel.name,
                    seconds,
                    chosen_s[name],
                    dense_s[name],
                    math.nan if pays is None else float(pays[row]),
                )
            )
        return KernelReport(tuple(rows), best.layout, estimated, best.seconds, self.dense_s, error)

    def _layouts(self) -> tuple[str, ...]:
        images = any(work.kind == "conv2d" for calls in self.works.values() for work in calls)
        return LAYOUTS if images else LAYOUTS[:1]

    def _assembled(self, layout: str, chosen: Mapping[str, LayerKernel]) -> _Candidate:
        network = in_layout(self.prepared, layout)
        for name, kernel in chosen.items():
            put(network, name, _built(kernel, self.layers[name], self.borders.get(name)))
        return _Candidate(network, layout, dict(chosen))

    def _usable(self, name: str, layout: str) -> list[LayerKernel]:
        """Kernels that run a layer in a layout, the dense one first."""
        dense = Dense(layout if isinstance(self.layers[name], nn.Conv2d) else NCHW)
        others = [
            kernel
            for kernel in self.kernels
            if kernel.uses_sparsity
            and (kernel.layout == layout or isinstance(self.layers[name], nn.Linear))
            and not any(kernel.refuses(work, self.dtype, self.device) for work in self.works[name])
            and kernel.refuses_weight(self.layers[name].weight) is None
        ]
        return [dense, *others]

    def _chosen(self, layout: str) -> dict[str, LayerKernel]:
        """The fastest kernel of each layer: by the estimate, near-ties by time."""
        rivals: dict[str, list[LayerKernel]] = {}
        for name, layer in self.layers.items():
            usable = self._usable(name, layout)
            if not (layer.weight == 0).any():
                usable = usable[:1]
            elif self.profile is not None:
                estimates = {kernel: self._estimate(name, kernel) for kernel in usable}
                least = min(value for value in estimates.values() if not math.isnan(value))
                usable = [kernel for kernel in usable if estimates[kernel] <= _NEAR * least]
            rivals[name] = usable
        contested = {name: kernels for name, kernels in rivals.items() if len(kernels) > 1}
        chosen = {name: kernels[0] for name, kernels in rivals.items()}
        if contested:
            times = self._contest(layout, chosen, contested)
            for name, kernels in contested.items():
                dense_first = [
                    seconds * (1.0 if kernel.uses_sparsity else _WORTH)
                    for kernel, seconds in zip(kernels, times[name], strict=True)
                ]
                chosen[name] = kernels[dense_first.index(min(dense_first))]
        return chosen

    def _contest(
        self, layout: str, chosen: Mapping[str, LayerKernel], contested: Mapping[str, Sequence[LayerKernel]]
    ) -> dict[str, list[float]]:
        """Least seconds of rival kernels, timed in passes in which the other layers vary too."""
        candidate = self._assembled(layout, chosen)
        timed = {
            name: TimedLayer(
                [_built(kernel, self.layers[name], self.borders.get(name)) for kernel in kernels], self.device
            )
            for name, kernels in contested.items()
        }
        most = max(len(kernels) for kernels in contested.values())
        with replaced(candidate.network, timed):
            for turn in range(most * (self.rounds + 1)):
                for shift, layer in enumerate(timed.values()):
                    layer.begin(turn + shift)
                candidate.run(self.inputs)
        return {
            name: [sum(min(times[1:]) for times in calls) for calls in layer.seconds] for name, layer in timed.items()
        }

    def _in_context(self, candidate: _Candidate) -> dict[str, float]:
        """Least seconds of each layer in passes of a network."""
        timed = {name: TimedLayer([candidate.network.get_submodule(name)], self.device) for name in self.layers}
        with replaced(candidate.network, timed):
            for _ in range(self.rounds + 1):
                for layer in timed.values():
                    layer.begin(0)
                candidate.run(self.inputs)
        return {name: sum(min(times[1:]) for times in layer.seconds[0]) for name, layer in timed.items()}

    def _estimate(self, name: str, kernel: LayerKernel) -> float:
        """Seconds of a layer as it is; NaN if the profile does not know the kernel."""
        cost = self.profile.costs.get(kernel.name) if self.profile is not None else None
        if self.profile is None or not isinstance(cost, FittedCost):
            return math.nan
        if any(self.profile.refuses(cost, work) for work in self.works[name]):
            return math.nan
        left = measured_occupancy(self.layers[name].weight)
        source = self.estimator.source if self.estimator is not None else None
        return sum(float(cost.seconds(work, left, source)) for work in self.works[name])


def _built(kernel: LayerKernel, layer: Layer, border: Border | None) -> nn.Module:
    built = kernel.build(layer)
    if border is None or not isinstance(layer, nn.Conv2d):
        return built
    return Border(built, border.weight, border.values, layer)


def _sparse(candidate: _Candidate) -> bool:
    return any(kernel.uses_sparsity for kernel in candidate.kernels.values())


def _difference(expected: Any, given: Any) -> float:
    """Greatest difference of two outputs, relative to the greatest expected number."""
    worst = 0.0
    for one, other in zip(tree_leaves(expected), tree_leaves(given), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
            scale = max(float(one.abs().max()), 1e-30)
            difference = float((one.double() - other.double()).abs().max()) / scale
            worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _ms(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds * 1e3:.4g}"
