"""Granularities: which weights live and die together.

A granularity sees a weight as `[out, in, *kernel]` (`lightning_prune.targets.Layout` turns transposed layers around).
`pool` averages the scores of each group into one, `expand` turns one verdict per group into one per weight.
The groups of one weight are all of the same size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.selection import lowest_per_row

__all__ = ["NM", "Block", "Channel", "Filter", "Granularity", "Kernel", "Unstructured", "Vector"]


@dataclass(frozen=True)
class Granularity(ABC):
    """Groups of weights that are removed together.

    A granularity of your own is a frozen dataclass with `groups`, `pool` and `expand`.
    """

    @abstractmethod
    def groups(self, shape: torch.Size) -> torch.Size:
        """The shape of the array of groups of a weight of this shape.

        Raises:
            ValueError: if such a weight has no such groups; the message says why.
        """

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """Scores of weights -> scores of groups: the mean, so that groups of different sizes compare."""

    @abstractmethod
    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """One value per group -> that value for each of the group's weights."""

    def protected(self, scores: Tensor) -> Tensor | None:
        """Which groups may not be removed, given the groups' scores; None if all may."""
        return None

    def require_reachable(self, sparsity: float) -> None:
        """Check that a weight can be pruned to this target.

        Raises:
            ValueError: if the granularity cannot have this sparsity.
        """
        return None

    def within_filter(self, shape: torch.Size) -> bool:
        """Whether each filter (one index of the output side) holds several whole groups to choose from."""
        groups = self.groups(shape)
        return len(groups) > 1 and groups[0] == shape[0] and groups.numel() > groups[0]


@dataclass(frozen=True)
class Unstructured(Granularity):
    """Every weight on its own.

    >>> Unstructured().groups(torch.Size([4, 3]))
    torch.Size([4, 3])
    """

    def groups(self, shape: torch.Size) -> torch.Size:
        """As many as weights."""
        return shape

    def pool(self, scores: Tensor) -> Tensor:
        """The scores themselves."""
        return scores

    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The values themselves."""
        return groups


class _Reduced(Granularity):
    """Groups that span whole dimensions of the weight."""

    @abstractmethod
    def spanned(self, ndim: int) -> tuple[int, ...]:
        """The dimensions along which weights belong to one group.

        Raises:
            ValueError: if a weight of this many dimensions has no such groups.
        """

    def groups(self, shape: torch.Size) -> torch.Size:
        """The shape without the spanned dimensions."""
        spanned = self.spanned(len(shape))
        return torch.Size(size for dim, size in enumerate(shape) if dim not in spanned)

    def pool(self, scores: Tensor) -> Tensor:
        """The mean over the spanned dimensions."""
        spanned = self.spanned(scores.ndim)
        return scores.mean(dim=spanned) if spanned else scores

    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The group's value along the spanned dimensions."""
        for dim in self.spanned(len(shape)):
            groups = groups.unsqueeze(dim)
        return groups.expand(shape)

    def within_filter(self, shape: torch.Size) -> bool:
        """Not if groups span the outputs, even where a weight has as many inputs as outputs."""
        return 0 not in self.spanned(len(shape)) and super().within_filter(shape)


@dataclass(frozen=True)
class Vector(_Reduced):
    """The weights that differ only in their index along one dimension.

    Args:
        dim: the dimension of `[out, in, *kernel]`; `Vector(3)` of a convolution's weight are its kernels' rows.

    >>> Vector(dim=1).groups(torch.Size([4, 3]))
    torch.Size([4])
    """

    dim: int

    def __post_init__(self) -> None:
        """Refuse a dimension counted from the end: weights differ in how many they have."""
        if not _whole(self.dim) or self.dim < 0:
            raise ValueError(f"Vector needs a dimension >= 0, counted from the front, got dim={self.dim!r}")

    def spanned(self, ndim: int) -> tuple[int, ...]:
        """The one dimension."""
        if self.dim >= ndim:
            raise ValueError(f"it has {ndim} dimensions, so there is no dimension {self.dim}")
        return (self.dim,)


@dataclass(frozen=True)
class Kernel(_Reduced):
    """The kernel from one input channel to one output channel of a convolution.

    >>> Kernel().groups(torch.Size([8, 4, 3, 3]))
    torch.Size([8, 4])
    """

    def spanned(self, ndim: int) -> tuple[int, ...]:
        """All but the first two."""
        if ndim < 3:
            raise ValueError("only weights of convolutions have kernels; use Unstructured() or Vector(dim)")
        return tuple(range(2, ndim))


