"""Fake-quantised twins of models, the ranges they need, and their export to run in integers."""

from __future__ import annotations

from lightning_prune.quantization.onnx_export import export_onnx
from lightning_prune.quantization.ranges import AveragedMinMax, MeanSquaredError, MinMax, Percentile, Range
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import QuantizedLayer, quantize, quantized_layers

__all__ = [
    "AveragedMinMax",
    "MeanSquaredError",
    "MinMax",
    "Percentile",
    "QuantizationSettings",
    "QuantizedLayer",
    "Range",
    "export_onnx",
    "quantize",
    "quantized_layers",
]
