"""The fake-quantised twin of a model."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.folding import fold_batch_norm, replace_module
from lightning_prune.preparation import inference_copy
from lightning_prune.quantization.quantizers import ActivationQuantizer, LayerQuantizers, WeightQuantizer, on_input
from lightning_prune.quantization.ranges import MinMax, Range
from lightning_prune.quantization.schemes import Grid, Scheme
from lightning_prune.quantization.settings import LayerBits, QuantizationSettings
from lightning_prune.targets import Layout, plain_name
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

Forward = Callable[[nn.Module, Any], Any]


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
        forward: called with a copy of the model and a batch on its device. By default a tuple or list gives its
            first element (images without labels), a mapping keyword arguments, anything else is the only argument.

    Returns:
        The twin; `quantized_layers(twin)` lists what was quantised.

    Raises:
        ValueError: a setting makes no sense, a name matches no layer, there is nothing to quantise or to calibrate
            with, or a layer's weights or activations have no finite range.

    Warns:
        UserWarning: linear or convolution layers stay in floating point though nobody asked for it.

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
    root = _Root(inference_copy(model), forward or on_first)
    candidates = {name: layer for name, layer in quantizable(root.model).items() if not settings.excluded(name)}
    with generators_kept(root, calibration), _plain_arithmetic(root):
        batches = _batches(calibration, root)
        first = next(batches, None)
        if first is None:
            raise ValueError("calibration has no batch; ranges of activations need at least one")
        fold_batch_norm(root, first)
        ran: dict[str, None] = {}  # in the order in which they first did
        watches = {name: _Watch(name, layer, settings, ran) for name, layer in candidates.items()}
        with _watched(watches):
            for batch in itertools.chain([first], batches):
                call(root, batch)
        widths = settings.widths(list(ran))
        if not widths:
            raise ValueError("nothing is left to quantise: exclude or bits leave no layer that runs; let some be")
        for name, bits in widths.items():
            layer = candidates[name]
            replace_module(root, layer, watches[name].quantized(bits))
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


def on_first(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of a batch: its first element, its entries as keywords, or itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


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
            Grid(bits.weight, settings.scheme),
            settings.weight_ranges,
            channels if settings.per_channel else None,
            Layout(transposed, groups),
        ),
        ActivationQuantizer(grid, settings.ranges) if settings.outputs else None,
    ).to(device)


def _listen(layer: nn.Module, args: Any) -> None:
    """Hears that a layer is called."""


class _Root(nn.Module):
    """Runs a model on batches in a caller's way."""

    def __init__(self, model: nn.Module, run: Forward) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, batch: Any) -> Any:
        return self.run(self.model, batch)


class _Watch:
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

    def quantized(self, bits: LayerBits) -> QuantizedLayer:
        """The layer with the ranges that were observed."""
        quantizers = layer_quantizers(self.layer, self.settings, bits)
        try:
            for quantizer, observer in zip(quantizers.activations, (self.input, self.output), strict=False):
                quantizer.observer.load_state_dict(observer.state_dict())  # type: ignore[union-attr]
            quantizers.weight.cover(self.layer.weight)  # type: ignore[arg-type]
            quantizers.freeze()
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from None
        return QuantizedLayer(self.layer, quantizers)


@contextlib.contextmanager
def _watched(watches: Mapping[str, _Watch]) -> Iterator[None]:
    handles = [watch.layer.register_forward_hook(watch, with_kwargs=True) for watch in watches.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(calibration: Iterable[Any], model: nn.Module) -> Iterator[tuple[Any]]:
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
def _plain_arithmetic(model: nn.Module) -> Iterator[None]:
    """Ranges are those of the model's own type, also where a training in mixed precision asks for them."""
    device = next(model.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield


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
