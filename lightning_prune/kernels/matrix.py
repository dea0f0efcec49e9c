"""Layers as a sparse matrix times a dense one: what CSR and block-sparse share."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.kernels.kernel import LayerKernel, octaves, shape_coordinates
from lightning_prune.kernels.notices import hear
from lightning_prune.kernels.occupancy import Occupancy
from lightning_prune.kernels.workload import Workload

hear(r"Sparse \w+ tensor support is in beta", lambda: torch.zeros(1, 1, device="cpu").to_sparse_csr())


class SparseMatrix(nn.Module):
    """A matrix `[rows, columns]` of which zeros are not stored, multiplied by dense ones.

    The parts are plain buffers, since compressed tensors can be neither copied deeply nor registered; the
    compressed tensor is put around them at each call.
    """

    crow: Tensor
    col: Tensor
    values: Tensor

    def __init__(self, compressed: Tensor) -> None:
        super().__init__()
        self.shape = tuple(compressed.shape)
        self.layout = compressed.layout
        self.register_buffer("crow", compressed.crow_indices().int())
        self.register_buffer("col", compressed.col_indices().int())
        self.register_buffer("values", compressed.values())

    def tensor(self) -> Tensor:
        """The compressed tensor."""
        return torch.sparse_compressed_tensor(
            self.crow, self.col, self.values, self.shape, layout=self.layout, check_invariants=False
        )


class MatrixLinear(nn.Module):
    """`x W^T + b` as the transpose of `W x^T`, the sparse factor first."""

    bias: Tensor | None

    def __init__(self, layer: nn.Linear, compressed: Tensor) -> None:
        super().__init__()
        self.matrix = SparseMatrix(compressed)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        matrix = self.matrix.tensor()
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 1 and matrix.layout == torch.sparse_csr:
            y = torch.mv(matrix, rows[0])
            y = y if self.bias is None else y.add_(self.bias)
        else:
            y = torch.mm(matrix, rows.t().contiguous())
            y = (y if self.bias is None else y.add_(self.bias[:, None])).t().contiguous()
        return y.view(*x.shape[:-1], matrix.shape[0])


class MatrixConv2d(nn.Module):
    """A convolution as a matrix `[out, window positions * in]` times the patches of the input, image by image."""

    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, compressed: Tensor) -> None:
        super().__init__()
        self.matrix = SparseMatrix(compressed)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.window, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.pad_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.pads = list(layer._reversed_padding_repeated_twice)
        self.as_it_lies = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and not any(self.pads)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in, height, width]` (or without batch) -> the same with `out` channels."""
        if x.ndim == 3:
            return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
        matrix = self.matrix.tensor()
        x = x.contiguous()
        if any(self.pads):
            x = functional.pad(x, self.pads, mode=self.pad_mode)
        size = [
            (extent - dilation * (window - 1) - 1) // stride + 1
            for extent, window, stride, dilation in zip(
                x.shape[2:], self.window, self.stride, self.dilation, strict=True
            )
        ]
        y = x.new_empty(len(x), matrix.shape[0], *size)
        columns = None
        for image, out in zip(x, y.flatten(2), strict=True):
            if self.as_it_lies:
                torch.mm(matrix, image.flatten(1), out=out)
            else:
                columns = self._patches(image, size, columns)
                torch.mm(matrix, columns, out=out)
            if self.bias is not None:
                out.add_(self.bias[:, None])
        return y

    def _patches(self, image: Tensor, size: list[int], buffer: Tensor | None) -> Tensor:
        """What each window position sees: `[window positions * in, output positions]`."""
        channel, row, column = image.stride()
        (dilate_y, dilate_x), (step_y, step_x) = self.dilation, self.stride
        view = image.as_strided(
            (*self.window, len(image), *size),
            (dilate_y * row, dilate_x * column, channel, step_y * row, step_x * column),
        )
        if buffer is None:
            buffer = image.new_empty(math.prod(view.shape[:3]), math.prod(size))
        buffer.view(view.shape).copy_(view)
        return buffer


class MatrixKernel(LayerKernel):
    """A kernel that multiplies by a compressed weight; a subclass says how it is compressed."""

    @abstractmethod
    def compress(self, matrix: Tensor) -> Tensor:
        """A dense matrix -> the compressed one."""

    @abstractmethod
    def stored(self, work: Workload, left: Occupancy) -> Tensor:
        """The share of the weight that is stored and multiplied."""

    def refuses(self, work: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
        """Grouped convolutions, and numbers that the library behind has no product for."""
        if work.groups > 1:
            return f"a convolution of {work.groups} groups is no single matrix"
        if device.type == "cpu" and not torch.backends.mkl.is_available():
            return (
                "this PyTorch was built without MKL, whose sparse products it needs; install a build for x86 with MKL"
            )
        if device.type not in ("cpu", "cuda"):
            return f"torch.sparse has no product on {device.type} devices"
        if device.type == "cpu" and dtype not in (torch.float32, torch.float64):
            return f"MKL multiplies sparse matrices of float32 and float64, not {dtype}"
        return None

    def build(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The layer with its weight compressed, without its zeros."""
        weight = layer.weight.detach()
        if isinstance(layer, nn.Linear):
            return MatrixLinear(layer, self.compress(weight))
        return MatrixConv2d(layer, self.compress(weight.permute(0, 2, 3, 1).flatten(1)))

    def features(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """Products with stored weights, traffic of weights, patches and results, and work per image."""
        stored = self.stored(work, left) * work.weights
        single = float(work.kind == "linear" and work.batch == 1)  # a matrix times a vector
        images = 1 if work.kind == "linear" else work.batch
        width = work.positions // images
        patches = 0.0 if work.pointwise else float(work.inputs * work.taps * work.positions)
        return {
            "calls": 1.0,
            "images": float(images),
            "macs": stored * work.positions,
            "vector_macs": stored * images * math.ceil(width / 16) * 16,
            "root_macs": stored * images * math.sqrt(width),
            "stored": stored,
            "rows": float(work.outputs * images),
            "written": float(work.output_elements),
            "patches": patches,
            "strided_patches": patches if work.stride != (1, 1) else 0.0,
            "runs": patches / work.output_size[1],  # pieces of a row that are copied at once
            "padded": 0.0 if max(work.padding) == 0 else float(work.input_elements),
            "read": float(work.input_elements),
            "vector_calls": single,
            "vector_stored": single * stored,
            "vector_rows": single * work.outputs,
        }

    def coordinates(self, work: Workload, left: Occupancy) -> dict[str, Tensor | float]:
        """The shape, the stored share and the stored weights."""
        stored = self.stored(work, left)
        return {
            **shape_coordinates(work),
            "stored_share": octaves(stored),
            "density": stored,
            "stored": octaves(stored * work.weights),
        }
