"""Makes a model ready for kernels: for inference, without BatchNorm, without weights that meet nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_is_leaf, tree_map, tree_map_only

from lightning_prune.folding import fold_batch_norm, plain, replace_module
from lightning_prune.kernels import CHWN, NCHW, NHWC, Dense, LayerKernel, Steps, Workload
from lightning_prune.kernels.batch_last import BatchLast, refused
from lightning_prune.kernels.workload import runnable
from lightning_prune.layers import LayerTable, layer_table
from lightning_prune.pooling import separate_pools
from lightning_prune.rectifiers import rectified_layers, skip_rectified
from lightning_prune.silence import Border, Layer, drop_constant_inputs
from lightning_prune.tracing import call

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model whose layers can be given to kernels.

    Args:
        model: a copy for inference.
        inputs: the example, on the device of the model.
        table: of the model.
        layers: by module name, those that kernels may run.
        works: their calls.
        folded: names of the BatchNorms that are gone.
        borders: by module name, what constant inputs add around padded convolutions.
        rectified: names of layers whose output is seen by nothing but a ReLU module.
        steps: of a twin, by name of the quantised layers that kernels may run in integers.
    """

    model: nn.Module
    inputs: Any
    table: LayerTable
    layers: Mapping[str, Layer]
    works: Mapping[str, tuple[Workload, ...]]
    folded: tuple[str, ...]
    borders: Mapping[str, Border]
    rectified: tuple[str, ...] = ()
    steps: Mapping[str, Steps] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, *, drop_constants: bool = True) -> Prepared:
        """Prepare a copy of a model.

        Args:
            model: it is not changed; of a twin that `quantize` made, layers are taken that do not round inputs.
            example_inputs: as for `layer_table`.
            drop_constants: whether weights that meet constant inputs are dropped.

        Raises:
            ValueError: the weights are of several types or in several places, or the model does not run on the example.
        """
        prepared = inference_copy(model)
        own = unwrapped(prepared)
        device, _ = placement(prepared)
        inputs = tree_map_only(Tensor, lambda x: x.to(device), cloned(example_inputs))
        table = layer_table(prepared, inputs)
        folded = fold_batch_norm(prepared, inputs)
        works = {name.rpartition(".")[0]: calls for name, calls in executed(prepared, inputs, runnable(table)).items()}
        layers: dict[str, Layer] = {name: prepared.get_submodule(name) for name in works}  # type: ignore[misc]
        once = {name: layer for name, layer in layers.items() if len(works[name]) == 1}
        borders = drop_constant_inputs(prepared, inputs, once) if drop_constants else {}
        rectified = rectified_layers(prepared, inputs, once)
        steps = {name: found for name in layers if (found := own.get(name)) is not None}
        return cls(prepared, inputs, table, layers, works, tuple(folded), borders, tuple(rectified), steps)

    def network(self, layout: str, kernels: Mapping[str, LayerKernel]) -> nn.Module:
        """A copy in a memory layout with kernels in the places of layers."""
        network = in_layout(self.model, layout)
        for name, kernel in kernels.items():
            put(network, name, self.built(name, kernel))
        if any(self.rectifies(name, kernel) for name, kernel in kernels.items()):
            skip_rectified(network)
        return network

    def layouts(self, kernels: Iterable[LayerKernel]) -> tuple[str, ...]:
        """The memory layouts worth a try: those that the model runs in, "chwn" only where kernels are for it.

        With the batch last, every call has to be of a batch that can lie so: of other batches, later, none will.
        """
        device, dtype = placement(self.model)
        calls = [work for works in self.works.values() for work in works]
        wanted = {
            NHWC: any(work.kind == "conv2d" for work in calls),
            CHWN: not any(refused(work) for work in calls) and any_batch_last(kernels, calls, dtype, device),
        }
        return (NCHW, *(layout for layout, worth in wanted.items() if worth and self._runs_in(layout)))

    def _runs_in(self, layout: str) -> bool:
        network = self.dense(layout)
        if layout == CHWN:  # kernels that are for it run linear layers so, too
            for name, layer in self.layers.items():
                put(network, name, BatchLast(layer))
        try:
            with torch.inference_mode():
                run_in_layout(network, cloned(self.inputs), layout)
        except RuntimeError as error:  # most of all of `view`, for which `flatten` and `reshape` stand
            _logger.info("the model does not run with activations in %s, which is left out: %s", layout, error)
            return False
        return True

    def dense(self, layout: str) -> nn.Module:
        """The network in a memory layout without sparse kernels."""
        return self.network(layout, {name: self.dense_kernel(name, layout) for name in self.layers})

    def dense_kernel(self, name: str, layout: str) -> Dense:
        """What runs a layer as it is in a network of a layout."""
        return dense_kernel(self.layers[name], layout)

    def built(self, name: str, kernel: LayerKernel) -> nn.Module:
        """The module with which a kernel runs a layer."""
        layer = self.layers[name]
        built = self.kernel_for(name, kernel).build(layer)
        border = self.borders.get(name)
        if border is not None and isinstance(layer, nn.Conv2d):
            return Border(built, border.weight, border.values, layer)
        if self.rectifies(name, kernel):
            built.relu = True  # type: ignore[assignment]
        return built

    def kernel_for(self, name: str, kernel: LayerKernel) -> LayerKernel:
        """The kernel, with the steps of a quantised layer."""
        return kernel.quantized(self.steps[name]) if name in self.steps else kernel

    def rectifies(self, name: str, kernel: LayerKernel) -> bool:
        """Whether a kernel takes the work of the ReLU behind a layer; what a border adds comes before the ReLU."""
        return kernel.rectifies and name in self.rectified and name not in self.borders


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients, that leaves a Trainer it is attached to behind."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        trainer = module.__dict__.get("_trainer")
        if trainer is not None:
            memo[id(trainer)] = None
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def cloned(inputs: Any) -> Any:
    """A copy of inputs, for a forward that may work in place."""
    return tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the weights of a model are, and of what type.

    Raises:
        ValueError: it has none, or they are in several places or of several types.
    """
    found = {(p.device, p.dtype) for p in model.parameters() if p.is_floating_point()}
    if len(found) != 1:
        places = sorted(f"{dtype} on {device}" for device, dtype in found)
        raise ValueError(
            f"latency is measured for weights of one type on one device, {type(model).__name__} has {places}"
        )
    return found.pop()


def any_batch_last(
    kernels: Iterable[LayerKernel], works: Iterable[Workload], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether kernels run any of some calls with the batch last; dense ones only copy from and to it."""
    own = [kernel for kernel in kernels if kernel.layout == CHWN and kernel.uses_sparsity]
    return any(kernel.refuses(work, dtype, device) is None for work in works for kernel in own)


