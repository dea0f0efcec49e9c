"""What a criterion gathers over optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prune.criteria import Criterion


class Observation:
    """Sums up what `Criterion.observe` returns, for each parameter.

    Args:
        criterion: who observes; `forgets` says whether sums start anew after a mask update.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._used: set[str] = set()

    def add(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """One optimizer step. A gradient that is not finite is no evidence: mixed precision skips such steps."""
        gradient = gradient if gradient.layout is torch.strided else gradient.to_dense()
        if not torch.isfinite(gradient).all():
            return
        seen = self.criterion.observe(weight, gradient)
        if name in self._used or name not in self._sums:
            self._used.discard(name)
            self._sums[name], self._steps[name] = seen.clone(), 1
        else:
            self._sums[name] += seen
            self._steps[name] += 1

    def of(self, name: str) -> tuple[Tensor | None, int]:
        """Sum and number of steps."""
        return self._sums.get(name), self._steps.get(name, 0)

    def updated(self) -> None:
        """Masks were chosen: who forgets starts anew with the next gradient, and until then keeps what there is."""
        if self.criterion.forgets:
            self._used = set(self._sums)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"sums": dict(self._sums), "steps": dict(self._steps), "used": sorted(self._used)}

    def load_state_dict(self, state: dict[str, Any], device: dict[str, torch.device]) -> None:
        """Continue from `state_dict`, each parameter on its device."""
        self._sums = {name: value.to(device[name], copy=True) for name, value in state["sums"].items()}
        self._steps, self._used = dict(state["steps"]), set(state["used"])