@dataclass(frozen=True)
class Filter(_Reduced):
    """All weights of one output: a convolution's filter, a linear layer's neuron.

    >>> Filter().groups(torch.Size([8, 4, 3, 3]))
    torch.Size([8])
    """

    def spanned(self, ndim: int) -> tuple[int, ...]:
        """All but the first."""
        if ndim < 1:
            raise ValueError("a single number has no filters; use Unstructured()")
        return tuple(range(1, ndim))


@dataclass(frozen=True)
class Channel(_Reduced):
    """All weights of one input (of a grouped convolution: one input of every group).

    >>> Channel().groups(torch.Size([8, 4, 3, 3]))
    torch.Size([4])
    """

    def groups(self, shape: torch.Size) -> torch.Size:
        """One per input."""
        if len(shape) > 1 and shape[1] == 1:
            raise ValueError("it has a single input channel, all or nothing; use Filter()")
        return super().groups(shape)

    def spanned(self, ndim: int) -> tuple[int, ...]:
        """All but the second."""
        if ndim < 2:
            raise ValueError("a weight of fewer than two dimensions has no input side; use Filter()")
        return (0, *range(2, ndim))


@dataclass(frozen=True)
class Block(Granularity):
    """Blocks of `rows` outputs by `cols` inputs, at each position of the kernel separately.

    Args:
        rows: neighbouring outputs, dividing their number.
        cols: neighbouring inputs, dividing their number.

    >>> Block(4, 2).groups(torch.Size([8, 4, 3, 3]))
    torch.Size([2, 2, 3, 3])
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        """Refuse sizes that are no counts."""
        if not _whole(self.rows, self.cols) or min(self.rows, self.cols) < 1:
            raise ValueError(f"Block needs whole rows and cols >= 1, got rows={self.rows!r}, cols={self.cols!r}")

    def groups(self, shape: torch.Size) -> torch.Size:
        """`[out / rows, in / cols, *kernel]`."""
        if len(shape) < 2 or shape[0] % self.rows or shape[1] % self.cols:
            raise ValueError(
                f"blocks of {self.rows} outputs by {self.cols} inputs do not divide it; leave it out of the plan or "
                "choose rows and cols that divide its first two dimensions"
            )
        return torch.Size((shape[0] // self.rows, shape[1] // self.cols, *shape[2:]))

    def pool(self, scores: Tensor) -> Tensor:
        """The mean over each block."""
        out, inputs, *kernel = self.groups(scores.shape)
        return scores.reshape(out, self.rows, inputs, self.cols, *kernel).mean(dim=(1, 3))

    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The block's value for each of its weights."""
        return groups.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)


@dataclass(frozen=True)
class NM(Granularity):
    """N:M sparsity: of every `m` neighbouring inputs, `n` are kept.

    The only targets are `1 - n / m` and 0. On the way there single weights are removed, never more than `m - n` of a
    group, so that every intermediate sparsity is met exactly as well.

    Args:
        n: weights kept per group, at least 1 and below `m`.
        m: size of the group; it divides the number of inputs (dimension 1), at each position of the kernel.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), section 3.

    >>> NM(2, 4).sparsity
    0.5
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse patterns that keep nothing or everything."""
        if not _whole(self.n, self.m) or not 1 <= self.n < self.m:
            raise ValueError(f"NM needs whole numbers 1 <= n < m, got n={self.n!r}, m={self.m!r}")

    @property
    def sparsity(self) -> float:
        """The one sparsity this pattern has."""
        return 1.0 - self.n / self.m

    def groups(self, shape: torch.Size) -> torch.Size:
        """As many as weights: it is single weights that are removed."""
        if len(shape) < 2 or shape[1] % self.m:
            inputs = shape[1] if len(shape) > 1 else 0
            raise ValueError(
                f"groups of {self.m} do not divide its {inputs} inputs; leave it out of the plan or choose an m "
                "that divides them"
            )
        return shape

    def pool(self, scores: Tensor) -> Tensor:
        """The scores themselves."""
        return scores

    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The values themselves."""
        return groups

    def protected(self, scores: Tensor) -> Tensor:
        """The `n` highest of every group."""
        rows = scores.movedim(1, -1)
        kept = ~lowest_per_row(rows.reshape(-1, self.m), self.m - self.n)
        return kept.reshape(rows.shape).movedim(-1, 1)

    def require_reachable(self, sparsity: float) -> None:
        """Only `1 - n / m` and 0."""
        if sparsity and abs(sparsity - self.sparsity) > 1e-6:
            raise ValueError(
                f"NM(n={self.n}, m={self.m}) removes exactly {self.sparsity:g} of a weight, not {sparsity:g}; ask for "
                f"{self.sparsity:g} or 0"
            )


def _whole(*numbers: object) -> bool:
    """Whether these count something: `True` does not."""
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
