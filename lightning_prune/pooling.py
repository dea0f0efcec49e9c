"""Max pooling of images, which PyTorch does several times faster in two steps, down and across, than in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.folding import replace_module, unwatched

_FEWEST_NUMBERS = 2**14
"""With fewer, PyTorch's own way is faster."""


class SeparablePool(nn.Module):
    """Max pooling down the columns of an image, then across its rows: whole rows are compared at once.

        max_{i,j} x[s r + i - p, s c + j - p] = max_j max_i x[s r + i - p, s c + j - p]

    Whatever else, it gives to PyTorch: small images, dilated windows, some that begin beyond the image.

    Args:
        pool: of stride s and padding p.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool
        window, stride, padding = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)
        self.steps = [_Step(window[i], stride[i], padding[i], pool.ceil_mode) for i in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        """What the pooling gives."""
        large = x.ndim == 4 and x.numel() >= _FEWEST_NUMBERS and x.device.type == "cpu"
        if not large or _pair(self.pool.dilation) != (1, 1) or not all(map(_Step.fits, self.steps, x.shape[2:])):
            return self.pool(x)  # type: ignore[no-any-return]
        down, across = self.steps
        if x.is_contiguous():
            return across(down(x, 2), 3).contiguous()
        lying = x.movedim(0, -1)
        if lying.is_contiguous():
            return across(down(lying, 1), 2).contiguous().movedim(-1, 0)
        return self.pool(x)  # type: ignore[no-any-return]


class _Step:
    """Pooling of one dimension."""

    def __init__(self, window: int, stride: int, padding: int, ceil: bool) -> None:
        self.window, self.stride, self.padding, self.ceil = window, stride, padding, ceil

    def fits(self, size: int) -> bool:
        """Whether there is a result, and the number at `stride * i` is in the window of each, the i-th."""
        count = self._count(size)
        return count > 0 and (count - 1) * self.stride < size

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        size, count = x.shape[dim], self._count(x.shape[dim])
        found, own = self._every(x, dim, 0, count), False
        # Of which results, from `first` to before `end`, a tap's number is inside the image; those of all come first.
        ranges = []
        for tap in set(range(self.window)) - {self.padding}:
            first = max(0, -(-(self.padding - tap) // self.stride))
            end = min(count, (size - 1 + self.padding - tap) // self.stride + 1)
            if first < end:
                ranges.append((first, end, first * self.stride + tap - self.padding))
        for first, end, start in sorted(ranges, key=lambda each: each[0] - each[1]):
            beside = self._every(x, dim, start, end - first)
            if not own and end - first == count:
                found = torch.maximum(found, beside)
            else:
                found = found if own else found.clone(memory_format=torch.contiguous_format)
                part = found.narrow(dim, first, end - first)
                torch.maximum(part, beside, out=part)
            own = True
        return found if own else found.clone()  # whoever gets it may work in place

    def _every(self, x: Tensor, dim: int, start: int, count: int) -> Tensor:
        part = x.narrow(dim, start, (count - 1) * self.stride + 1)
        return part[(slice(None),) * dim + (slice(None, None, self.stride),)]

    def _count(self, size: int) -> int:
        free = size + 2 * self.padding - self.window
        count = (free + (self.stride - 1 if self.ceil else 0)) // self.stride + 1
        beyond = self.ceil and (count - 1) * self.stride >= size + self.padding  # windows begin inside, or before
        return count - 1 if beyond else count


def separate_pools(model: nn.Module) -> None:
    """Put a `SeparablePool` in the place of every max pooling of images.

    >>> model = nn.Sequential(nn.MaxPool2d(2))
    >>> separate_pools(model)
    >>> model(torch.arange(4.0).view(1, 1, 2, 2))
    tensor([[[[3.]]]])
    """
    for module in list(model.modules()):
        if type(module) is nn.MaxPool2d and unwatched(module) and not module.return_indices:
            replace_module(model, module, SeparablePool(module))


def _pair(number: int | Sequence[int]) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else (number[0], number[-1])
