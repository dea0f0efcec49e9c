"""What is left of a weight, in the terms that kernels' costs depend on."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.granularities import NM, Block, Channel, Filter, Granularity, Kernel, Vector


@dataclass(frozen=True)
class Occupancy:
    """Fractions of a weight, or of many candidates for it, that are left; tensors of one shape.

    Args:
        density: weights that are not zero.
        rows: outputs with any weight left.
        columns: inputs with any weight left; of a grouped convolution, in any group.
        blocks: of `r` neighbouring outputs by `c` neighbouring inputs at one position of the window, the share
            with any weight left.
    """

    density: Tensor
    rows: Tensor
    columns: Tensor
    blocks: Callable[[int, int], Tensor]


def measured_occupancy(weight: Tensor, living_inputs: Tensor | None = None) -> Occupancy:
    """What is left of a weight `[out, in, *window]`, counted.

    Args:
        weight: with its zeros.
        living_inputs: `[in]` (of a grouped convolution, of all groups), False where an input is known to be zero: its
            weights count as removed.

    Raises:
        ValueError: there are not as many living inputs as the weight, in some number of groups, has inputs.

    >>> left = measured_occupancy(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    >>> left.density.item(), left.rows.item(), left.blocks(2, 2).item()
    (0.25, 0.5, 1.0)
    """
    kept = weight.detach().cpu() != 0
    if living_inputs is not None:
        kept = kept & _per_output(living_inputs.cpu(), tuple(weight.shape))
    kept = kept.flatten(2) if kept.ndim > 2 else kept.unsqueeze(2)

    def blocks(rows: int, cols: int) -> Tensor:
        out, inputs = -(-kept.shape[0] // rows), -(-kept.shape[1] // cols)
        padded = kept.new_zeros(out * rows, inputs * cols, kept.shape[2])
        padded[: kept.shape[0], : kept.shape[1]] = kept
        return padded.view(out, rows, inputs, cols, -1).any(dim=3).any(dim=1).double().mean()

    return Occupancy(
        kept.double().mean(), kept.any(2).any(1).double().mean(), kept.any(2).any(0).double().mean(), blocks
    )


def expected_occupancy(
    granularity: Granularity, sparsity: Tensor, weight_shape: tuple[int, ...], living_inputs: Tensor | None = None
) -> Occupancy:
    """What is left on average when groups, and inputs, are removed at random, each on its own.

    A block that meets `m` groups is empty with probability `s^m`. Criteria that remove neighbours together leave
    fewer blocks, so that this is the cautious side. N:M removes protected weights last.

    Args:
        granularity: the groups.
        sparsity: fraction removed, any shape.
        weight_shape: `[out, in, *window]`.
        living_inputs: share of the inputs that is not zero throughout, of a shape that broadcasts with `sparsity`.
            With one input per output (depthwise), each output has one of its own.

    >>> left = expected_occupancy(Block(4, 4), torch.tensor(0.75), (64, 64))
    >>> left.density.item(), left.blocks(4, 4).item(), left.blocks(8, 8).item()
    (0.25, 0.25, 0.68359375)
    """
    out, inputs = weight_shape[0], weight_shape[1] if len(weight_shape) > 1 else 1
    taps = math.prod(weight_shape[2:])
    sparsity = sparsity.double()
    living = torch.ones_like(sparsity) if living_inputs is None else living_inputs.double()
    sparsity, living = torch.broadcast_tensors(sparsity, living)
    height, width, depth = _group(granularity, out, inputs, weight_shape[2:])
    nm = granularity if isinstance(granularity, NM) else None

    def empty(columns: int, groups: int) -> Tensor:
        """Chance that nothing is left where this many neighbouring columns meet this many groups each."""
        if nm is not None:
            alive = (
                math.comb(columns, j)
                * living**j
                * (1.0 - living) ** (columns - j)
                * _removed(nm, sparsity, j) ** groups
                for j in range(columns + 1)
            )
            return torch.stack(list(alive)).sum(0)
        dead: Tensor = (1.0 - living) ** columns
        return dead + (1.0 - dead) * sparsity**groups

    def left(rows: int, cols: int, positions: int) -> Tensor:
        """Share of boxes of this size with any weight left."""
        along_rows, along_columns = _cuts(out, rows, height), _cuts(inputs, cols, width)
        if inputs == 1:  # what is dead is then an output's own input, and falls out with rows
            along_rows, along_columns = along_columns, along_rows
        share = torch.zeros_like(sparsity)
        for row_pieces, row_boxes in along_rows.items():
            groups = sum(count for _, count in row_pieces) * -(-positions // depth)
            for column_pieces, column_boxes in along_columns.items():
                nothing = math.prod((empty(size, groups) ** count for size, count in column_pieces), start=1.0)
                share = share + row_boxes * column_boxes * (1.0 - nothing)
        return (share / (along_rows.total() * along_columns.total())).clamp(0.0, 1.0)

    return Occupancy(
        (1.0 - sparsity) * living,
        left(1, inputs, taps),
        left(out, 1, taps),
        lambda rows, cols: left(min(rows, out), min(cols, inputs), 1),
    )


def _per_output(living_inputs: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    """`[in]` -> `[out, in / groups, 1, ..]`: which inputs each output meets are living."""
    out, inputs, *window = weight_shape
    groups = len(living_inputs) // inputs
    if groups * inputs != len(living_inputs) or not groups or out % groups:
        raise ValueError(f"a weight of shape {weight_shape} cannot have {len(living_inputs)} living_inputs")
    met = living_inputs.view(groups, inputs).repeat_interleave(out // groups, 0)
    return met.view(out, inputs, *[1] * len(window))


@functools.lru_cache(maxsize=1024)
def _cuts(size: int, box: int, group: int) -> Counter[tuple[tuple[int, int], ...]]:
    """How groups cut the boxes along a dimension: sizes of a box's pieces and how many of each -> number of boxes."""
    cuts: Counter[tuple[tuple[int, int], ...]] = Counter()
    for start in range(0, size, box):
        stop = min(start + box, size)
        edges = [start, *range((start // group + 1) * group, stop, group), stop]
        pieces = Counter(b - a for a, b in itertools.pairwise(edges))
        cuts[tuple(sorted(pieces.items()))] += 1
    return cuts


def _removed(nm: NM, sparsity: Tensor, count: int) -> Tensor:
    """Chance that `count` weights of one group are all removed, the `n` protected ones of each group going last."""
    first = (sparsity / nm.sparsity).clamp(max=1.0)
    last = ((sparsity - nm.sparsity) / (1.0 - nm.sparsity)).clamp(min=0.0)
    chances = (
        math.comb(nm.n, k) * math.comb(nm.m - nm.n, count - k) / math.comb(nm.m, count) * last**k * first ** (count - k)
        for k in range(min(nm.n, count) + 1)
    )
    return torch.stack(list(chances)).sum(0)


def _group(granularity: Granularity, out: int, inputs: int, window: tuple[int, ...]) -> tuple[int, int, int]:
    """Outputs, inputs and window positions that a group spans."""
    taps = math.prod(window)
    if isinstance(granularity, NM):
        return 1, granularity.m, 1
    if isinstance(granularity, Block):
        return granularity.rows, granularity.cols, 1
    if isinstance(granularity, Filter):
        return 1, inputs, taps
    if isinstance(granularity, Channel):
        return out, 1, taps
    if isinstance(granularity, Kernel):
        return 1, 1, taps
    if isinstance(granularity, Vector):
        if granularity.dim < 2:
            return (out, 1, 1) if granularity.dim == 0 else (1, inputs, 1)
        return 1, 1, window[granularity.dim - 2]
    return 1, 1, 1
