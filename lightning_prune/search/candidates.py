"""The networks that a search measures: repaired, perhaps fine-tuned, perhaps quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

from lightning_prune.batch_norm import reestimate_batch_norm
from lightning_prune.plan import SparsityPlan
from lightning_prune.preparation import inference_copy
from lightning_prune.reconstruction import DenseOutputs, reconstruct
from lightning_prune.search.library import Library
from lightning_prune.search.quantized import QuantizedSearch
from lightning_prune.search.space import SearchSpace

Repair = Literal["layerwise", "sequential"]
Tune = Callable[[nn.Module, SparsityPlan], None]


class Candidates:
    """Makes the network of one choice per layer.

    Args:
        network: dense, in eval mode; it is not changed.
        space: of the choices.
        library: the layers at all their levels.
        batches: calibration inputs.
        repair: see `search_sparsity`, as are the next ones.
        tune: fine-tunes a candidate, in place.
        quantizer: of the candidates.
    """

    def __init__(
        self,
        network: nn.Module,
        space: SearchSpace,
        library: Library,
        batches: Iterable[Any],
        repair: Repair = "layerwise",
        tune: Tune | None = None,
        quantizer: QuantizedSearch | None = None,
    ) -> None:
        self.dense, self.space, self.library, self.quantizer = network, space, library, quantizer
        self._batches, self._repair, self._tune = batches, repair, tune
        self._candidate, self._outputs = inference_copy(network), DenseOutputs()

    def repaired(self, chosen: Sequence[int]) -> nn.Module:
        """The network in floating point; one and the same module for all choices, unless it is fine-tuned."""
        self.library.put(self._candidate, chosen)
        if self._repair == "sequential":
            masks = self.library.masks(chosen)
            reconstruct(self.dense, masks, self._batches, remember=self._outputs).apply(self._candidate)
        reestimate_batch_norm(self._candidate, self._batches)
        if self._tune is None:
            return self._candidate
        tuned = inference_copy(self._candidate)
        self._tune(tuned, self.space.plan(chosen))
        return tuned.eval()

    def deployed(self, repaired: nn.Module, chosen: Sequence[int]) -> nn.Module:
        """What is measured of a network: itself, or its quantised twin."""
        return repaired if self.quantizer is None else self.quantizer.twin(repaired, chosen)

    @property
    def made(self) -> str | None:
        """How candidates are made, in words; None where it is the usual way."""
        usual = self._repair == "layerwise" and self._tune is None
        steps = getattr(self._tune, "steps", None)
        tuned = "" if self._tune is None else ", fine-tuned" if steps is None else f", fine-tuned for {steps} steps"
        words = f"{self._repair} repair{tuned}"
        if self.quantizer is None:
            return None if usual else words
        quantization = self.quantizer.quantization
        settings = "" if quantization.name != "settings" else f" {quantization.settings}"
        return f"{words}, quantised ({quantization.name}{settings})"
