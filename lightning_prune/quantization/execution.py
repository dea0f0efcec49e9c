"""What a kernel needs to run a quantised layer in integers."""

from __future__ import annotations

from torch import nn

from lightning_prune.kernels import Steps
from lightning_prune.quantization.settings import QuantizationSettings
from lightning_prune.quantization.twin import QuantizedLayer

INT8 = QuantizationSettings(bits=7, activation_bits=8, weight_scheme="symmetric")
"""What the 8-bit kernels run on every x86 processor: inputs of 8 bits, and symmetric weights of 7.

Products with weights of 7 bits can be added in pairs of 16 bits, as processors without VNNI do; PyTorch gives away the
same bit there, of the activations.
"""


def steps_of(layer: QuantizedLayer) -> Steps | str:
    """The steps of a quantised layer, or why no kernel runs it in 8 bits."""
    if type(layer.layer) not in (nn.Linear, nn.Conv2d):
        return f"{type(layer.layer).__name__} layers have no 8-bit kernel"
    if layer.quantizers.output is not None:
        return "its results are quantised too, and 8-bit kernels give float32; quantise without outputs"
    inputs, weights = layer.quantizers.input.quantizer, layer.quantizers.weight.quantizer
    if inputs.grid.bits != 8:
        return f"its inputs have {inputs.grid.bits} bits, and kernels take 8"
    if weights.grid.bits > 8:
        return f"its weights have {weights.grid.bits} bits, and kernels take 8 or fewer"
    if weights.grid.scheme != "symmetric":
        return "its weights are asymmetric, and kernels take symmetric ones: weight_scheme='symmetric'"
    zero = -int(inputs.zero_point) - inputs.grid.low
    return Steps(1.0 / float(inputs.scale), zero, tuple((1.0 / weights.scale).tolist()))
