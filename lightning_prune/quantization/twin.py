"""The fake-quantised twin of a model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_prune.folding import fold_batch_norm, replace_module
from lightning_prune.preparation import inference_copy
from lightning_prune.quantization.calibration import (
    Forward,
    Root,
    Watch,
    batches,
    generators_kept,
    on_first,
    plain_arithmetic,
    watched,
)
from lightning_prune.quantization.quantizers import LayerQuantizers, on_input
from lightning_prune.quantization.ranges import MinMax, Range
from lightning_prune.quantization.schemes import Scheme
from lightning_prune.quantization.settings import LayerBits, QuantizationSettings
from lightning_prune.targets import plain_name
from lightning_prune.tracing import call

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class QuantizedLayer(nn.Module):
    """Stands in a twin for a linear or convolution layer, whose weight is already fake-quantised.

    Whatever else the model asks it for (`weight`, `in_features`, ...) it asks the layer for.

    Args:
        layer: that it calls; its weight is replaced.
        quantizers: with frozen ranges.
    """

    def __init__(self, layer: nn.Module, quantizers: LayerQuantizers) -> None:
        super().__init__()
        self.layer, self.quantizers = layer, quantizers
        weight: Any = layer.weight
        # A parameter of its own: whoever shares the old one, an embedding say, keeps that.
        layer.weight = nn.Parameter(quantizers.weight(weight.detach()), requires_grad=False)
        if isinstance(layer.bias, Tensor):
            layer.bias = nn.Parameter(quantizers.bias(layer.weight, layer.bias.detach()), requires_grad=False)
        # In eval mode nn.TransformerEncoderLayer calls no module that nobody listens to, but a fused kernel.
        self.register_forward_pre_hook(_listen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer with quantised input and weight and, where asked for, output."""
        args, kwargs = on_input(self.quantizers.input, args, kwargs)
        result = self.layer(*args, **kwargs)
        return result if self.quantizers.output is None else self.quantizers.output(result)

    def integer_weight(self) -> Tensor:
        """The integers of the weight, int32, as the layer stores it."""
        weight: Any = self.layer.weight
        return self.quantizers.weight.integers(weight)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    bits: int | Mapping[str, int] = 8,
    scheme: Scheme = "asymmetric",
    per_channel: bool = True,
    *,
    activation_bits: int | None = None,
    ranges: Range | None = None,
    weight_ranges: Range | None = None,
    exclude: str | Sequence[str] = (),
    first_bits: int | None = None,
    last_bits: int | None = None,
    outputs: bool = False,
    weight_scheme: Scheme | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """A fake-quantised twin of a model: floating-point numbers that behave like integers of a few bits.

    BatchNorm is folded first. Then each linear and convolution layer (transposed ones too) takes in an input and has a
    weight that are rounded to a grid, see `Grid` for the arithmetic, and a bias of 32 bits in units of input step times
    weight step, as integer kernels add it. Whatever is no such layer (additions, pooling, products inside attention)
    stays in floating point.

    The twin is a copy, of the model's own class, in eval mode and without gradients. The model is only read: its
    weights, buffers, modes and gradients are not touched, and the random generators of Python, NumPy and PyTorch, that
    of a `DataLoader` included, are put back.

    Args:
        model: any module.
        calibration: batches, as many as are to be seen; `forward` says how the model runs on one.
        bits: 2 to 8 or 16, for all layers or by name or pattern of the layer; layers that match nothing stay in
            floating point. An exact name beats patterns, of which the last one wins.
        scheme: "asymmetric" or "symmetric", for weights and activations.
        per_channel: whether each output of a layer has a range of weights of its own. Activations have one range.
        activation_bits: of activations; None for as many as the layer's weight has.
        ranges: of activations: `MinMax()`, the default, `AveragedMinMax()`, `Percentile()` or `MeanSquaredError()`.
        weight_ranges: of weights, likewise.
        exclude: names or patterns of layers that stay in floating point.
        first_bits: of weight and activations of the layer that runs first, whatever the other arguments say.
        last_bits: of the layer that runs last, likewise.
        outputs: whether outputs of the layers are quantised too, as an integer kernel needs it whose result goes
            elsewhere than into another quantised layer.
        weight_scheme: of weights; None for that of activations. Kernels that run in integers want symmetric weights.
        forward: called with a copy of the model and a batch on its device. By default a tuple or list gives its
            first element (images without labels), a mapping keyword arguments, anything else is the only argument.

    Returns:
        The twin; `quantized_layers(twin)` lists what was quantised.

    Raises:
        ValueError: a setting makes no sense, a name matches no layer, there is nothing to quantise or to calibrate
            with, or a layer's weights or activations have no finite range.

    Warns:
        UserWarning: linear or convolution layers stay in floating point though nobody asked for it.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> x = torch.randn(32, 8)
    >>> twin = quantize(model, [x], bits=8)
    >>> 0.0 < (twin(x) - model(x)).abs().max().item() < 0.02
    True
    >>> list(quantized_layers(twin)), len(twin[0].integer_weight().unique()) <= 256
    (['0', '2'], True)
    """
    settings = QuantizationSettings(
        bits,
        scheme,
        per_channel,
        activation_bits,
        MinMax() if ranges is None else ranges,
        MinMax() if weight_ranges is None else weight_ranges,
        exclude,
        first_bits,
        last_bits,
        outputs,
        weight_scheme,
    )
    return quantized_twin(model, calibration, settings, forward)


