"""Runs a model on batches for calibration, and observes what goes into and comes out of its layers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.quantization.quantizers import LayerQuantizers, layer_quantizers
from lightning_prune.quantization.settings import LayerBits, QuantizationSettings

Forward = Callable[[nn.Module, Any], Any]


def on_first(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of a batch: its first element, its entries as keywords, or itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


class Root(nn.Module):
    """Runs a model on batches in a caller's way."""

    def __init__(self, model: nn.Module, run: Forward) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, batch: Any) -> Any:
        return self.run(self.model, batch)


class Watch:
    """Observes what goes into and comes out of a layer during calibration."""

    def __init__(self, name: str, layer: nn.Module, settings: QuantizationSettings, ran: dict[str, None]) -> None:
        self.name, self.layer, self.settings, self.ran = name, layer, settings, ran
        device: Any = layer.weight.device
        self.input = settings.ranges.observer().to(device)
        self.output = settings.ranges.observer().to(device) if settings.outputs else None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.ran.setdefault(self.name)
        self._see("took in", self.input, args[0] if args else kwargs["input"])
        if self.output is not None:
            self._see("gave", self.output, output)

    def _see(self, did: str, observer: nn.Module, x: Tensor) -> None:
        try:
            observer.update(x)  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(
                f"layer {self.name!r} {did} {error} during calibration; look for what makes them, or exclude the layer"
            ) from None

    def quantizers(self, bits: LayerBits) -> LayerQuantizers:
        """Those of the layer, with the ranges that were observed."""
        quantizers = layer_quantizers(self.layer, self.settings, bits)
        try:
            for quantizer, observer in zip(quantizers.activations, (self.input, self.output), strict=False):
                quantizer.observer.load_state_dict(observer.state_dict())  # type: ignore[union-attr]
            quantizers.weight.cover(self.layer.weight)  # type: ignore[arg-type]
            quantizers.freeze()
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from None
        return quantizers


@contextlib.contextmanager
def watched(watches: Mapping[str, Watch]) -> Iterator[None]:
    handles = [watch.layer.register_forward_hook(watch, with_kwargs=True) for watch in watches.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(calibration: Iterable[Any], model: nn.Module) -> Iterator[tuple[Any]]:
    device = next(model.parameters()).device
    for batch in calibration:
        yield (tree_map_only(Tensor, lambda x: x.detach().to(device), batch),)


@contextlib.contextmanager
def generators_kept(model: nn.Module, calibration: Iterable[Any] = ()) -> Iterator[None]:
    """Puts back the states of all random generators that reading data or running the model may move."""
    generator = getattr(calibration, "generator", None)
    own = generator.get_state() if isinstance(generator, torch.Generator) else None
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[d.index or 0 for d in devices], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if isinstance(generator, torch.Generator) and own is not None:
            generator.set_state(own)


@contextlib.contextmanager
def plain_arithmetic(model: nn.Module) -> Iterator[None]:
    """Ranges are those of the model's own type, also where a training in mixed precision asks for them."""
    device = next(model.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield
