"""Zeros anywhere, skipped by our own vectorised C++, which `native/` holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.kernels import native
from lightning_prune.kernels.batch_last import arranged, lies_last, refused
from lightning_prune.kernels.kernel import CHWN, NCHW, LayerKernel, octaves, shape_coordinates
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.simd_plan import choose, least, too_wide, widest
from lightning_prune.kernels.workload import Workload
from lightning_prune.rectifiers import mark_rectified

_MOST_PLANS = 16
"""Shapes of inputs that a layer remembers how to run."""


class SparseLayer(nn.Module):
    """A linear layer or convolution of which only the weights that are left are stored, filter by filter.

    Args:
        layer: with zeros in its weight; it is not changed.
        layout: of its results, "nchw" or "chwn"; inputs that lie otherwise are copied first.

    Attributes:
        relu: whether it rectifies its outputs, and marks them; to be set before the first call.
    """

    layout = NCHW  # of those that were pickled when there was no other
    starts: Tensor
    taps: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, layout: str = NCHW) -> None:
        super().__init__()
        self.layout = layout
        weight = layer.weight.detach()
        flat = weight.reshape(len(weight), -1).contiguous()
        rows, taps = (flat != 0).nonzero(as_tuple=True)
        self.shape = tuple(weight.shape)
        self.linear = isinstance(layer, nn.Linear)
        self.groups, self.border = 1, None
        if isinstance(layer, nn.Conv2d):
            self.groups = layer.groups
            taps = taps + rows // (len(weight) // layer.groups) * flat.shape[1]  # counted through all groups
            self.stride, self.dilation = layer.stride, layer.dilation
            self.pads = layer._reversed_padding_repeated_twice
            self.mode = layer.padding_mode
            if layer.padding_mode != "zeros" and any(self.pads):
                self.border, self.pads = self.pads, [0] * 4
        counts = torch.bincount(rows, minlength=len(weight))
        self.register_buffer("starts", functional.pad(counts.cumsum(0), (1, 0)))
        self.register_buffer("taps", taps)
        self.register_buffer("values", flat[flat != 0])
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.relu = False
        self._plans: dict[tuple[int, ...], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the plans, which belong to the process."""
        return {**self.__dict__, "_plans": {}}

    def forward(self, x: Tensor) -> Tensor:
        """What the whole layer gives for `x`."""
        plan = self._plans.get(x.shape) if self.border is None else None
        y = self._slowly(x) if plan is None else plan.run(x)
        return mark_rectified(y) if self.relu else y

    def _slowly(self, x: Tensor) -> Tensor:
        """For inputs that have to be brought into shape, or are of a new one."""
        if x.ndim != len(self.shape):
            if not self.linear:
                return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
            return self(x.reshape(-1, self.shape[1])).view(*x.shape[:-1], self.shape[0])  # type: ignore[no-any-return]
        if self.border is not None:
            x = functional.pad(x, self.border, mode=self.mode)
        if not len(x):
            work = self._workload(x)
            return x.new_empty(0, work.outputs, *(() if self.linear else work.output_size))
        return (self._plans.get(x.shape) or self._plan(x)).run(x)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._plans.clear()  # they hold the weights that were

    def _plan(self, x: Tensor) -> Any:
        """How inputs of this shape are run."""
        work = self._workload(x)
        living = len(torch.unique(self.taps // work.taps)) / work.inputs
        out = [work.batch, work.outputs, *(() if self.linear else work.output_size)]
        last, beside = self.layout == CHWN and lies_last(work.batch, images=not self.linear), 0
        if last:
            work, beside = arranged(work, widest())
        settings = choose(work, len(self.values) / work.weights, living, beside > 0)
        sizes = [work.batch, work.inputs, *work.input_size, work.outputs, *work.output_size, *work.window]
        sizes += [*work.stride, *work.padding, *work.dilation, beside]
        weights = (self.starts, self.taps, self.values, self.bias, self.relu)
        plan = native.library().Layer(work.kind == "linear", last, out, sizes, *weights, settings.as_list())
        while len(self._plans) >= _MOST_PLANS:
            self._plans.pop(next(iter(self._plans)), None)
        self._plans[x.shape] = plan
        return plan

    def _workload(self, x: Tensor) -> Workload:
        outputs = self.shape[0]
        if self.linear:
            return Workload("linear", max(1, len(x)), self.shape[1], outputs)
        window = (self.shape[2], self.shape[3])
        left, right, top, bottom = self.pads
        height, width = (
            (extent + pads - dilation * (size - 1) - 1) // stride + 1
            for extent, pads, dilation, size, stride in zip(
                x.shape[2:], (top + bottom, left + right), self.dilation, window, self.stride, strict=True
            )
        )
        return Workload(
            "conv2d",
            max(1, len(x)),
            self.shape[1] * self.groups,
            outputs,
            (x.shape[2], x.shape[3]),
            (height, width),
            window,
            (self.stride[0], self.stride[1]),
            (top, left),
            (self.dilation[0], self.dilation[1]),
            self.groups,
        )


def _eventful(left: Occupancy) -> Tensor:
    """Share of the guessed cost of visiting filters that is paid, 1 where zeros are anywhere.

    Filters without weights are hardly visited, and visits are cheaper where neighbouring inputs are kept together: by
    blocks of 8 x 8, or in what is left of outputs and inputs that went as a whole. The numbers were measured, 40 masks
    of a linear layer and of a 3x3 convolution with 3 to 50 % of the weights.
    """
    rows, columns = left.rows.double().clamp_min(1e-6), left.columns.double().clamp_min(1e-6)
    density = (left.density.double() / (rows * columns)).clamp(1e-6, 1.0)  # of outputs and inputs with any weight
    together = left.blocks(1, 8).double() / (rows * (1.0 - (1.0 - columns) ** 8))
    filled = (density / together.clamp_min(1e-9)).clamp(max=1.0)
    by_chance = density / (1.0 - (1.0 - density) ** 8)
    scattered = ((1.0 - filled) / (1.0 - by_chance).clamp_min(1e-6)).clamp(0.0, 1.0)
    scattered = scattered * (4.0 * (1.0 - density)).clamp(max=1.0)
    return (0.15 + 0.85 * rows) * (0.35 + 0.65 * scattered)


def _living(work: Workload, left: Occupancy) -> Tensor:
    """Share of the input's channels that meet any weight: of depthwise layers, that of their own filters."""
    if work.groups < work.inputs:
        return left.columns.double()
    return 1.0 - (1.0 - left.rows.double()) ** (work.outputs // work.inputs)


class SIMD(LayerKernel):
    """Our own kernel for zeros anywhere: only weights that are left are multiplied, each with a whole vector.

    The C++ behind it is built on the first use, for the machine at hand.

    Args:
        layout: "nchw", or "chwn" for batches that can lie last; there, linear layers lie likewise, features first.

    Raises:
        ValueError: it runs in no such layout.
    """

    rectifies = True
    points = ((0.0, 1.0), (0.5, 1.0), (0.8, 1.0), (0.94, 1.0), (1.0, 1.0))  # depthwise layers pay without zeros, too

    def __init__(self, layout: str = NCHW) -> None:
        if layout not in (NCHW, CHWN):
            raise ValueError(f"the SIMD kernel runs in layouts {(NCHW, CHWN)}, got {layout!r}")
        self.layout = layout

    @property
    def name(self) -> str:
        """`simd` or `simd-chwn`."""
        return "simd" if self.layout == NCHW else f"simd-{self.layout}"

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Anything but float32 on the CPU, very wide images, and machines where its C++ cannot be built."""
        if device.type != "cpu":
            return f"the SIMD kernels run on the CPU, not on {device.type} devices"
        if dtype != torch.float32:
            return f"the SIMD kernels are for float32, not {dtype}"
        if self.layout == CHWN and (reason := refused(work)):
            return reason
        call, beside = self._arranged(work)
        return too_wide(call, beside > 0) or native.unavailable()

    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The layer without its zeros."""
        return SparseLayer(layer, self.layout)

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """Guessed cycles of each of its steps, with the settings it would choose, and traffic."""
        density = left.density.double()
        living = _living(work, left).expand_as(density)
        call, beside = self._arranged(work)
        done = least(call, density.numpy().reshape(-1), living.numpy().reshape(-1), beside > 0)

        def like_density(values: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(values).view(density.shape)

        return {
            "calls": 1.0,
            "compute": like_density(done.compute),
            "visits": like_density(done.visits) * _eventful(left),
            "copied": like_density(done.copied),
            "written": like_density(done.written),
            "stored": density * work.weights,
            "read": living * work.input_elements,
            "output": float(work.output_elements),
        }

    def _arranged(self, work: Workload) -> tuple[Workload, int]:
        """The call that the library runs; batches that cannot lie last lie as they do in "nchw"."""
        return arranged(work, widest()) if self.layout == CHWN and not refused(work) else (work, 0)

    def coordinates(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """The shape, the share that is left and how many weights that is."""
        return {
            **shape_coordinates(work),
            "left": octaves(left.density),
            "stored": octaves(left.density * work.weights),
        }