def quantized_layers(twin: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of a twin by name."""
    return {plain_name(name): module for name, module in twin.named_modules() if isinstance(module, QuantizedLayer)}


def quantized_twin(
    model: nn.Module, calibration: Iterable[Any], settings: QuantizationSettings, forward: Forward | None = None
) -> nn.Module:
    """What `quantize` does, for settings."""
    if isinstance(calibration, Tensor | np.ndarray | Mapping | str) or not isinstance(calibration, Iterable):
        raise ValueError(
            f"calibration is an iterable of batches, such as a DataLoader, got {type(calibration).__name__}; "
            "put a single batch into a list"
        )
    settings.check(quantizable(model))
    # The root has a name in here, so that it can be replaced too.
    root = Root(inference_copy(model), forward or on_first)
    candidates = {name: layer for name, layer in quantizable(root.model).items() if not settings.excluded(name)}
    with generators_kept(root, calibration), plain_arithmetic(root):
        seen = batches(calibration, root)
        first = next(seen, None)
        if first is None:
            raise ValueError("calibration has no batch; ranges of activations need at least one")
        ran: dict[str, None] = {}  # in the order in which they first did
        watches = {name: Watch(name, layer, settings, ran) for name, layer in candidates.items()}
        # Folding runs the first batch anyway, and changes what layers give, but not what they take in.
        fold_batch_norm(root, first, None if settings.outputs else watched(watches))
        with watched(watches):
            for batch in itertools.chain([first], seen) if settings.outputs else seen:
                call(root, batch)
        widths = settings.widths(list(ran))
        if not widths:
            raise ValueError("nothing is left to quantise: exclude or bits leave no layer that runs; let some be")
        for name, bits in widths.items():
            layer = candidates[name]
            replace_module(root, layer, QuantizedLayer(layer, watches[name].quantizers(bits)))
    _warn_of_float_layers(root.model, settings, widths)
    return root.model.eval().requires_grad_(False)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be quantised, by name (of several names the first); "" is the model itself.

    Raises:
        ValueError: there are none.
    """
    found = {
        plain_name(name): module
        for name, module in model.named_modules()
        if type(module) in LAYERS and module._parameters.get("weight") is not None
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear or convolution layer with a weight of its own, so there is nothing "
            "to quantise; weights that a parametrization or a hook computes must be made permanent first"
        )
    return found


def _listen(layer: nn.Module, args: Any) -> None:
    """Hears that a layer is called."""


def _warn_of_float_layers(twin: nn.Module, settings: QuantizationSettings, widths: Mapping[str, LayerBits]) -> None:
    kinds = (*LAYERS, nn.MultiheadAttention)
    inside = {module for layer in quantized_layers(twin).values() for module in layer.modules()}
    left = [
        plain_name(name)
        for name, module in twin.named_modules()
        if isinstance(module, kinds) and module not in inside and not settings.excluded(plain_name(name))
    ]
    if isinstance(settings.bits, Mapping):  # which leaves out whom it does not name
        left = [name for name in left if settings.widths([name])]
    if left:
        warnings.warn(
            f"these layers stay in floating point: {', '.join(left)}. They did not run in calibration, or are of a "
            "class of their own (weights computed by a parametrization, projections inside attention); "
            "list them in exclude if that is meant",
            stacklevel=4,
        )
