"""2:4 semi-structured sparsity on NVIDIA's tensor cores, through torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import to_sparse_semi_structured

from lightning_prune.granularities import NM, Granularity
from lightning_prune.kernels.kernel import LayerKernel
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.workload import Workload

_ROWS, _COLUMNS = 32, 64  # what cuSPARSELt's and CUTLASS's half-precision products need


class SemiStructuredLinear(nn.Module):
    """A linear layer whose weight is stored as 2 of every 4 values and their places."""

    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach().contiguous()), requires_grad=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return functional.linear(x, self.weight, self.bias)


class SemiStructured(LayerKernel):
    """2:4 sparse tensor-core products; twice the dense rate at best, at one sparsity alone."""

    granularity = NM(2, 4)
    points = ((0.5, 1.0),)

    @property
    def name(self) -> str:
        """`semi-structured`."""
        return "semi-structured"

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """All but half-precision linear layers of suitable size on a recent NVIDIA GPU."""
        if device.type != "cuda":
            return f"2:4 products run on NVIDIA GPUs, not on {device.type}"
        if not torch.cuda.is_available():
            return f"2:4 products run on NVIDIA GPUs, and this PyTorch finds none for {device}"
        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            return f"2:4 products need compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"2:4 products take float16 and bfloat16, not {dtype}; call model.half()"
        if work.kind != "linear":
            return f"torch has 2:4 products for linear layers alone, not for {work.kind}"
        if work.outputs % _ROWS or work.inputs % _COLUMNS:
            return (
                f"2:4 products need multiples of {_ROWS} outputs and {_COLUMNS} inputs, "
                f"not {work.outputs} and {work.inputs}"
            )
        return None

    def serves(self, granularity: Granularity) -> bool:
        """Patterns that leave at most 2 of every 4 inputs."""
        return granularity in (NM(2, 4), NM(1, 4), NM(1, 2))

    def refuses_weight(self, weight: Tensor) -> str | None:
        """More than 2 nonzeros among some 4 inputs."""
        if weight.shape[1] % 4 or ((weight != 0).reshape(len(weight), -1, 4).sum(2) > 2).any():
            return (
                f"the weight of shape {tuple(weight.shape)} has more than 2 nonzeros among some 4 inputs; "
                "prune it with NM(2, 4)"
            )
        return None

    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The layer with its weight in 2:4 form.

        Raises:
            ValueError: the layer is not linear, or more than 2 of some 4 neighbouring weights are not zero.
        """
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"torch has 2:4 products for linear layers alone, not for {type(layer).__name__}")
        if reason := self.refuses_weight(layer.weight.detach()):
            raise ValueError(reason)
        return SemiStructuredLinear(layer)

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """Half the products and half the weights."""
        usable = torch.where(left.density <= 0.5, 1.0, torch.inf)  # the pattern has no other sparsity
        return {
            "calls": usable,
            "macs": work.macs / 2.0,
            "weights": work.weights / 2.0,
            "read": float(work.input_elements),
            "written": float(work.output_elements),
        }
