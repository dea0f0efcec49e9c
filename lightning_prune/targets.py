"""Which parameters of a model can be pruned, under which names, and how their weights are laid out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def plain_name(name: str) -> str:
    """The name a parameter has without `torch.compile` around its module.

    >>> plain_name("network._orig_mod.conv1.weight")
    'network.conv1.weight'
    """
    return name.replace("_orig_mod.", "")


def closest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The names most like `name`, quoted for an error message.

    >>> closest("conv1.wieght", ["conv1.weight", "conv2.weight", "fc.bias"], count=2)
    "'conv1.weight', 'conv2.weight'"
    """
    names = list(names)
    found = difflib.get_close_matches(name, names, n=count, cutoff=0.0)
    return ", ".join(repr(match) for match in found) or "none: the model has no parameters"


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by plain name; of a tied weight the first name counts."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the plain name under which `parameters` lists it."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[plain_name(name)] = first.setdefault(id(parameter), plain_name(name))
    return names


@dataclass(frozen=True)
class Layout:
    """How a layer stores its weight, so that granularities may always see `[out, in, *kernel]`.

    Linear and Conv store `[out, in / groups, *kernel]`; a transposed convolution stores
    `[in, out / groups, *kernel]`, which `output_first` turns around within each group.

    >>> import torch
    >>> layout = Layout(transposed=True, groups=2)
    >>> weight = torch.arange(24.).reshape(4, 3, 2)          # 4 inputs, 6 outputs, 2 groups
    >>> layout.output_first(weight).shape
    torch.Size([6, 2, 2])
    >>> torch.equal(layout.stored(layout.output_first(weight)), weight)
    True
    """

    transposed: bool = False
    groups: int = 1

    def output_first(self, weight: Tensor) -> Tensor:
        """`[in, out / groups, *k]` -> `[out, in / groups, *k]` for transposed layers, else unchanged."""
        return self._turned(weight)

    def stored(self, weight: Tensor) -> Tensor:
        """The inverse of `output_first`."""
        return self._turned(weight)  # swapping the two axes inside each group undoes itself

    def _turned(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return weight
        per_group = weight.reshape(self.groups, -1, *weight.shape[1:])
        return per_group.transpose(1, 2).flatten(0, 1)


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Plain name -> layout, for the weights that are not stored output first."""
    names = {id(parameter): name for name, parameter in parameters(model).items()}
    return {
        names[id(module.weight)]: Layout(transposed=True, groups=module.groups)
        for module in model.modules()
        if isinstance(module, _ConvTransposeNd) and id(module.weight) in names
    }


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are pruned unless told otherwise: those of linear and convolution layers.

    The projections inside `nn.MultiheadAttention` are linear layers too. Biases, normalisations,
    embeddings and recurrent weights are pruned only when a plan names them.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> list(prunable(model))
    ['0.weight', '2.weight']
    """
    weights: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd):
            weights.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            weights.update(id(getattr(module, name)) for name in _PROJECTIONS)
    return {name: parameter for name, parameter in parameters(model).items() if id(parameter) in weights}
