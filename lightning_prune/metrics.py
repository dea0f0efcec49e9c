"""What a network has lost: sparsity, compression ratio, theoretical speedup, churn of the masks.

Everything is counted in the weights themselves, never taken from what a plan or a mask promised. A parameter that
several layers share is counted once; a NaN is not a zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune import targets
from lightning_prune.layers import LayerTable

__all__ = ["compression_ratio", "sparsity", "theoretical_speedup"]


@dataclass(frozen=True)
class Count:
    """How many entries of one parameter are left.

    Args:
        shape: of the parameter.
        total: its number of entries.
        kept: how many of them are not exactly zero.
    """

    shape: tuple[int, ...]
    total: int
    kept: int

    @property
    def sparsity(self) -> float:
        """`1 - kept / total`; 0 where there is nothing to remove."""
        return _share(self.total - self.kept, self.total)


def count(model: nn.Module) -> dict[str, Count]:
    """Counts of every parameter, by plain name and in the model's order.

    One synchronisation with each device, however many parameters there are.

    >>> layer = nn.Linear(3, 2)
    >>> _ = nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    >>> count(layer)
    {'weight': Count(shape=(2, 3), total=6, kept=6), 'bias': Count(shape=(2,), total=2, kept=0)}
    """
    named = targets.parameters(model)
    kept: dict[str, int] = {}
    for device in {parameter.device for parameter in named.values()}:
        here = [name for name, parameter in named.items() if parameter.device == device]
        nonzero = torch.stack([named[name].detach().count_nonzero() for name in here])
        kept |= dict(zip(here, nonzero.tolist(), strict=True))
    return {name: Count(tuple(p.shape), p.numel(), kept[name]) for name, p in named.items()}


def sparsity_of(counts: Iterable[Count]) -> float:
    """The share of exact zeros over several parameters; see `sparsity`."""
    counts = list(counts)
    total = sum(count.total for count in counts)
    return _share(total - sum(count.kept for count in counts), total)


def compression_ratio_of(counts: Iterable[Count]) -> float:
    """Entries before over entries left; see `compression_ratio`."""
    counts = list(counts)
    return _ratio(sum(count.total for count in counts), sum(count.kept for count in counts))


def kept_macs(counts: Mapping[str, Count], table: LayerTable) -> dict[str, tuple[int, float]]:
    """Weight -> its multiply-accumulates when dense, and those of the weights that are left.

    A kept weight costs what it costs in the dense layer: `M_kept = M * k / n`.

    Raises:
        KeyError: if the table names a weight that the model does not have.
    """
    macs = {}
    for layer in table:
        if layer.name not in counts:
            raise KeyError(
                f"the layer table names {layer.name!r}, which the model does not have; "
                f"closest: {targets.closest(layer.name, counts)}; build the table from this model"
            )
        each = counts[layer.name]
        macs[layer.name] = (layer.macs, layer.macs * each.kept / each.total)
    return macs


def theoretical_speedup_of(counts: Mapping[str, Count], table: LayerTable) -> float:
    """Multiply-accumulates before over those left; see `theoretical_speedup`."""
    macs = kept_macs(counts, table).values()
    return _ratio(sum(dense for dense, _ in macs), sum(left for _, left in macs))


def sparsity(model: nn.Module, names: Collection[str] | None = None) -> float:
    """The share of exact zeros among the weights that pruning is about.

    sparsity = z / n,  `z` the number of entries that are exactly 0, `n` the number of entries

    counted over the weights of linear and convolution layers: what `Pruning` removes unless told otherwise, so that
    `Pruning(sparsity=0.9)` ends at 0.9 here. Biases and normalisations, often zero from the start, stay outside;
    `compression_ratio` counts them.

    Args:
        model: whose weights are counted.
        names: plain names of the parameters to count instead.

    Returns:
        A fraction in [0, 1]; 0 for a model without such weights.

    Raises:
        KeyError: if the model has no parameter of a given name; the closest names are listed.

    Source: Blalock et al., "What is the State of Neural Network Pruning?" (2020).

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[1., 0.], [0., 0.]]))
    >>> sparsity(model)
    0.75
    """
    counts = count(model)
    chosen = targets.prunable(model) if names is None else names
    missing = [name for name in chosen if name not in counts]
    if missing:
        raise KeyError(
            f"{type(model).__name__} has no parameter {missing[0]!r}; closest: {targets.closest(missing[0], counts)}"
        )
    return sparsity_of(counts[name] for name in chosen)


def parameter_sparsity(model: nn.Module) -> dict[str, float]:
    """The share of exact zeros of every parameter, biases and normalisations included.

    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[3., 0.]])), layer.bias.fill_(1.)
    >>> parameter_sparsity(layer)
    {'weight': 0.5, 'bias': 0.0}
    """
    return {name: each.sparsity for name, each in count(model).items()}


def compression_ratio(model: nn.Module) -> float:
    """How many times fewer parameters are left, over *all* parameters of the model.

    compression ratio = P / P_nonzero,  `P` the number of parameters, `P_nonzero` those that are not exactly 0

    Args:
        model: whose parameters are counted, biases and normalisations included, shared ones once.

    Returns:
        At least 1; infinity when every parameter is zero, 1 for a model without parameters.

    Source: Blalock et al., "What is the State of Neural Network Pruning?" (2020), whose ShrinkBench counts likewise.

    >>> layer = nn.Linear(3, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[3., 0., 0.]])), layer.bias.fill_(1.)
    >>> compression_ratio(layer)
    2.0
    """
    return compression_ratio_of(count(model).values())


def theoretical_speedup(model: nn.Module, table: LayerTable) -> float:
    """How many times fewer multiplications are left, were every zero skipped at no cost.

    speedup = sum_l M_l / sum_l M_l * k_l / n_l

    with `M_l` the multiply-accumulates of layer `l`, `n_l` the entries of its weight and `k_l` those that are not
    zero. An upper bound, not a measurement: real kernels gain less.

    Args:
        model: whose weights are counted.
        table: the layers of the same model, from `layer_table`.

    Returns:
        At least 1; infinity when no multiplication is left, 1 for a model without layers.

    Raises:
        KeyError: if the table names a weight that the model does not have.

    Source: Blalock et al., "What is the State of Neural Network Pruning?" (2020), whose ShrinkBench counts likewise.

    >>> from lightning_prune.layers import layer_table
    >>> layer = nn.Linear(4, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[3., 0., 0., 0.]]))
    >>> theoretical_speedup(layer, layer_table(layer, torch.zeros(1, 4)))
    4.0
    """
    return theoretical_speedup_of(count(model), table)


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The share of mask entries that changed between two sets of masks.

    churn = |{i : a_i != b_i}| / n,  `b` and `a` the masks before and after, `n` their number of entries

    Args:
        before: parameter name -> bool mask, True where a weight is kept. A parameter that only `after` names
            counts as kept whole.
        after: likewise, the other way around.

    Returns:
        A fraction in [0, 1]; 0 without masks.

    Raises:
        ValueError: if a mask changed its shape, naming the parameter.

    >>> churn({}, {"weight": torch.tensor([True, False, False, True])})
    0.5
    >>> churn({"weight": torch.tensor([True, False])}, {"weight": torch.tensor([False, True])})
    1.0
    """
    changed: list[Tensor] = []
    entries = 0
    for name in before.keys() | after.keys():
        new, old = after.get(name), before.get(name)
        if new is not None and old is not None:
            if new.shape != old.shape:
                raise ValueError(
                    f"the masks of {name!r} differ in shape, {tuple(old.shape)} before and {tuple(new.shape)} "
                    "after; compare masks of one model"
                )
            differs = new != old.to(new.device)
        else:
            differs = ~(new if new is not None else before[name])
        entries += differs.numel()
        changed.append(differs.sum())
    return _share(sum(int(number) for number in changed), entries)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _ratio(before: float, left: float) -> float:
    if left:
        return before / left
    return math.inf if before else 1.0
