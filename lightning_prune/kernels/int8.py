"""Dense layers in 8-bit integers, as oneDNN and FBGEMM run them inside PyTorch: fast, but not exact."""

from __future__ import annotations

import functools
import math
import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.kernels.kernel import IMAGE_LAYOUTS, NCHW, NHWC, LayerKernel
from lightning_prune.kernels.notices import hear
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.steps import Steps
from lightning_prune.kernels.workload import Workload
from lightning_prune.rectifiers import mark_rectified

NARROW = 63
"""The greatest weight of which products may be added in pairs of 16 bits: `2 * 63 * 255 < 2^15`. The least is -64."""

_PACKING = threading.Lock()

if hasattr(torch, "quantize_per_tensor"):  # which is to go; kernels are refused without it
    hear(
        r"torch.quantize_per_tensor, torch.quantize_per_channel and other",
        lambda: torch.quantize_per_tensor(torch.zeros(1, device="cpu"), 1.0, 0, torch.quint8),
    )


def input_steps(x: Tensor) -> tuple[float, int]:
    """Step and zero with which all of `x`, and 0, get an integer.

    Raises:
        ValueError: a value is NaN or infinite.

    >>> input_steps(torch.tensor([-64.0, 191.0]))
    (1.0, 64)
    """
    low, high = (float(bound) for bound in torch.aminmax(x))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"inputs from {low:.3g} to {high:.3g} have no finite range; look for what makes them")
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    return (step, round(-low / step)) if step > 1e-30 else (1.0, 0)


def weight_scales(weight: Tensor) -> Tensor:
    """Steps per unit of each output of a weight, `[outputs]`: the greatest weight is `NARROW` and a half steps.

    To the bit as `Grid(7, "symmetric")` has them, since the greatest weight lies in the middle between two integers.
    """
    most = weight.detach().flatten(1).abs().amax(1).float()
    scales = torch.full_like(most, NARROW + 0.5) / most
    return torch.where(torch.isfinite(scales), scales, 1.0)


def rounded(weight: Tensor, scales: Tensor) -> Tensor:
    """The nearest whole numbers of steps, of which there are `scales` per unit, `[outputs]` or `[1]`."""
    return torch.round(scales.view(-1, *[1] * (weight.ndim - 1)) * weight.detach())


