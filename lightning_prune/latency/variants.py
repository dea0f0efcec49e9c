"""The variants of a layer that calibration times: every kernel at a few sparsities."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_prune.granularities import Granularity
from lightning_prune.kernels import LayerKernel, Workload
from lightning_prune.selection import lowest

Point = tuple[float, float]
"""Fraction removed, and share of the inputs that keep any weight."""


def points(kernel: LayerKernel, work: Workload) -> tuple[Point, ...]:
    """Where a kernel is timed on a layer: at most five places.

    The share of inputs is rounded to whole inputs, and what cannot be told from another point is left out.
    """
    if not kernel.uses_sparsity:
        return ((0.0, 1.0),)
    groups = kernel.granularity.groups(torch.Size(work.weight_shape)).numel()
    places = {
        (
            min(round(sparsity * groups), groups - 1) / groups,
            max(1, round(living * work.inputs)) / work.inputs if work.groups == 1 else 1.0,
        ): None
        for sparsity, living in kernel.points
    }
    return tuple(places)


def pruned(
    layer: nn.Linear | nn.Conv2d, granularity: Granularity, point: Point, generator: torch.Generator
) -> nn.Linear | nn.Conv2d:
    """A copy of a layer with groups removed at random, then inputs."""
    sparsity, living = point
    copied = copy.deepcopy(layer, {id(layer.weight): layer.weight})  # it gets a weight of its own below
    weight = layer.weight.detach()
    shape = granularity.groups(weight.shape)
    scores = torch.rand(shape, generator=generator)
    protected = granularity.protected(scores)
    if protected is not None:
        scores += protected
    (removed,) = lowest([scores], round(sparsity * scores.numel()))
    mask = granularity.expand((~removed).to(weight.dtype), weight.shape)
    if living < 1:
        inputs = torch.zeros(weight.shape[1], dtype=weight.dtype)
        inputs[torch.randperm(len(inputs), generator=generator)[: round(living * len(inputs))]] = 1
        mask = mask * inputs.view(1, -1, *[1] * (weight.ndim - 2))
    weight = weight.masked_fill(weight == 0, 0.1).mul_(mask.to(weight.device))  # zeros come from the mask alone
    copied.weight = nn.Parameter(weight, requires_grad=False)
    return copied
