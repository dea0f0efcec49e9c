"""Recovery without training: a pruned network is repaired layer by layer on calibration batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batch_norm import reestimate_batch_norm
from lightning_prune.calibration_batches import Enough, each, run
from lightning_prune.input_statistics import (
    POSITIONS,
    Layer,
    LayerStatistics,
    Moments,
    chosen,
    each_layer_statistics,
    generator_of,
    hooked,
    in_passes,
    layer_statistics,
    outputs_of,
    patches_of,
    places_of,
    repairable,
    require_known,
    require_repeatable,
    require_room,
)
from lightning_prune.least_squares import (
    DAMPING,
    OutputError,
    check_mask,
    check_number,
    error_of,
    least_squares,
    output_error,
    power,
)
from lightning_prune.preparation import inference_copy
from lightning_prune.targets import parameters

__all__ = [
    "DenseOutputs",
    "LayerStatistics",
    "OutputError",
    "Reconstruction",
    "Repaired",
    "each_layer_statistics",
    "layer_statistics",
    "least_squares",
    "output_error",
    "reconstruct",
    "reestimate_batch_norm",
    "repair",
]


@dataclass(frozen=True)
class Repaired:
    """A weight whose kept entries do the work of the removed ones.

    Args:
        weight: as the dense one, zero where removed.
        bias: refitted, None where there is none or it stays.
        error: of the outputs, on the calibration data.
    """

    weight: Tensor
    bias: Tensor | None
    error: OutputError


@dataclass(frozen=True)
class Reconstruction:
    """A pruned and repaired network, as values.

    Args:
        tensors: parameter name -> its new values, for every mask and every refitted bias.
        errors: name -> error of the outputs against the dense network, of the layers that were repaired.
        skipped: name -> why it was masked only.
    """

    tensors: Mapping[str, Tensor]
    errors: Mapping[str, OutputError]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Put the values into a model, in place.

        Raises:
            ValueError: it lacks one of the parameters.
        """
        own = parameters(model)
        require_known(self.tensors, own)
        with torch.no_grad():
            for name, value in self.tensors.items():
                own[name].copy_(value)


@dataclass
class DenseOutputs:
    """What layers of a dense network give on the calibration batches, remembered for repairs under further masks.

    It holds for one network, its batches, `max_positions` and `seed`; the outputs of up to `max_positions` per call
    stay in memory. With it, a sequential repair takes one partial pass per layer.
    """

    calls: dict[str, int] = field(default_factory=dict)
    by_layer: dict[str, list[list[tuple[Tensor, Tensor]]]] = field(default_factory=dict)
    """Name -> for each batch, for each call the positions drawn and the outputs there."""


def repair(
    weight: Tensor,
    masks: Iterable[Tensor],
    statistics: LayerStatistics,
    *,
    bias: Tensor | None = None,
    centred: bool = False,
    damping: float = DAMPING,
    max_bytes: int = 2**28,
) -> list[Repaired]:
    """Repair one layer for several masks, say one per sparsity level, and say what each costs.

    Args:
        weight: dense.
        masks: bool, of its shape.
        statistics: of its inputs.
        bias: of the layer; where given it is refitted, `b' = b + (W - W') E[x]`.
        centred: whether constant shifts of the outputs count for nothing although no bias is given, since a BatchNorm
            behind the layer will be re-estimated.
        damping: as for `least_squares`.
        max_bytes: as for `least_squares`.

    Returns:
        One per mask, in their order.

    Raises:
        ValueError: as `least_squares` does.

    >>> gram = LayerStatistics("fc.weight", torch.eye(2)[None], torch.zeros(1, 2), positions=8)
    >>> done = repair(torch.tensor([[3.0, 4.0]]), [torch.tensor([[False, True]])], gram, damping=0.0)
    >>> done[0].weight.tolist(), done[0].error.relative
    ([[0.0, 4.0]], 0.36)
    """
    gram = statistics.covariance() if centred or bias is not None else statistics.gram
    done = []
    for mask in masks:
        new = least_squares(weight, mask, gram, damping=damping, max_bytes=max_bytes)
        shifted = None
        if bias is not None:
            lost = (weight - new).detach().flatten(1).to(gram)
            shifted = (bias.detach() + _at_mean(lost, statistics.mean).to(bias)).to(bias.dtype)
        done.append(Repaired(new, shifted, output_error(weight, new, gram)))
    return done