def dense_kernel(layer: nn.Module, layout: str) -> Dense:
    """What runs a layer as it is in a network of a layout."""
    return Dense(layout if isinstance(layer, nn.Conv2d) else NCHW)


def in_layout(model: nn.Module, layout: str) -> nn.Module:
    """A copy with weights and poolings that suit a layout."""
    copied = copy.deepcopy(model)
    if layout == NHWC:
        return copied.to(memory_format=torch.channels_last)
    separate_pools(copied)
    return copied


def run_in_layout(network: nn.Module, inputs: Any, layout: str) -> Any:
    """A pass of a network in a layout."""
    return outputs_in_layout(call(network, inputs_in_layout(inputs, layout)), layout)


def outputs_in_layout(outputs: Any, layout: str) -> Any:
    """Outputs of a network in a layout as they are handed on: not with the batch last, which nobody expects."""
    return _contiguous(outputs) if layout == CHWN else outputs


def _contiguous(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    if is_dataclass(outputs) and not isinstance(outputs, type):
        copied = copy.copy(outputs)
        for part in fields(outputs):
            object.__setattr__(copied, part.name, _contiguous(getattr(outputs, part.name)))  # it may be frozen
        return copied
    return outputs if tree_is_leaf(outputs) else tree_map(_contiguous, outputs, is_leaf=lambda x: x is not outputs)


def inputs_in_layout(inputs: Any, layout: str) -> Any:
    """Inputs with images in a layout; those of "chwn" are left to the first layer, which may want them otherwise."""
    form = torch.channels_last if layout == NHWC else torch.contiguous_format
    return tree_map_only(Tensor, lambda x: x.contiguous(memory_format=form) if x.ndim == 4 else x, inputs)


def unwrapped(model: nn.Module, keep: Collection[str] = ()) -> dict[str, Steps | None]:
    """Put plain layers in the places of a twin's quantised ones, in place, with their rounded weights.

    Args:
        model: a twin, or any other, of which nothing changes.
        keep: names of quantised layers that stay.

    Returns:
        Of those that are gone the steps by name, None where no kernel runs them in integers.
    """
    from lightning_prune.quantization.execution import steps_of
    from lightning_prune.quantization.twin import quantized_layers

    found: dict[str, Steps | None] = {}
    for name, quantized in quantized_layers(model).items():
        if quantized is model or name in keep:  # for the model itself nothing can stand
            continue
        replace_module(model, quantized, quantized.layer)
        steps = steps_of(quantized)
        found[name] = None if isinstance(steps, str) else steps
    return found


class _Stand(nn.Module):
    """Stands for a layer, and notes whether anybody asks for more than its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls, self.asked = layer, 0, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.asked |= len(args) != 1 or bool(kwargs)
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self.asked = True
            return getattr(self.layer, name)


def executed(model: nn.Module, inputs: Any, works: dict[str, tuple[Workload, ...]]) -> dict[str, tuple[Workload, ...]]:
    """Of the runnable layers, those that another module can stand for.

    They are modules of torch's own classes inside the model, under one name, without hooks, and the model does nothing
    with them but call them with one tensor.
    """
    stands = {}
    for name in works:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) in (nn.Linear, nn.Conv2d) and module is not model and plain(module):
            stands[name] = _Stand(module)
    try:
        for name, stand in stands.items():
            put(model, name.rpartition(".")[0], stand)
        with torch.inference_mode():
            call(model, inputs)
    finally:
        for name, stand in stands.items():
            put(model, name.rpartition(".")[0], stand.layer)
    return {name: works[name] for name, stand in stands.items() if stand.calls == len(works[name]) and not stand.asked}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
