"""Dense layers as PyTorch runs them: the time does not depend on the zeros."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_prune.kernels.batch_last import BatchLast, refused
from lightning_prune.kernels.kernel import CHWN, LAYOUTS, NCHW, NHWC, LayerKernel, octaves, shape_coordinates
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.workload import Workload


class Dense(LayerKernel):
    """The layer itself, in one memory layout.

    Args:
        layout: "nchw", "nhwc" or, with copies from and to, "chwn"; linear layers run as part of the first.

    Raises:
        ValueError: there is no such layout.
    """

    uses_sparsity = False

    def __init__(self, layout: str = NCHW) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"a layout is one of {LAYOUTS}, got {layout!r}")
        self.layout = layout

    @property
    def name(self) -> str:
        """`dense`, `dense-nhwc` or `dense-chwn`."""
        return "dense" if self.layout == NCHW else f"dense-{self.layout}"

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Linear layers in other layouts than the first, which they share, and batches that cannot lie last."""
        if self.layout != NCHW and work.kind == "linear":
            return "a linear layer has no memory layout: kernel 'dense' runs it in every network"
        return refused(work) if self.layout == CHWN else None

    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """A copy of the layer with its weight in the layout."""
        built = copy.deepcopy(layer).requires_grad_(False)
        built.zero_grad()  # a copy of a layer copies its gradients
        if self.layout == NHWC:
            built = built.to(memory_format=torch.channels_last)
        return BatchLast(built) if self.layout == CHWN else built

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """Work, also rounded up to whole vectors, and traffic."""
        return dense_features(work, work.outputs, work.inputs, self.layout)

    def coordinates(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """The shape, and how it fits vectors."""
        return dense_coordinates(work, work.outputs, work.inputs, self.layout)


def dense_features(
    work: Workload, outputs: Tensor | float, inputs: Tensor | float, layout: str
) -> dict[str, Tensor | float]:
    """Terms of a dense layer with this many of its outputs and inputs.

    PyTorch runs small convolutions by itself, as a matrix product per image, and gives the others to oneDNN, which
    works on whole vectors of channels; each way has terms of its own.
    """
    outputs, inputs = torch.as_tensor(outputs, dtype=torch.float64), torch.as_tensor(inputs, dtype=torch.float64)
    weights = outputs * inputs / work.groups * work.taps
    if work.groups > 1:
        weights = outputs * work.taps * (work.inputs // work.groups)
    terms = {
        "calls": torch.ones_like(weights),
        "macs": weights * work.positions,
        "weights": weights,
        "read": inputs * (work.input_elements / work.inputs),
        "written": outputs * float(work.positions),
    }
    if work.kind == "linear":
        return {
            **terms,
            "vector_macs": whole_vectors(outputs) * inputs * float(work.batch),
            "few_macs": weights * float(min(work.batch, 8)),
            "one_row": torch.full_like(weights, float(work.batch == 1)),
            "one_row_weights": weights * float(work.batch == 1),
        }
    images = {"images": terms["calls"] * work.batch, "image_weights": weights * work.batch}
    if work.groups > 1:
        vector_macs = weights / outputs * whole_vectors(outputs) * work.positions
        return {**terms, **images, "vector_macs": vector_macs, "groups": outputs * (work.groups / work.outputs)}
    native = runs_natively(work, inputs).to(torch.float64)
    wide_outputs, wide_inputs = _wide(work, outputs, inputs, layout)
    both = {
        **terms,
        **images,
        "vector_macs": wide_outputs * wide_inputs * float(work.taps * work.positions),
        "patches": wide_inputs * float(work.taps * work.positions),
        "wide_written": wide_outputs * float(work.positions),
    }
    return {
        **{f"native_{name}": value * native for name, value in both.items()},
        **{f"onednn_{name}": value * (1.0 - native) for name, value in both.items()},
    }


def runs_natively(work: Workload, inputs: Tensor) -> Tensor:
    """Whether PyTorch keeps a convolution of this many inputs to itself, by its rule in `aten/.../Convolution.cpp`."""
    plain = work.stride == (1, 1) and work.dilation == (1, 1) and work.batch < 16 and work.taps == 1
    one_thread = torch.get_num_threads() == 1
    elements = inputs * (work.input_elements / work.inputs)
    small = torch.tensor(work.batch == 1 and work.groups == 1 and max(work.window) <= 3) & (elements <= 20480)
    return small | (torch.ones_like(small) if plain and one_thread else torch.zeros_like(small))


def whole_vectors(channels: Tensor) -> Tensor:
    """Channels rounded up to vectors of 16 floats."""
    return torch.ceil(channels / 16 - 1e-9) * 16


def _wide(work: Workload, outputs: Tensor, inputs: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Outputs and inputs that are really worked on: oneDNN fills whole vectors, of few inputs in "nchw" excepted."""
    native = runs_natively(work, inputs)
    wide_inputs = torch.where((inputs > 16) & (layout == NCHW) & ~native, whole_vectors(inputs), inputs)
    return torch.where(native, outputs, whole_vectors(outputs)), wide_inputs


def dense_coordinates(
    work: Workload, outputs: Tensor | float, inputs: Tensor | float, layout: str
) -> dict[str, Tensor | float]:
    """The shape with this many outputs and inputs, how they fill vectors, and which way PyTorch goes."""
    outputs, inputs = torch.as_tensor(outputs, dtype=torch.float64), torch.as_tensor(inputs, dtype=torch.float64)
    native = torch.zeros_like(inputs)
    unfilled = (-outputs % 16) / 16
    if work.kind == "conv2d" and work.groups == 1:
        native = runs_natively(work, inputs).to(torch.float64)
        outputs, inputs = _wide(work, outputs, inputs, layout)
        unfilled = torch.zeros_like(inputs)
    return {
        **shape_coordinates(work),
        "inputs": octaves(inputs),
        "outputs": octaves(outputs),
        "unfilled": unfilled,
        "native": 3.0 * native,
    }
