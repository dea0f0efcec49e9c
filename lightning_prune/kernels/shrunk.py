"""A smaller dense layer: the outputs and inputs that are left, gathered and put back in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_prune.granularities import Filter
from lightning_prune.kernels.dense import Dense, dense_coordinates, dense_features
from lightning_prune.kernels.kernel import IMAGE_LAYOUTS, NCHW, NHWC, LayerKernel
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.workload import Workload


class ShrunkLayer(nn.Module):
    """Runs a dense layer on some inputs and puts its results among all outputs; the others are the bias.

    Where channels lie next to each other in memory, copying columns into place is slow, and selecting them is fast:
    the smaller layer then has one more output, always zero, which is selected for all that are left out.

    Args:
        layer: to be shrunk; it is not changed.
        rows: indices of the outputs to compute.
        columns: indices of the inputs to read.
        layout: of a convolution's activations.
    """

    columns: Tensor | None
    places: Tensor | None
    rest: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, rows: Tensor, columns: Tensor, layout: str) -> None:
        super().__init__()
        weight, bias = layer.weight.detach(), layer.bias
        outputs, inputs = len(weight), layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        self.convolution = isinstance(layer, nn.Conv2d)
        self.channels_last = not self.convolution or layout == NHWC
        whole = len(rows) == outputs
        self.layer = _smaller(layer, rows, columns, spare=self.channels_last and not whole)
        if layout == NHWC:
            self.layer = self.layer.to(memory_format=torch.channels_last)
        rest = weight.new_zeros(outputs) if bias is None else bias.detach().clone()
        places = rows
        if self.channels_last:
            places = torch.full((outputs,), len(rows), device=rows.device).index_copy_(
                0, rows, torch.arange(len(rows), device=rows.device)
            )
            rest[rows] = 0
        if isinstance(self.layer, nn.Conv2d) and self.layer.in_channels > len(columns):
            columns = torch.cat([columns, columns[:1]])  # what the spare output of a depthwise layer reads
        self.register_buffer(
            "columns", None if torch.equal(columns, torch.arange(inputs, device=columns.device)) else columns
        )
        self.register_buffer("places", None if whole else places)
        self.register_buffer("rest", rest)

    def forward(self, x: Tensor) -> Tensor:
        """What the whole layer gives for `x`."""
        if self.convolution and x.ndim == 3:
            return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
        if self.columns is not None:
            x = self._selected(x, self.columns) if self.channels_last else x.index_select(1, self.columns)
        y: Tensor = self.layer(x)
        if self.places is None:
            return y
        if self.channels_last:
            return self._selected(y, self.places, self.rest)
        whole = y.new_empty(len(y), len(self.rest), *y.shape[2:])
        return whole.copy_(self.rest[:, None, None]).index_copy_(1, self.places, y)

    def _selected(self, x: Tensor, indices: Tensor, added: Tensor | None = None) -> Tensor:
        """Some channels, which lie next to each other in memory, and a number added to each."""
        if self.convolution:
            x = x.permute(0, 2, 3, 1)
        y = x.reshape(-1, x.shape[-1]).index_select(1, indices)
        if added is not None:
            y.add_(added)
        y = y.view(*x.shape[:-1], len(indices))
        return y.permute(0, 3, 1, 2) if self.convolution else y


class Shrunk(LayerKernel):
    """A dense layer of the outputs and inputs that have any weight left.

    Args:
        layout: "nchw" or "nhwc"; linear layers run as part of the first.

    Raises:
        ValueError: there is no such layout.
    """

    granularity = Filter()
    points = ((0.5, 1.0), (0.25, 0.75), (0.6, 0.4), (0.85, 0.15), (1.0, 0.0))

    def __init__(self, layout: str = NCHW) -> None:
        if layout not in IMAGE_LAYOUTS:
            raise ValueError(f"a layout is one of {IMAGE_LAYOUTS}, got {layout!r}")
        self.layout = layout
        self.without_zeros = Dense(layout).name

    @property
    def name(self) -> str:
        """`shrunk` or `shrunk-nhwc`."""
        return "shrunk" if self.layout == NCHW else f"shrunk-{self.layout}"

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Grouped convolutions that are not depthwise: their groups would differ in size."""
        if self.layout == NHWC and work.kind == "linear":
            return "a linear layer has no memory layout: kernel 'shrunk' runs it in every network"
        if work.groups > 1 and not work.groups == work.inputs == work.outputs:
            return f"removing outputs leaves {work.groups} groups of different sizes"
        return None

    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The smaller layer between a gathering and a scattering."""
        kept = (layer.weight.detach() != 0).flatten(2).any(2) if layer.weight.ndim > 2 else layer.weight.detach() != 0
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        rows = kept.any(1).nonzero().flatten()
        columns = rows if depthwise else kept.any(0).nonzero().flatten()
        if not len(rows):  # a layer without weights: one output is computed, so that shapes follow from it
            rows = rows.new_zeros(1)
            columns = rows if depthwise else rows.clone()
        return ShrunkLayer(layer, rows, columns, self.layout)

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """The smaller layer, the gathered inputs and the scattered outputs."""
        rows, columns = _sizes(work, left)
        gathers, scatters = (columns < work.inputs).double(), (rows < work.outputs).double()
        return {
            **dense_features(work, rows, columns, self.layout),
            "gathers": gathers,
            "gathered": gathers * columns * (work.input_elements / work.inputs),
            "scatters": scatters,
            "filled": scatters * float(work.output_elements),
            "scattered": scatters * rows * float(work.positions),
        }

    def coordinates(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """Those of the smaller layer, and what is gathered and scattered around it."""
        rows, columns = _sizes(work, left)
        return {
            **dense_coordinates(work, rows, columns, self.layout),
            "all_inputs": math.log2(work.inputs),
            "all_outputs": math.log2(work.outputs),
            "gathers": (columns < work.inputs).double(),
            "scatters": (rows < work.outputs).double(),
        }


def _sizes(work: Workload, left: Occupancy) -> tuple[Tensor, Tensor]:
    """Outputs and inputs of the smaller layer."""
    rows, columns = left.rows * work.outputs, left.columns * work.inputs
    if work.groups > 1:  # depthwise: each output reads the input of its own number
        columns = rows
    return rows.clamp_min(1.0), columns.clamp_min(1.0)


def _smaller(layer: nn.Linear | nn.Conv2d, rows: Tensor, columns: Tensor, spare: bool) -> nn.Linear | nn.Conv2d:
    """The layer between some inputs and outputs, and with a spare output that is always zero if asked for."""
    weight = layer.weight.detach()[rows]
    outputs, bias = len(rows) + spare, layer.bias is not None
    if isinstance(layer, nn.Linear):
        weight = weight[:, columns]
        smaller: nn.Linear | nn.Conv2d = nn.utils.skip_init(nn.Linear, len(columns), outputs, bias)
    else:
        depthwise = layer.groups > 1
        weight = weight if depthwise else weight[:, columns]
        smaller = nn.utils.skip_init(
            nn.Conv2d,
            len(columns) + (spare and depthwise),
            outputs,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            outputs if depthwise else 1,
            bias,
            layer.padding_mode,
        )
    extra = weight.new_zeros(int(spare), *weight.shape[1:])
    smaller.weight = nn.Parameter(torch.cat([weight, extra]).contiguous(), requires_grad=False)
    if layer.bias is not None:
        smaller.bias = nn.Parameter(torch.cat([layer.bias.detach()[rows], extra.new_zeros(int(spare))]), False)
    return smaller.eval()
