"""Folds BatchNorm into the convolution or linear layer before it, where nothing else reads that layer's output."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.tracing import observe

_LAYERS = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
"""With the number of dimensions at which an output has its features where BatchNorm looks for them."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_batch_norm(
    model: nn.Module, example_inputs: Any, during: contextlib.AbstractContextManager[Any] | None = None
) -> list[str]:
    """Fold, in place, every BatchNorm in eval mode into the layer that alone feeds it.

    With `y = gamma (W x + b - mean) / sqrt(var + eps) + beta`, row `o` of the weight is scaled by
    `gamma_o / sqrt(var_o + eps)`, which turns no zero into anything else. The BatchNorm becomes `nn.Identity`.

    Args:
        model: in eval mode. Tied and shared layers, layers whose output is read twice, and layers or BatchNorms with
            hooks, parametrizations or a forward of their own stay as they are.
        example_inputs: as for `layer_table`.
        during: is entered around the pass that is made, for who wants to listen to the layers in it.

    Returns:
        The names of the folded BatchNorms.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
    >>> fold_batch_norm(model, torch.zeros(1, 1, 8, 8)), type(model[1]).__name__
    (['1'], 'Identity')
    """
    pairs = _pairs(model, example_inputs, during or contextlib.nullcontext())
    names = {module: name for name, module in model.named_modules()}
    for norm, layer in pairs.items():
        _fold(layer, norm)
        replace_module(model, norm, nn.Identity().train(norm.training))
    return [names[norm] for norm in pairs]


class Reads(TorchDispatchMode):
    """Counts how often tensors that were announced are arguments of an operation.

    Operations are seen where PyTorch dispatches them, so that looking at a shape does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that no other tensor gets the id of one of them

    def announce(self, tensor: Tensor) -> None:
        """Count from now on."""
        self.counts.setdefault(id(tensor), 0)
        self.alive.append(tensor)

    def note(self, tree: Any) -> None:
        """All tensors in it are read once more."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                if id(leaf) in self.counts:
                    self.counts[id(leaf)] += 1
            elif dataclasses.is_dataclass(leaf):
                self.note(list(vars(leaf).values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


def _pairs(
    model: nn.Module, example_inputs: Any, during: contextlib.AbstractContextManager[Any]
) -> dict[_BatchNorm, nn.Module]:
    """The BatchNorms to fold, in execution order, and the layers that take them in."""
    reads = Reads()
    made: dict[int, list[nn.Module]] = {}
    calls: dict[nn.Module, int] = {}
    met: dict[_BatchNorm, list[Tensor]] = {}

    def on_layer(layer: nn.Module, args: Any, output: Tensor) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        made.setdefault(id(output), []).append(layer)
        reads.announce(output)

    def on_norm(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        met.setdefault(norm, []).append(args[0] if args else kwargs["input"])  # type: ignore[arg-type]

    tied = tied_parameters(model)
    handles = []
    for module in model.modules():
        if not plain(module):
            continue
        if type(module) in _LAYERS and id(module.weight) not in tied:
            reads.announce(module.weight)  # type: ignore[arg-type]
            handles.append(module.register_forward_hook(on_layer))
        elif type(module) in _NORMS and module.running_mean is not None and not module.training:
            handles.append(module.register_forward_hook(on_norm, with_kwargs=True))
    with removed(handles), during:  # its hooks come after it was looked whether there are any
        reads.note(observe(model, example_inputs, reads))
    pairs = {}
    for norm, inputs in met.items():
        layers = made.get(id(inputs[0]), [])
        if len(inputs) != 1 or len(layers) != 1 or calls[layers[0]] != 1:
            continue
        read_once = reads.counts[id(inputs[0])] == reads.counts[id(layers[0].weight)] == 1
        if read_once and inputs[0].ndim == _LAYERS[type(layers[0])]:
            pairs[norm] = layers[0]
    return pairs


def plain(module: nn.Module) -> bool:
    """Whether a module computes what its class does from parameters of its own, and nobody listens."""
    return all(name in module._parameters for name in ("weight", "bias")) and unwatched(module)


def unwatched(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class and nobody listens."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


@contextlib.contextmanager
def removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tied_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules, or several names of one, hold."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _fold(layer: Any, norm: Any) -> None:
    weight, bias, mean = layer.weight, layer.bias, norm.running_mean
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = (-mean if bias is None else bias - mean) * scale
        shift = shift if norm.bias is None else shift + norm.bias
        # Adding zero turns the -0.0 of a negative scale into 0.0.
        scaled = weight * scale.view(-1, *[1] * (weight.ndim - 1)) + 0.0
        layer.weight = nn.Parameter(scaled.to(weight.dtype), weight.requires_grad)
        layer.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
