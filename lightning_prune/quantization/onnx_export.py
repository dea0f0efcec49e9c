"""Export of a twin to ONNX, with QuantizeLinear and DequantizeLinear nodes that runtimes turn into integer kernels."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from lightning_prune.files import write_file
from lightning_prune.folding import replace_module
from lightning_prune.quantization.quantizers import BIAS_LIMIT, Quantizer, on_input
from lightning_prune.quantization.schemes import Grid
from lightning_prune.quantization.twin import QuantizedLayer, quantized_layers

OPSET = 21
"""The first whose QuantizeLinear knows 16 bits."""


def export_onnx(twin: nn.Module, example_inputs: Any, path: str | Path, *, dynamic_batch: bool = True) -> None:
    """Write a twin as an ONNX file, whole or not at all.

    Inputs of quantised layers (and outputs, where those are quantised) pass a pair of QuantizeLinear and
    DequantizeLinear, weights are stored as integers behind a DequantizeLinear. With `step = 1 / scale`, ONNX computes

        q = clamp(round(x / step) + z),    x^ = (q - z) * step,    z = -zp - low

    which differs from `Grid` only within rounding error of the middle between two steps. Biases are int32 in units of
    input step times weight step. All other integers are stored unsigned, also those of symmetric schemes, for which
    `z` is the middle (128 of 8 bits): x86 processors without VNNI sum products with signed weights in 16 bits, where
    ONNX Runtime lets them saturate. Less than 8 bits are stored in 8.

    Args:
        twin: that `quantize` made, with float32 weights; it is not changed.
        example_inputs: a tuple holds positional arguments, a mapping keyword arguments, anything else is the only one.
        path: of the file.
        dynamic_batch: whether the first dimension of all tensors, which must be alike, is left open.

    Raises:
        ImportError: the packages onnx and onnxscript are not installed.
        ValueError: the model is no twin, a layer's integers cannot be written, or the forward cannot be traced, for
            example as its control flow depends on data.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"export_onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if not quantized_layers(twin):
        raise ValueError(f"{type(twin).__name__} has no quantised layer; export what quantize() returned")
    network = nn.Sequential(copy.deepcopy(twin).cpu())  # inside another, so that the twin itself can be replaced
    for name, layer in quantized_layers(network[0]).items():
        replace_module(network, layer, _ExportedLayer(name, layer))
    inputs = tree_map_only(Tensor, lambda x: _example(x, dynamic_batch), example_inputs)
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs if type(inputs) is tuple else (inputs,)
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                # A layer that is the whole model takes any arguments; Sequential says how many.
                network if isinstance(network[0], _ExportedLayer) else network[0],
                inputs if isinstance(inputs, tuple) else (),
                kwargs=inputs if isinstance(inputs, dict) else None,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=tree_map_only(Tensor, lambda x: {0: batch} if x.ndim else None, inputs)
                if dynamic_batch
                else None,
                verbose=False,
            )
    except Exception as error:  # whatever tracing a forward may raise
        raise ValueError(
            f"{type(twin).__name__} cannot be traced for ONNX: {_summary(error)}\nA forward whose control flow depends "
            "on values in tensors cannot be exported: replace it by torch.where or torch.cond, or export the parts. "
            "One that only takes some batch sizes needs dynamic_batch=False."
        ) from error
    if program is None:
        raise ValueError(f"torch.onnx made nothing of {type(twin).__name__}; update torch and onnxscript")
    fixed = [x.name for x in program.model_proto.graph.input if _first_is_fixed(x)]
    if dynamic_batch and fixed:
        raise ValueError(
            f"the forward of {type(twin).__name__} fixes the first dimension of {', '.join(fixed)}, so the file would "
            "take one batch size alone; if that is meant, pass dynamic_batch=False"
        )
    content = program.model_proto.SerializeToString()
    write_file(path, lambda file: file.write(content))


_PARTS = ("integers", "step", "zero")


class _Pair(nn.Module):
    """QuantizeLinear and DequantizeLinear."""

    step: Tensor
    zero: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        grid, scale, zero_point = quantizer.grid, quantizer.scale.view(()), quantizer.zero_point.view(())
        self.register_buffer("step", 1.0 / scale)
        self.register_buffer("zero", (-zero_point - grid.low).to(_container(grid)))
        # What a container could hold beyond the grid is clamped before.
        self.clamp = None
        if torch.iinfo(_container(grid)).bits != grid.bits:
            self.clamp = ((grid.low + zero_point) / scale).item(), ((grid.high + zero_point) / scale).item()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.clamp is None else x.clamp(*self.clamp)
        q = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.step, self.zero), dtype=self.zero.dtype, shape=x.shape, version=OPSET
        )
        return _dequantized(q, self.step, self.zero, {})


