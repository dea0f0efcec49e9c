"""What a kernel is: how a layer runs, and what its time depends on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_prune.granularities import Granularity, Unstructured
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.steps import Steps
from lightning_prune.kernels.workload import Workload

NCHW, NHWC, CHWN = "nchw", "nhwc", "chwn"
LAYOUTS = (NCHW, NHWC, CHWN)
"""How activations lie in memory, one for a whole network. PyTorch's linear layers run alike in all."""

IMAGE_LAYOUTS = (NCHW, NHWC)
"""Those that PyTorch's convolutions know; the other one is for kernels of our own, see `batch_last`."""


class LayerKernel(ABC):
    """One way of running a Linear or Conv2d whose weight has zeros.

    A kernel of your own has a `name`, says what it `refuses`, builds the module that runs a layer and lists the
    `features` of its time. It is a value: two of the same name are the same kernel.
    """

    layout: str = NCHW
    """Of the activations that its convolutions take and give."""

    granularity: Granularity = Unstructured()
    """The pattern of zeros that it is made for; calibration prunes by it."""

    points: tuple[tuple[float, float], ...] = ((0.4, 1.0), (0.7, 1.0), (0.85, 1.0), (0.95, 1.0), (1.0, 1.0))
    """Where calibration times it: fraction removed, and share of the inputs that keep any weight; one group stays."""

    without_zeros: str | None = None
    """Name of the kernel that it amounts to where nothing was removed: times of that one are times of this one too."""

    uses_sparsity: bool = True
    """Whether its time depends on what is left of the weight."""

    exact: bool = True
    """Whether it gives what the layer gives but for rounding of floats; others run layers that a twin quantises."""

    rectifies: bool = False
    """Whether what it builds has an attribute `relu`, with which it rectifies and marks its results."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique, stable: profiles are kept under it."""

    @abstractmethod
    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run such a layer here, or None if it can."""

    def serves(self, granularity: Granularity) -> bool:
        """Whether its features hold for zeros in this pattern."""
        return True

    def refuses_weight(self, weight: Tensor) -> str | None:
        """Why it cannot run a layer with these zeros, or None if it can."""
        return None

    @abstractmethod
    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The module that computes what `layer`, with its zeros, computes; `layer` is not changed."""

    def quantized(self, steps: Steps) -> LayerKernel:
        """The kernel for a layer whose inputs and weights are rounded in these steps; one that is exact is the same."""
        return self

    def sample(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """What calibration times: what `build` gives, unless that would take another time in use."""
        return self.build(layer)

    @abstractmethod
    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """The terms, each >= 0 and in a unit of its own, of which the time is a sum with coefficients >= 0."""

    def coordinates(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """Where a layer lies among others, on scales on which neighbours take similar times per feature.

        What the sum of `features` leaves unexplained is interpolated between measurements over these.
        """
        return shape_coordinates(work)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerKernel) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"


def family(work: Workload) -> str:
    """Layers that a kernel runs in different ways have coefficients of their own."""
    if work.kind == "linear":
        return "linear"
    if work.groups > 1:
        return "grouped"
    return "pointwise" if work.taps == 1 else "convolution"


def shape_coordinates(work: Workload) -> dict[str, Tensor | float]:
    """Sizes in octaves, and what else tells convolutions apart."""
    return {
        "batch": math.log2(work.batch),
        "inputs": math.log2(work.inputs),
        "outputs": math.log2(work.outputs),
        "image": math.log2(math.prod(work.output_size)) / 2,
        "window": math.log2(work.taps) / 2,
        "stride": math.log2(work.stride[0]),
        "padded": float(max(work.padding) > 0),
    }


def octaves(value: Tensor | float) -> Tensor:
    """`log2`, of at least a thousandth."""
    return torch.log2(torch.as_tensor(value, dtype=torch.float64).clamp_min(1e-3))