class IntegerLayer(nn.Module, ABC):
    """A linear layer or convolution whose products are of integers, added up in 32 bits; its results are float32.

    Args:
        layer: it is not changed; weights are rounded to the nearest integer.
        steps: of inputs and weights. Without, inputs get steps that cover them at every call, and weights
            those of `weight_scales`.

    Attributes:
        relu: whether it rectifies its outputs, and marks them; to be set before the first call.
    """

    integers: Tensor
    weight_steps: Tensor
    input_steps: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, steps: Steps | None) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = weight_scales(weight) if steps is None else 1.0 / weight.new_tensor(steps.weight_steps)
        low, high = (-NARROW - 1, NARROW) if steps is None else (-128, 127)
        self.register_buffer("integers", rounded(weight, scales).clamp_(low, high).to(torch.int8).contiguous())
        self.register_buffer("weight_steps", (1.0 / scales).expand(len(weight)).clone())
        pair = () if steps is None else (steps.input_step, float(steps.input_zero))
        self.register_buffer("input_steps", torch.tensor(pair, dtype=torch.float64))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.relu = False
        self._ready: tuple[Any, tuple[float, int] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is packed, which belongs to the process."""
        return {**self.__dict__, "_ready": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = None  # it holds the weights that were

    def _prepared(self, x: Tensor) -> tuple[Any, float, int]:
        """The weights as the library wants them, and the step and the zero of inputs."""
        if self._ready is None:
            fixed = (float(self.input_steps[0]), int(self.input_steps[1])) if len(self.input_steps) else None
            self._ready = self._packed(), fixed
        packed, fixed = self._ready
        return packed, *(fixed or input_steps(x))

    @abstractmethod
    def _packed(self) -> Any:
        """The weights as the library wants them."""

    def _finished(self, y: Tensor) -> Tensor:
        return mark_rectified(y) if self.relu else y


class IntegerLinear(IntegerLayer):
    """A linear layer by FBGEMM."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if not x.numel():
            return self._finished(x.new_zeros(*x.shape[:-1], len(self.integers)))
        packed, step, zero = self._prepared(x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        operator = _linear_relu() if self.relu else _linear()
        return self._finished(operator(rows, step, zero, packed).view(*x.shape[:-1], len(self.integers)))

    def _packed(self) -> Any:
        zeros = torch.zeros(len(self.integers), dtype=torch.int64)
        with _PACKING:  # the engine is the process's
            before = torch.backends.quantized.engine
            torch.backends.quantized.engine = "fbgemm"
            try:
                weight = torch._make_per_channel_quantized_tensor(self.integers, self.weight_steps.double(), zeros, 0)
                return torch.ops.quantized.linear_prepack(weight, self.bias)
            finally:
                torch.backends.quantized.engine = before


class IntegerConv2d(IntegerLayer):
    """A convolution by oneDNN, which works on images in "nhwc".

    Args:
        layer: as for `IntegerLayer`.
        steps: likewise.
        layout: in which its results lie.
    """

    def __init__(self, layer: nn.Conv2d, steps: Steps | None, layout: str) -> None:
        super().__init__(layer, steps)
        self.layout, self.groups = layout, layer.groups
        self.stride, self.dilation = list(layer.stride), list(layer.dilation)
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        self.border: list[int] | None = None
        self.padding, self.mode = [top, left], str(layer.padding_mode)
        if layer.padding_mode != "zeros" or (left, top) != (right, bottom):
            self.border, self.padding = [left, right, top, bottom], [0, 0]
            self.mode = "constant" if layer.padding_mode == "zeros" else self.mode
        self.register_buffer("zeros", torch.zeros(len(self.integers), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in, height, width]` (or without batch) -> the same with `out` channels."""
        if x.ndim == 3:
            return self._finished(self(x.unsqueeze(0)).squeeze(0))
        empty = not len(x)
        if empty:
            x = x.new_zeros(1, *x.shape[1:])
        packed, step, zero = self._prepared(x)
        if self.border is not None and any(self.border):
            x = functional.pad(x, self.border, mode=self.mode)
        y = torch.ops.onednn.qconv2d_pointwise(
            _unsigned(x.contiguous(memory_format=torch.channels_last), step, zero),
            step,
            zero,
            packed,
            self.weight_steps,
            self.zeros,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            1.0,
            0,
            torch.float32,
            "relu" if self.relu else "none",
            [],
            None,
        )
        y = y[:0] if empty else y
        return self._finished(y.contiguous() if self.layout == NCHW else y)

    def _packed(self) -> Any:
        return torch.ops.onednn.qconv_prepack(
            self.integers, self.weight_steps, 1.0, 0, self.stride, self.padding, self.dilation, self.groups, None
        )


class Int8(LayerKernel):
    """The layer with weights and inputs in 8 bits, in one memory layout; zeros do not make it faster.

    What it gives is what the twin of a network gives that `quantize` made, but for inputs in the middle between two
    steps. It runs no other layers than those: of another layer it would be a worse version. Converting inputs to
    integers and results to float32 is part of its time.

    x86 processors without VNNI add pairs of products in 16 bits, which overflow silently for weights beyond -64 to
    `NARROW`, that is of more than 7 bits; such are refused there.

    Args:
        layout: "nchw" or "nhwc"; linear layers run as part of the first.
        steps: of the layer that it is to run.

    Raises:
        ValueError: there is no such layout.
    """

    uses_sparsity = False
    exact = False
    rectifies = True

    def __init__(self, layout: str = NCHW, steps: Steps | None = None) -> None:
        if layout not in IMAGE_LAYOUTS:
            raise ValueError(f"a layout is one of {IMAGE_LAYOUTS}, got {layout!r}")
        self.layout, self.steps = layout, steps

    @property
    def name(self) -> str:
        """`int8` or `int8-nhwc`."""
        return "int8" if self.layout == NCHW else f"int8-{self.layout}"

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Linear layers in the second layout, anything but float32 on the CPU, and processors without the libraries."""
        if self.layout == NHWC and work.kind == "linear":
            return "a linear layer has no memory layout: kernel 'int8' runs it in every network"
        if device.type != "cpu":
            return f"the 8-bit kernels run on the CPU, not on {device.type} devices"
        if dtype != torch.float32:
            return f"the 8-bit kernels take and give float32, not {dtype}"
        return unavailable()

    def refuses_weight(self, weight: Tensor) -> str | None:
        """Weights that could overflow here."""
        if self.steps is None or not saturates():
            return None
        integers = rounded(weight, 1.0 / weight.new_tensor(self.steps.weight_steps))
        low, high = (int(bound) for bound in torch.aminmax(integers))
        if low >= -NARROW - 1 and high <= NARROW:
            return None
        return (
            f"weights from {low} to {high} overflow 16 bits on this processor, which has no VNNI; quantise them to 7 "
            "bits"
        )

    def quantized(self, steps: Steps) -> Int8:
        """The same for a layer with these steps."""
        return Int8(self.layout, steps)

    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The layer in integers; without steps it finds the range of every input, which takes a little longer."""
        if isinstance(layer, nn.Linear):
            return IntegerLinear(layer, self.steps)
        return IntegerConv2d(layer, self.steps, self.layout)

    def sample(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """With a fixed range of inputs, as behind a ReLU."""
        return self.quantized(Steps(0.01, 0, tuple((1.0 / weight_scales(layer.weight)).tolist()))).build(layer)

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """Products, also of whole vectors, and traffic, of which inputs and results are converted."""
        vectors = math.ceil(work.outputs / 16) * 16 * math.ceil(work.inputs / work.groups / 4) * 4
        terms = {
            "calls": 1.0,
            "macs": float(work.macs),
            "vector_macs": float(vectors * work.taps * work.positions),
            "weights": float(work.weights),
            "read": float(work.input_elements),
            "written": float(work.output_elements),
        }
        if work.kind == "linear":
            few = min(work.batch, 8)
            return {**terms, "few_macs": float(few * work.weights), "one_row": float(work.batch == 1)}
        patches = 0.0 if work.pointwise else float(work.inputs * work.taps * work.positions)
        return {**terms, "images": float(work.batch), "patches": patches, "groups": float(work.groups)}


def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return not known.get("avx512_vnni", False)


@functools.cache
def unavailable() -> str | None:
    """Why layers cannot run in 8 bits here, or None if they can."""
    advice = "install a build of PyTorch for x86 that has FBGEMM and oneDNN, or go on without 8-bit kernels"
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return f"this PyTorch has no FBGEMM for this processor; {advice}"
    if not torch.backends.mkldnn.is_available():
        return f"this PyTorch has no oneDNN; {advice}"
    try:
        _linear(), _linear_relu(), torch.ops.onednn.qconv2d_pointwise, torch.ops.onednn.qconv_prepack
        getattr(torch, "quantize_per_tensor"), getattr(torch, "_make_per_channel_quantized_tensor")  # noqa: B009
    except AttributeError as error:
        return f"this PyTorch lacks an operator ({error}); {advice}"
    return None


def _linear() -> Any:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


def _linear_relu() -> Any:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_relu_output_fp32


def _unsigned(x: Tensor, step: float, zero: int) -> Tensor:
    """The integers of inputs, uint8: the memory of torch's own quantised tensor, which it would copy one by one."""
    quantized = torch.quantize_per_tensor(x, step, zero, torch.quint8)
    integers = torch.empty(0, dtype=torch.uint8)
    return integers.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())