def _at_mean(rows: Tensor, mean: Tensor) -> Tensor:
    """`W E[x]`, `[out]`."""
    return torch.bmm(rows.view(len(mean), -1, rows.shape[1]), mean.unsqueeze(2)).flatten()


def reconstruct(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    sequential: bool = True,
    refit_bias: bool = True,
    damping: float = DAMPING,
    max_positions: int = POSITIONS,
    max_bytes: int = 2**31,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    remember: DenseOutputs | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Reconstruction:
    """Prune a network by masks and repair it layer by layer, without training.

    Sequentially, in execution order, every layer is fitted to the outputs it has in the dense network, on the inputs
    `x'` it gets from the layers repaired before, `min E[(w' x' - w x)^2]`: errors are made good downstream. That takes
    two partial passes over the batches per layer. Otherwise each layer is fitted on the inputs of the dense network, in
    one pass for all.

    Args:
        model: dense; it is left as it was.
        masks: parameter name -> bool, True where kept. Parameters of other layers than Linear and Conv2d, and of
            layers that are not called, are masked only.
        batches: as for `layer_statistics`; read several times unless there is one pass.
        sequential: see above.
        refit_bias: whether biases are fitted, too, unless they have a mask or belong to several layers.
        damping: as for `least_squares`.
        max_positions: per call of a layer.
        max_bytes: of the moments held at a time.
        dtype: of the moments.
        seed: of the positions drawn.
        remember: outputs of the dense network, to be used and added to, where several masks are tried in turn.
        progress: called as `progress(done, total, name)` after every layer.

    Raises:
        ValueError: as `layer_statistics` and `least_squares`, for masks of unknown names or other shapes, too.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> mask = torch.arange(32).reshape(8, 4) % 2 == 0
    >>> found = reconstruct(model, {"0.weight": mask}, [torch.rand(64, 4)])
    >>> bool((found.tensors["0.weight"][~mask] == 0).all()), list(found.tensors), found.errors["0.weight"].relative < 1
    (True, ['0.weight', '0.bias'], True)
    """
    own = parameters(model)
    require_known(masks, own)
    for name, mask in masks.items():
        if mask.shape != own[name].shape:
            raise ValueError(f"the mask of {name!r} has shape {list(mask.shape)}, the weight {list(own[name].shape)}")
        check_mask(mask)
    check_number("damping", damping)
    usable, reasons = repairable(model)
    skipped = {name: reason for name, reason in reasons.items() if name in masks}
    layers = {name: layer for name, layer in usable.items() if name in masks}
    tensors = {name: torch.where(mask.to(own[name].device), own[name].detach(), 0) for name, mask in masks.items()}
    repairs = _Repairs(masks, tensors, refit_bias, damping)
    if layers:
        picked = chosen(model, layers, max_positions)
        given = (model, picked, batches, repairs, max_positions, max_bytes, dtype, seed)
        steps = _sequentially(*given, remember) if sequential else _independently(*given)
        for count, name in enumerate(steps, 1):
            if progress is not None:
                progress(count, len(layers), name)
    called = repairs.errors
    skipped |= {name: "its layer is never called on the calibration batches" for name in layers if name not in called}
    return Reconstruction(repairs.tensors, repairs.errors, skipped)


@dataclass
class _Repairs:
    """What was repaired so far."""

    masks: Mapping[str, Tensor]
    tensors: dict[str, Tensor]
    refit_bias: bool
    damping: float
    errors: dict[str, OutputError] = field(default_factory=dict)

    def bias(self, layer: Layer) -> Tensor | None:
        """The bias to be refitted."""
        free = self.refit_bias and layer.bias is not None and layer.bias not in self.masks
        return layer.modules[0].bias if free else None

    def fit(self, layer: Layer, statistics: LayerStatistics) -> None:
        """To its own outputs, on the inputs of the dense network."""
        bias = self.bias(layer)
        [done] = repair(layer.weight, [self.masks[layer.name]], statistics, bias=bias, damping=self.damping)
        self._keep(layer, done.weight, done.bias, done.error)

    def fit_paired(self, layer: Layer, moments: Moments) -> None:
        """To the outputs of the dense network, on the inputs of the pruned one."""
        bias = self.bias(layer)
        statistics = moments.statistics()
        gram, cross = statistics.gram, moments.cross / moments.count
        total = float(moments.power.sum()) / moments.count
        outputs = moments.outputs / moments.count
        if bias is not None:
            gram = statistics.covariance()
            cross = cross - (outputs.view(layer.groups, -1, 1) * statistics.mean.unsqueeze(1)).view(cross.shape)
            total -= float(outputs.square().sum())
        new = least_squares(layer.weight, self.masks[layer.name], gram, cross=cross, damping=self.damping)
        rows = new.flatten(1).to(gram)
        if bias is not None:
            bias = (bias.detach() + (outputs - _at_mean(rows, statistics.mean)).to(bias)).to(bias.dtype)
        error = error_of(power(rows, gram) - 2 * float((cross * rows).sum()) + total, total)
        self._keep(layer, new, bias, error)

    def _keep(self, layer: Layer, weight: Tensor, bias: Tensor | None, error: OutputError) -> None:
        self.tensors[layer.name] = weight
        if bias is not None and layer.bias is not None:
            self.tensors[layer.bias] = bias
        self.errors[layer.name] = error


def _independently(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    repairs: _Repairs,
    most: int,
    max_bytes: int,
    dtype: torch.dtype,
    seed: int,
) -> Iterator[str]:
    by_name = {layer.name: layer for layer in layers}
    for statistics in in_passes(model, layers, batches, most, max_bytes, dtype, seed):
        repairs.fit(by_name[statistics.name], statistics)
        yield statistics.name


def _sequentially(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    repairs: _Repairs,
    most: int,
    max_bytes: int,
    dtype: torch.dtype,
    seed: int,
    remember: DenseOutputs | None,
) -> Iterator[str]:
    dense, keep = remember or DenseOutputs(), remember is not None
    for layer in layers:
        require_room(layer, dtype, max_bytes)
    require_repeatable(batches, "several passes")
    if any(layer.name not in dense.calls for layer in layers):
        every = repairable(model)[0] if keep else {layer.name: layer for layer in layers}
        counted = _calls(model, every.values(), batches)
        dense.calls = {**counted, **{name: 0 for name in every if name not in counted}}
    calls = {name: times for name, times in dense.calls.items() if times}
    pruned = inference_copy(model)
    copies = repairable(pruned)[0]
    repaired = Reconstruction(repairs.tensors, repairs.errors)
    repaired.apply(pruned)
    for layer in sorted((layer for layer in layers if layer.name in calls), key=lambda x: list(calls).index(x.name)):
        moments = Moments(layer, dtype, paired=True)
        draw = generator_of(layer.name, seed)
        met: list[tuple[Tensor, Tensor]] = []
        known = dense.by_layer.get(layer.name)
        found: list[list[tuple[Tensor, Tensor]]] = []

        def on_dense(layer: Layer, module: Any, x: Tensor, y: Tensor, met: Any = met, draw: Any = draw) -> None:
            places = places_of(module, x, y, most, draw)
            met.append((places, outputs_of(module, y, places)))
            if len(met) == calls[layer.name]:
                raise Enough

        def on_pruned(layer: Layer, module: Any, x: Tensor, y: Tensor, met: Any = met, sums: Any = moments) -> None:
            places, wanted = met.pop(0)
            for patches in patches_of(module, x, places):
                sums.add(patches, wanted[: len(patches)])
                wanted = wanted[len(patches) :]
            if not met:
                raise Enough

        with (
            hooked([layer], on_dense),
            hooked([copies[layer.name]], on_pruned),
            contextlib.closing(each(batches)) as numbered,
        ):
            for index, batch in numbered:
                if known is None:
                    run(model, index, batch)
                    found.append(list(met) if keep else [])
                else:
                    met += known[index]
                if met:
                    run(pruned, index, batch)
                met.clear()
        if keep and known is None:
            dense.by_layer[layer.name] = found
        repairs.fit_paired(layer, moments)
        repaired.apply(pruned)
        yield layer.name


def _calls(model: nn.Module, layers: Iterable[Layer], batches: Iterable[Any]) -> dict[str, int]:
    """How often a batch calls each layer at most, in the order of the first calls."""
    most: dict[str, int] = {}
    now: dict[str, int] = {}

    def count(layer: Layer, module: Any, x: Tensor, y: Tensor) -> None:
        now[layer.name] = now.get(layer.name, 0) + 1

    with hooked(layers, count), contextlib.closing(each(batches)) as numbered:
        for index, batch in numbered:
            run(model, index, batch)
            for name, times in now.items():
                most[name] = max(times, most.get(name, 0))
            now.clear()
    return most
