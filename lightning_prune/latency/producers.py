"""Which layers feed which: whose outputs must all be silent for an input to be silent too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.latency.profile import Producers
from lightning_prune.tracing import buffers_kept, call


def producers(
    model: nn.Module, example_inputs: Any, layers: Mapping[str, nn.Linear | nn.Conv2d]
) -> dict[str, Producers]:
    """Where each layer's inputs come from, through activations, pooling, additions and concatenations.

    One pass per layer, in which that layer gives NaN and all others zeros: whatever NaN arrives at comes from there.
    The layers themselves compute nothing in these passes.

    Args:
        model: in eval mode.
        example_inputs: as for `layer_table`.
        layers: by the name of the weight.

    Returns:
        Per layer the shares of its inputs that come from the same set of layers.
    """
    arriving: dict[str, dict[str, Tensor]] = defaultdict(dict)
    names: dict[nn.Module, str] = {module: name for name, module in layers.items()}
    speaking = ""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        name, channels = names[module], _channels(module, args[0]).isnan()
        if channels.any():
            met = arriving[name].setdefault(speaking, torch.zeros_like(channels))
            met |= channels

    sizes: dict[tuple[nn.Module, torch.Size], torch.Size] = {}

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        sizes[module, args[0].shape] = output.shape

    def forward_of(module: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            # What arrives may be of another shape than before, where that depends on values.
            size = sizes.get((module, x.shape)) or type(module).forward(module, x).shape
            return x.new_full(size, torch.nan if name == speaking else 0.0)

        return forward

    silent = tree_map_only(Tensor, lambda x: torch.zeros_like(x) if x.is_floating_point() else x, example_inputs)
    handles = [module.register_forward_hook(after) for module in names]
    own = {module: vars(module)["forward"] for module in names if "forward" in vars(module)}
    try:
        with buffers_kept(model), torch.inference_mode():
            call(model, silent)
            handles += [module.register_forward_pre_hook(before) for module in names]
            for module, name in names.items():
                module.forward = forward_of(module, name)
            for speaking in layers:  # noqa: B007 (the hooks read it)
                call(model, silent)
    finally:
        for handle in handles:
            handle.remove()
        for module in names:
            vars(module).pop("forward", None)
        for module, forward in own.items():
            vars(module)["forward"] = forward
    return {name: _grouped(arriving[name]) for name in layers if arriving[name]}


def _channels(module: nn.Module, x: Tensor) -> Tensor:
    """`[channels]`, NaN where any number of the channel is."""
    dim = x.ndim - 1 if isinstance(module, nn.Linear) else x.ndim - 3
    return x.movedim(dim, 0).flatten(1).sum(1)


def _grouped(arriving: Mapping[str, Tensor]) -> Producers:
    count = len(next(iter(arriving.values())))
    groups: dict[tuple[str, ...], int] = defaultdict(int)
    for channel in range(count):
        groups[tuple(name for name, met in arriving.items() if met[channel])] += 1
    return tuple((number / count, names) for names, number in groups.items() if names)
