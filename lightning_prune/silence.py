"""Finds channels that are constant for every input, because the filters behind them are zero, and does without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.tracing import buffers_kept, call

Layer = nn.Linear | nn.Conv2d


class Border(nn.Module):
    """Adds what constant input channels contribute through a padded convolution: the same map for every image.

    Inside the image it is one number per output; along the border, where the padding is zero, it differs.

    Args:
        layer: computes the rest.
        weight: `[out, constant inputs, *window]`.
        values: `[constant inputs]`.
        convolution: whose stride, padding and dilation it is.
    """

    weight: Tensor
    values: Tensor

    def __init__(self, layer: nn.Module, weight: Tensor, values: Tensor, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("weight", weight)
        self.register_buffer("values", values)
        self.geometry = (convolution.stride, convolution.padding, convolution.dilation)
        self.maps: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, and the map."""
        y: Tensor = self.layer(x)
        channels_last = y.ndim == 4 and y.is_contiguous(memory_format=torch.channels_last)
        key = (*x.shape[-2:], channels_last)
        found = self.maps.get(key)
        if found is None or found.device != y.device:
            images = self.values.view(1, -1, 1, 1).expand(1, -1, *x.shape[-2:])
            stride, padding, dilation = self.geometry
            found = functional.conv2d(images, self.weight, None, stride, padding, dilation)
            if channels_last:
                found = found.contiguous(memory_format=torch.channels_last)
            self.maps[key] = found
        return y + (found if y.ndim == 4 else found[0])


