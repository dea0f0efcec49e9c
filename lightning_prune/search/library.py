"""Every layer at every level, pruned and repaired once: plans are then put together from these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune import targets
from lightning_prune.criteria import Criterion
from lightning_prune.input_statistics import each_layer_statistics, repairable
from lightning_prune.plan import PlanEntry
from lightning_prune.reconstruction import repair
from lightning_prune.search.one_shot import one_shot_masks
from lightning_prune.search.space import Floats


@dataclass(frozen=True)
class _Compact:
    """A weight of which only the kept entries are stored, and its bias where that was refitted."""

    kept: Tensor
    values: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, bias: Tensor | None) -> _Compact:
        return cls(mask, weight[mask].clone(), bias)

    def put(self, weight: Tensor) -> None:
        weight.zero_()
        weight[self.kept] = self.values


class Library:
    """The layers of a model at all their levels, repaired by least squares on calibration data.

    The error of a level is that of the layer's outputs, relative to their power, with the inputs of the dense network:

        e = E|(W - W') x|^2 / E|W x|^2

    It takes no pass of the whole network. What is stored is one bool per weight and level, and the weights kept.

    Args:
        model: dense; it is not changed.
        entries: by name of the weight, its levels, the first one dense.
        batches: calibration inputs, as for `layer_statistics`; read as often as memory demands.
        criterion: which weights go first.
        progress: is told of each finished layer.

    Raises:
        ValueError: as `layer_statistics`, or a level that a layer cannot have.

    Source: Frantar & Alistarh, "SPDY" (2022), section 3.2.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Mapping[str, Sequence[PlanEntry]],
        batches: Iterable[Any],
        criterion: Criterion,
        *,
        progress: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.names = tuple(entries)
        own = targets.parameters(model)
        layers, _ = repairable(model)
        # A bias that several layers share stays as it is.
        self._biases = {name: layers[name].bias if name in layers else None for name in entries}
        self._levels: dict[str, list[_Compact]] = {}
        errors: dict[str, list[float]] = {}
        for statistics in each_layer_statistics(model, batches, list(entries)):
            name = statistics.name
            masks = one_shot_masks(model, name, entries[name], criterion)
            of = self._biases[name]
            weight, bias = own[name].detach(), None if of is None else own[of]
            done = repair(weight, masks, statistics, bias=bias)
            self._levels[name] = [
                _Compact.of(one.weight, mask, one.bias) for one, mask in zip(done, masks, strict=True)
            ]
            errors[name] = [one.error.relative for one in done]
            progress(name)
        self.errors: Floats = np.array([errors[name] for name in self.names], dtype=np.float64)

    def masks(self, choices: Sequence[int]) -> dict[str, Tensor]:
        """Which weights one level per layer keeps, of the layers that are pruned at all."""
        levels = {name: self._levels[name][choice] for name, choice in zip(self.names, choices, strict=True) if choice}
        return {name: level.kept for name, level in levels.items()}

    def removed(self, choices: Sequence[int]) -> dict[str, int]:
        """How many weights of each layer one level per layer removes."""
        levels = {name: self._levels[name][choice] for name, choice in zip(self.names, choices, strict=True)}
        return {name: level.kept.numel() - level.values.numel() for name, level in levels.items()}

    def put(self, model: nn.Module, choices: Sequence[int]) -> None:
        """Give a model the weights of one level per layer, in place.

        Args:
            model: of the class whose layers these are.
            choices: the level of each layer, in the order of `names`.
        """
        own = targets.parameters(model)
        with torch.no_grad():
            for name, choice in zip(self.names, choices, strict=True):
                level = self._levels[name][choice]
                level.put(own[name])
                bias = self._biases[name]
                if level.bias is not None and bias is not None:
                    own[bias].copy_(level.bias)
