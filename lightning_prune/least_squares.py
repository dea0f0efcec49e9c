"""The kept weights of a layer take over what the removed ones did, as far as its inputs allow.

A layer computes `y = W x` at every position (example, token, pixel); for a convolution `x` is the patch under it.
Of its inputs only second moments matter, `H = E[x x^T]`, one matrix per group. With them any mask is repaired and
judged without running the network again:

    w' = argmin E[(w' x - w x)^2] + lambda |w' - w|^2   over the kept entries of each row w of W

Sources: Frantar & Alistarh, "Optimal Brain Compression" and "SPDY" (2022); Hubara et al., "Accelerated Sparse Neural
Training" (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

DAMPING = 0.01


@dataclass(frozen=True)
class OutputError:
    """What a change of weights does to the outputs of a layer, summed over its outputs.

    Args:
        absolute: mean over positions of `|y' - y|^2`.
        relative: the same divided by the mean of `|y|^2`, 1.0 where all weights are removed.
    """

    absolute: float
    relative: float


def output_error(weight: Tensor, new_weight: Tensor, gram: Tensor) -> OutputError:
    """How far the outputs of a layer move when its weight changes, without running it.

        absolute = tr((W - W') H (W - W')^T),  relative = absolute / tr(W H W^T)

    Args:
        weight: `W`, `[out, in / groups, *kernel]`.
        new_weight: `W'`, of the same shape.
        gram: `H`, `[groups, n, n]` (`LayerStatistics.gram` or `.covariance()`).

    Raises:
        ValueError: shapes do not fit.

    >>> output_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), torch.eye(2)[None])
    OutputError(absolute=9.0, relative=0.36)
    """
    _check_shapes(weight, new_weight, gram, "new_weight")
    rows, new = (w.detach().flatten(1).to(gram) for w in (weight, new_weight))
    return error_of(power(rows - new, gram), power(rows, gram))


def error_of(absolute: float, total: float) -> OutputError:
    absolute = max(absolute, 0.0)
    relative = absolute / total if total > 0 else (0.0 if absolute == 0 else math.inf)
    return OutputError(absolute, relative)


def power(rows: Tensor, gram: Tensor) -> float:
    """`tr(W H W^T)`."""
    return float((_times(rows, gram).double() * rows.double()).sum())


def _times(rows: Tensor, gram: Tensor) -> Tensor:
    """`W H`, each row with the matrix of its group."""
    return torch.bmm(rows.reshape(len(gram), -1, rows.shape[1]), gram).view(rows.shape)


def least_squares(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    *,
    cross: Tensor | None = None,
    damping: float = DAMPING,
    max_bytes: int = 2**28,
) -> Tensor:
    """Let the kept weights of every output do the work of the removed ones, as far as they can.

    Solves for the kept entries K of each row, with `t = w H` unless `cross` is given,

        (H_KK + lambda I) (w'_K - w_K) = t_K - H_KK w_K

    Removed weights are exactly zero; a row that keeps everything (or nothing) is left as it is (is zero). No row gets
    a larger error than without repair. Rows of one mask share a factorisation; the others are solved many at a time.

    Args:
        weight: dense, `[out, in / groups, *kernel]`.
        mask: bool of the same shape, True where kept.
        gram: `H`, `[groups, n, n]`.
        cross: `E[y x^T]`, `[out, n]`, where the outputs `y` to be met are not those of `weight` on the same inputs.
        damping: `lambda` relative to the mean of the diagonal of `H`.
        max_bytes: of the systems solved at a time; a single system may need more.

    Raises:
        ValueError: shapes do not fit, the mask is not bool, moments are not finite, or the damping is negative.

    >>> both = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])        # two inputs, correlated
    >>> least_squares(torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]]), both, damping=0.0)
    tensor([[2.5000, 0.0000]])
    """
    _check_shapes(weight, mask, gram, "mask")
    check_mask(mask)
    check_number("damping", damping)
    if not torch.isfinite(gram).all() or (cross is not None and not torch.isfinite(cross).all()):
        raise ValueError("least_squares needs finite moments, got some that are not; look at the layer's inputs")
    kept = mask.flatten(1).to(gram.device)
    dense = weight.detach().flatten(1).to(gram)
    start = dense * kept
    missing = _times(dense - start, gram) if cross is None else cross.to(gram) - _times(start, gram)
    missing = missing * kept
    change = _changes(kept, missing, gram, damping, max_bytes)
    # J(start + change) - J(start); exact solutions of positive definite systems never raise it, rounding might.
    rise = ((_times(change, gram) - 2 * missing) * change).sum(1)
    change[~(rise <= 0)] = 0
    repaired = torch.where(change != 0, start + change, start).to(weight.dtype)
    return torch.where(kept, repaired, 0).to(weight.device).reshape(weight.shape)


def _changes(kept: Tensor, missing: Tensor, gram: Tensor, damping: float, max_bytes: int) -> Tensor:
    """`[out, n]`: the solutions of all rows, zero where removed."""
    change = torch.zeros_like(missing)
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean(1)
    per_group = len(kept) // len(gram)
    alone, shared = _systems(kept, per_group, (missing != 0).any(1))
    counts = kept.sum(1)
    cell = gram.element_size() + 16  # gathered, in double precision, and its factor
    while alone:
        size = int(counts[alone[0]])
        step = max(1, max_bytes // (cell * size * size))
        shared.append(alone[:step])
        alone = alone[step:]
    for rows in shared:
        members = torch.tensor(rows, device=kept.device)
        same = (kept[members] == kept[members[0]]).all() and rows[0] // per_group == rows[-1] // per_group
        lead = members[:1] if same else members
        width = int(counts[lead].max())
        # Kept columns first; behind them, as padding, removed ones, which are given an equation of their own.
        columns = kept[lead].byte().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = torch.arange(width, device=kept.device) < counts[lead, None]
        group = lead // per_group
        matrix = gram[group[:, None, None], columns[:, :, None], columns[:, None, :]].double()
        matrix *= valid[:, :, None] & valid[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(valid, ridge[group, None].double(), 1.0))
        places = columns.expand(len(members), -1)
        wanted = missing[members].gather(1, places).double()
        if same:
            solved = torch.cholesky_solve(wanted.T[None], _factor(matrix))[0].T
        else:
            solved = torch.cholesky_solve(wanted[:, :, None], _factor(matrix))[:, :, 0]
        change[members] = change[members].scatter(1, places, solved.to(change) * valid)
    return change


def _systems(kept: Tensor, per_group: int, wanted: Tensor) -> tuple[list[int], list[list[int]]]:
    """Rows with a mask of their own, those that keep most first, and the lists of rows that share one."""
    packed = functional.pad(kept, (0, -kept.shape[1] % 8)).view(len(kept), -1, 8).byte().cpu()
    packed = (packed * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    systems: dict[tuple[int, bytes], list[int]] = {}
    for row in wanted.nonzero().flatten().tolist():
        systems.setdefault((row // per_group, packed[row].numpy().tobytes()), []).append(row)
    counts = kept.sum(1).tolist()
    alone = sorted((rows[0] for rows in systems.values() if len(rows) == 1), key=lambda row: -counts[row])
    return alone, [rows for rows in systems.values() if len(rows) > 1]


def _factor(matrix: Tensor) -> Tensor:
    """Cholesky factors; where a matrix is singular, the smallest power of ten on its diagonal that makes one exist."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    jitter = 1e-14
    while failed.any() and jitter < 1:
        bad = failed.nonzero().flatten()
        scale = matrix[bad].diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(matrix.dtype).tiny)
        jitter *= 10
        repaired = matrix[bad] + torch.diag_embed((jitter * scale)[:, None].expand(-1, matrix.shape[1]))
        factor[bad], failed[bad] = torch.linalg.cholesky_ex(repaired)
    return factor


def _check_shapes(weight: Tensor, other: Tensor, gram: Tensor, what: str) -> None:
    if other.shape != weight.shape:
        raise ValueError(f"{what} has shape {list(other.shape)}, the weight {list(weight.shape)}; they must be alike")
    n = weight[0].numel()
    if gram.ndim != 3 or gram.shape[1:] != (n, n) or len(weight) % len(gram):
        raise ValueError(
            f"a weight of shape {list(weight.shape)} needs a Gram matrix of shape [groups, {n}, {n}] with groups that "
            f"divide {len(weight)}, got {list(gram.shape)}"
        )


def check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool, True where the weight is kept, got {mask.dtype}; convert it with .bool()")


def check_number(what: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{what} is finite and at least 0, got {what}={value!r}")