def drop_constant_inputs(model: nn.Module, example_inputs: Any, layers: Mapping[str, Layer]) -> dict[str, Border]:
    """Remove, in place, the weights that meet inputs which never change, and put their part into the bias.

    One pass in which the model's inputs and every output of a layer that depends on them are NaN: what arrives
    somewhere as a number is the same for every input. The outputs of the model stay what they were. Models whose
    inputs are not all floating point, or that turn numbers into decisions (`h > 0`), are left alone: NaN is lost there.

    Args:
        model: in eval mode, BatchNorm folded.
        example_inputs: as for `layer_table`.
        layers: by module name; each is called once in a pass.

    Returns:
        By module name, the borders that have to be added around convolutions with padding; their `layer` is the
        convolution itself.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = model[0].weight.data[1].zero_(), model[0].bias.data[1].fill_(3.0), model[2].weight.data.fill_(2.0)
    >>> _ = drop_constant_inputs(model.eval(), torch.ones(1, 2), {"0": model[0], "2": model[2]})
    >>> model[2].weight.tolist()
    [[2.0, 0.0]]
    """
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    known = any(not x.is_floating_point() or not x.numel() for x in tensors)
    if known or any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return {}  # what a script does goes unwatched
    changes: dict[Layer, _Change] = {}

    def before(module: Any, args: tuple[Any, ...]) -> None:
        with torch._C.DisableTorchFunction():  # what is done here is no decision of the model's
            changes[module] = _absorbed(module, _constants(args[0], 1 if isinstance(module, nn.Linear) else 3))

    def after(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            values = changes[module].dead_outputs()
            shape = [1] * output.ndim
            shape[-1 if isinstance(module, nn.Linear) else -3] = -1
            return values.view(shape).expand(output.shape).contiguous()

    unknown = tree_map_only(Tensor, lambda x: torch.full_like(x, torch.nan), example_inputs)
    handles = [module.register_forward_pre_hook(before) for module in layers.values()]
    handles += [module.register_forward_hook(after) for module in layers.values()]
    watch = _Decisions()
    try:
        with buffers_kept(model), torch.no_grad(), watch:
            call(model, unknown)
    finally:
        for handle in handles:
            handle.remove()
    if watch.made:
        return {}
    for module, change in changes.items():
        module.weight = nn.Parameter(change.weight, requires_grad=False)
        if change.bias is not None:
            module.bias = nn.Parameter(change.bias, requires_grad=False)
    names = {module: name for name, module in layers.items()}
    return {names[module]: change.border for module, change in changes.items() if change.border is not None}


class _Decisions(TorchFunctionMode):
    """Notices where NaN is lost: in comparisons, in Python's numbers, and in functions that give others for it."""

    _LOSE = frozenset(
        [
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "nan_to_num",
            "nansum",
            "nanmean",
            "nanmedian",
            "nanquantile",
            "fmax",
            "fmin",
            "sign",
            "sgn",
            "copysign",
            "heaviside",
            "hypot",
            "gumbel_softmax",
            "max_unpool1d",
            "max_unpool2d",
            "max_unpool3d",
            "grid_sample",
            "item",
            "tolist",
            "numpy",
            "equal",
            "allclose",
            "is_nonzero",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "__array__",
            "__contains__",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.made = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.made = self.made or (self._loses(func) and _unknown((args, kwargs)))  # before it is overwritten in place
        result = func(*args, **(kwargs or {}))
        if not self.made and any(
            isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in tree_leaves(result)
        ):
            self.made = _unknown((args, kwargs))
        return result

    def _loses(self, func: Any) -> bool:
        name = getattr(func, "__name__", "")
        return name in self._LOSE or name.removesuffix("_") in self._LOSE


def _unknown(tree: Any) -> bool:
    """Whether there is a NaN in any tensor."""
    with torch._C.DisableTorchFunction():
        return any(
            isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any())
            for leaf in tree_leaves(tree)
        )


@dataclass(frozen=True)
class _Change:
    """A layer without its constant inputs."""

    weight: Tensor
    bias: Tensor | None
    border: Border | None

    def dead_outputs(self) -> Tensor:
        """`[out]`: the number that an output always is, NaN where it depends on something."""
        dead = ~(self.weight != 0).flatten(1).any(1)
        if self.border is not None:
            dead &= ~(self.border.weight != 0).flatten(1).any(1)
        bias = self.weight.new_zeros(len(dead)) if self.bias is None else self.bias
        return torch.where(dead, bias, torch.nan)


def _constants(x: Tensor, dim: int) -> Tensor:
    """`[channels]`: the one number of each channel, NaN where it has several or is unknown.

    Vectors and what is left beside them are rounded differently, so that one number may come in a few neighbours.
    """
    channels = x.movedim(x.ndim - dim, 0).flatten(1)
    spread = channels.amax(1) - channels.amin(1)
    alike = spread <= 8 * torch.finfo(x.dtype).eps * channels[:, 0].abs()
    return torch.where(alike, channels[:, 0], torch.nan)


def _absorbed(module: Layer, values: Tensor) -> _Change:
    """Constant inputs taken out of a layer's weight, into its bias or a border."""
    weight, bias = module.weight.detach().clone(), module.bias
    bias = None if bias is None else bias.detach()
    unchanged = _Change(weight, bias, None)
    grouped = isinstance(module, nn.Conv2d) and module.groups > 1
    if isinstance(module, nn.Conv2d) and grouped and not module.groups == module.in_channels == module.out_channels:
        return unchanged
    met = (weight != 0).flatten(2).any(2) if weight.ndim > 2 else weight != 0
    constant = ~values.isnan() & (met[:, 0] if grouped else met.any(0))
    border = None
    if isinstance(module, nn.Conv2d) and (module.padding == "same" or any(_numbers(module.padding))):
        if module.padding_mode != "zeros" or grouped:
            constant &= values == 0
        loud = constant & (values != 0)
        if loud.any():
            border = Border(module, weight[:, loud].clone(), values[loud].clone(), module)
            weight[:, loud] = 0
            constant &= ~loud
    if not constant.any():
        return _Change(weight, bias, border)
    taps = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    if grouped:
        added = torch.where(constant, taps[:, 0] * values.nan_to_num(), 0.0)
        weight[constant] = 0
    else:
        added = taps[:, constant] @ values[constant]
        weight[:, constant] = 0
    if (added != 0).any():
        bias = added if bias is None else bias + added
    return _Change(weight, bias, border)


def _numbers(padding: Any) -> tuple[int, ...]:
    return (0,) if padding == "valid" else tuple(padding)
