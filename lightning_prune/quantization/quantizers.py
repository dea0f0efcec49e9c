"""Modules that fake-quantise a tensor, and the three that a layer has: for its input, its weight and its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.quantization.ranges import Range
from lightning_prune.quantization.schemes import Grid
from lightning_prune.quantization.settings import LayerBits, QuantizationSettings
from lightning_prune.targets import Layout

BIAS_LIMIT = 2.0**30
"""Of an integer bias: half of what int32 holds, which leaves room for the products."""


class Quantizer(nn.Module):
    """Fake-quantises to a grid with a scale and a zero point that lie in its buffers.

    Args:
        grid: width and scheme.
        channels: ranges along the first axis; None for one range of all.

    >>> quantizer = Quantizer(Grid(2))
    >>> quantizer.cover(torch.tensor([0.0]), torch.tensor([3.0]))
    >>> quantizer(torch.tensor([0.4, 0.6, 7.0])).tolist()
    [0.0, 1.0, 3.0]
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, channels: int | None = None) -> None:
        super().__init__()
        self.grid, self.per_channel = grid, channels is not None
        self.register_buffer("scale", torch.ones(channels or 1))
        self.register_buffer("zero_point", torch.zeros(channels or 1))

    def cover(self, minimum: Tensor, maximum: Tensor) -> None:
        """Choose scale and zero point for ranges, `[channels]` or `[1]`."""
        scale, zero_point = self.grid.scale_and_zero_point(minimum, maximum)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point in shapes that broadcast with `x`."""
        shape = (-1, *[1] * (x.ndim - 1)) if self.per_channel else ()
        return self.scale.view(shape), self.zero_point.view(shape)

    def integers(self, x: Tensor) -> Tensor:
        """The integers for `x`, int32."""
        return self.grid.integers(x, *self.parameters_for(x))

    def forward(self, x: Tensor) -> Tensor:
        """`x` as its integers return it, in its own type; gradients pass."""
        return self.grid.fake_quantized(x, *self.parameters_for(x))

    def extra_repr(self) -> str:
        """Width, scheme and number of ranges."""
        return f"bits={self.grid.bits}, scheme={self.grid.scheme!r}, ranges={len(self.scale)}"


class ActivationQuantizer(nn.Module):
    """Observes activations, then fake-quantises them.

    While `observing`, each batch is taken in; while `quantizing`, the result is fake-quantised, with the range of all
    that was observed until then. Both together are the early part of quantisation-aware training.

    Args:
        grid: width and scheme.
        ranges: how the range is found.
    """

    def __init__(self, grid: Grid, ranges: Range) -> None:
        super().__init__()
        self.ranges = ranges
        self.observer = ranges.observer()
        self.quantizer = Quantizer(grid)
        self.observing, self.quantizing = True, False

    def freeze(self) -> None:
        """From here on quantise with the range that was observed, whatever comes.

        Raises:
            ValueError: nothing was observed.
        """
        self.cover()
        self.observing, self.quantizing = False, True

    def cover(self) -> None:
        """Take the range of what was observed."""
        if not int(self.observer.seen):
            raise ValueError("a range needs observed values, and there are none; run the layer while observing")
        low, high = self.ranges.observed(self.observer, self.quantizer.grid)
        self.quantizer.cover(low.view(1), high.view(1))

    def forward(self, x: Tensor) -> Tensor:
        """Take part in what is switched on."""
        if self.observing:
            self.observer.update(x)
            if self.quantizing:
                self.cover()
        if not self.quantizing:
            return x
        quantized: Tensor = self.quantizer(x)
        return quantized


class WeightQuantizer(nn.Module):
    """Fake-quantises a weight, with a range that follows it until frozen.

    Args:
        grid: width and scheme.
        ranges: how the range is found.
        channels: outputs of the layer, each with a range of its own; None for one range.
        layout: how the layer stores its weight.
    """

    def __init__(self, grid: Grid, ranges: Range, channels: int | None, layout: Layout) -> None:
        super().__init__()
        self.ranges, self.layout = ranges, layout
        self.quantizer = Quantizer(grid, channels)
        self.following = True

    def cover(self, weight: Tensor) -> None:
        """Take the range of a weight.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        values = self.layout.output_first(weight.detach()).float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("a weight that is NaN or infinite has no range")
        rows = values.flatten(1) if values.numel() else values.new_zeros(len(values), 1)
        self.quantizer.cover(
            *self.ranges.bounds(rows[:, None] if self.quantizer.per_channel else rows[None], self.quantizer.grid)
        )

    def integers(self, weight: Tensor) -> Tensor:
        """The integers for a weight, as the layer stores it."""
        return self.layout.stored(self.quantizer.integers(self.layout.output_first(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as its integers return it; gradients pass."""
        if self.following:
            self.cover(weight)
        quantized: Tensor = self.layout.stored(self.quantizer(self.layout.output_first(weight)))
        return quantized


class LayerQuantizers(nn.Module):
    """The quantisers of a layer.

    Args:
        input: of what the layer takes in.
        weight: of its weight.
        output: of its result; None leaves that in floating point.
    """

    def __init__(
        self, input: ActivationQuantizer, weight: WeightQuantizer, output: ActivationQuantizer | None = None
    ) -> None:
        super().__init__()
        self.input, self.weight, self.output = input, weight, output

    @property
    def activations(self) -> list[ActivationQuantizer]:
        """Those of input and, where there is one, output."""
        return [self.input] if self.output is None else [self.input, self.output]

    def freeze(self) -> None:
        """Fix all ranges."""
        for quantizer in self.activations:
            quantizer.freeze()
        self.weight.following = False

    def bias(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The bias as integer kernels add it.

            b^ = round(s b) / s,    s = scale of the input * scale of the weight, in float64

        Where that would leave 32 bits by far, or the weights that give the unit are all zero, it stays as it is: then
        the unit is free, and an export chooses a finer one.

        Args:
            weight: as the layer stores it, fake-quantised.
            bias: `[channels]`.
        """
        scale = self.input.quantizer.scale.double() * self.weight.quantizer.scale.double()
        integers = torch.round(scale * bias.double())
        rows = self.weight.layout.output_first(weight).flatten(1)
        keep = (integers.abs() > BIAS_LIMIT) | (rows == 0).all(1)
        return torch.where(keep, bias, (integers / scale).to(bias.dtype))

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives with input, weight and output quantised, differentiable down to its own parameters.

        The bias stays in floating point.

        The layer is not changed: its class's forward runs once with another tensor in the place of the weight.
        """
        args, kwargs = on_input(self.input, args, kwargs)
        weight: Any = layer._parameters["weight"]
        layer._parameters["weight"] = self.weight(weight)  # keeps its place among the parameters
        try:
            output = type(layer).forward(layer, *args, **kwargs)
        finally:
            layer._parameters["weight"] = weight
        return output if self.output is None else self.output(output)


def layer_quantizers(layer: nn.Module, settings: QuantizationSettings, bits: LayerBits) -> LayerQuantizers:
    """Quantisers for a layer that observe activations and do not quantise them yet.

    Args:
        layer: one of `LAYERS`.
        settings: schemes and ranges.
        bits: the widths of this layer.
    """
    device: Any = layer.weight.device
    transposed: Any = getattr(layer, "transposed", False)
    groups: Any = getattr(layer, "groups", 1)
    channels: Any = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    grid = Grid(bits.activation, settings.scheme)
    return LayerQuantizers(
        ActivationQuantizer(grid, settings.ranges),
        WeightQuantizer(
            Grid(bits.weight, settings.scheme_of_weights),
            settings.weight_ranges,
            channels if settings.per_channel else None,
            Layout(transposed, groups),
        ),
        ActivationQuantizer(grid, settings.ranges) if settings.outputs else None,
    ).to(device)


def on_input(quantizer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A call's arguments, the first of them (`input`) quantised."""
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": quantizer(kwargs["input"])}