class _ExportedLayer(nn.Module):
    """A quantised layer with its integers."""

    def __init__(self, name: str, source: QuantizedLayer) -> None:
        super().__init__()
        layer: Any = source.layer
        if layer.weight.dtype is not torch.float32:
            raise ValueError(
                f"layer {name!r} has weights of {layer.weight.dtype}; only float32 can be exported: "
                "quantise model.float()"
            )
        quantizers, weights = source.quantizers, source.quantizers.weight
        per_channel, layout = weights.quantizer.per_channel, weights.layout
        if per_channel and layout.transposed and layout.groups > 1:
            raise ValueError(
                f"layer {name!r} is a transposed convolution of {layout.groups} groups, whose outputs have no axis of "
                "their own in ONNX; quantise with per_channel=False, or exclude it"
            )
        self.layer = layer
        self.input = _Pair(quantizers.input.quantizer)
        self.output = None if quantizers.output is None else _Pair(quantizers.output.quantizer)
        self.attributes = {"axis": 1 if layout.transposed else 0} if per_channel else {}

        container = _container(weights.quantizer.grid)
        weight = layout.output_first(layer.weight.detach())
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        step = 1.0 / weights.quantizer.scale
        fitting = _fitting(step, weight, bias, self.input.step)
        # Products of 16-bit numbers are not summed in int32 anyway, so only their bias gets other steps. It is stored
        # in integers all the same: of a float one ONNX Runtime makes integers that overflow.
        if torch.uint16 not in (container, self.input.zero.dtype):
            step = fitting
        zero = -weights.quantizer.zero_point - weights.quantizer.grid.low
        columns = (-1, *[1] * (weight.ndim - 1)) if per_channel else ()
        integers = torch.round(weight / step.view(columns)) + zero.view(columns)
        integers = integers.clamp(0, 2**weights.quantizer.grid.bits - 1).to(container)
        unit = (fitting.double() * self.input.step.double()).clamp(min=torch.finfo(torch.float32).tiny).float()
        shape = -1 if per_channel else ()
        self._keep("weight", layout.stored(integers), step.view(shape), zero.to(container).view(shape))
        unit = unit.view(shape)
        self._keep("bias", torch.round(bias / unit).int(), unit, torch.zeros_like(unit, dtype=torch.int32))

    def _keep(self, name: str, integers: Tensor, step: Tensor, zero: Tensor) -> None:
        for part, value in zip(_PARTS, (integers, step, zero), strict=True):
            self.register_buffer(f"{name}_{part}", value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = on_input(self.input, args, kwargs)
        along = {"axis": 0} if self.attributes else {}
        tensors = {}
        for name, attributes in (("weight", self.attributes), ("bias", along)):
            integers, step, zero = (getattr(self, f"{name}_{part}") for part in _PARTS)
            tensors[name] = _dequantized(integers, step, zero, attributes)
        output = functional_call(self.layer, tensors, args, kwargs)
        return output if self.output is None else self.output(output)


def _fitting(step: Tensor, weight: Tensor, bias: Tensor, input_step: Tensor) -> Tensor:
    """Steps of weights under which the bias fits into int32: hardly any weights, or none, may need coarser ones.

    Args:
        step: `[channels]` or `[1]`.
        weight: `[channels, ...]`.
        bias: `[channels]`.
        input_step: scalar.
    """
    needed = bias.abs() / input_step / BIAS_LIMIT
    zero = (weight == 0).flatten(1).all(1)
    if len(step) == 1:
        needed, zero = needed.max().view(1), zero.all().view(1)
    # Weights that are all zero have any step: that of the bias.
    return torch.where(zero & (needed > 0), needed, torch.maximum(step, needed))


def _dequantized(integers: Tensor, step: Any, zero: Any, attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (integers, step, zero),
        attributes,
        dtype=torch.float32,
        shape=integers.shape,
        version=OPSET,
    )


def _first_is_fixed(graph_input: Any) -> bool:
    dimensions = graph_input.type.tensor_type.shape.dim
    return len(dimensions) > 0 and not dimensions[0].dim_param


def _container(grid: Grid) -> torch.dtype:
    return torch.uint8 if grid.bits <= 8 else torch.uint16


def _example(x: Tensor, dynamic_batch: bool) -> Tensor:
    x = x.detach().cpu()
    # Tracing takes a dimension of 1 for one that is always 1.
    return torch.cat([x, x]) if dynamic_batch and x.ndim and len(x) == 1 else x


def _summary(error: BaseException) -> str:
    """The root of what happened, without the exporter's manual."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter says of its own workings is not for users."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
